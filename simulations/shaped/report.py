"""The tables of the study of the virtual clock."""

from collections.abc import Iterator
from statistics import linear_regression, median

from simulations.shared.results import Results
from simulations.shared.tables import markdown, page

COLUMNS = (
    "nodes: Mbit/s up and down, round trip",
    "real, s",
    "simulated, s",
    "ratio (single rounds)",
    "bytes to payloads'",
)


def tables(results: Results) -> str:
    """Return seconds of a round, real and simulated, and the round trips of exchanges."""
    counted = [(f"{name} exchanges", *_counted(seconds)) for name, seconds in results["counted"].items()]
    return page(
        markdown(COLUMNS, _rows(results)),
        markdown(("counted", "round trips", "and, s"), counted) if counted else "",
    )


def _rows(results: Results) -> Iterator[list[str]]:
    for name, row in results["rows"].items():
        ratios = [simulated / real for simulated, real in zip(row["simulated"], row["real"], strict=True)]
        seconds = [f"{median(row[which]):.2f}" for which in ("real", "simulated")]
        ratio = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})".replace("0.", ".")
        yield [name, *seconds, ratio, f"{row['overhead']:.3f}"]


def _counted(seconds: dict[str, float]) -> tuple[str, str]:
    """Return by how many round trips an exchange is longer, and what is left: the slope of its seconds over theirs."""
    slope, rest = linear_regression([float(latency) for latency in seconds], list(seconds.values()))
    return f"{slope:.1f}", f"{rest:.2f}"
