"""Tables and figures as the documentation has them: Markdown."""

from collections.abc import Iterable, Sequence


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> str:
    """Return a table.

    Parameters
    ----------
    columns : sequence of str
        Their names, the first of which may be empty.
    rows : iterable of sequences
        The cells of each row. A row may end early: the cells that it leaves out are empty.
    title : str
        What stands above the table, in bold.
    """
    lines = [_row(columns), "|" + "---|" * len(columns)]
    lines += [_row([*map(str, cells), *[""] * (len(columns) - len(cells))]) for cells in rows]
    return "\n".join([*([f"**{title}**", ""] if title else []), *lines])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def page(*parts: str) -> str:
    """Return tables and sentences one below the other, without those that are empty."""
    return "\n\n".join(part for part in parts if part)


def megabytes(count: float, digits: int = 1) -> str:
    """Return a number of bytes as megabytes."""
    return f"{count / 1e6:.{digits}f}"


def percent(share: float) -> str:
    """Return a share in whole per cent."""
    return f"{100 * share:.0f} %"


def figure(value: float) -> str:
    """Return a number with as many digits as tell something: none after the point from 100 on.

    >>> figure(1234.5), figure(2.25)
    ('1,234', '2.2')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
