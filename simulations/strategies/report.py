"""The tables and the picture of the study of strategies."""

from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from simulations.shared.results import Results
from simulations.shared.statistics import spread
from simulations.shared.tables import markdown, page
from simulations.strategies.rows import ATTACKS

Rows = dict[str, dict[str, list[float]]]


def tables(results: Results) -> str:
    """Return a table for each mode and partition."""
    return page(*(markdown((title, *ATTACKS), _rows(rows)) for title, rows in results["accuracies"].items()))


def _rows(rows: Rows) -> Iterator[list[str]]:
    for name, cells in rows.items():
        yield [name, *(_cell(cells[attack]) if attack in cells else "" for attack in ATTACKS)]


def _cell(accuracies: list[float]) -> str:
    """Return mean and standard deviation, without the zero before the point."""
    return spread(accuracies).replace("0.", ".")


def draw(results: Results, path: Path) -> None:
    """Plot means with the range over seeds: a panel per mode and partition, a colour per attack."""
    from matplotlib.figure import Figure

    summary = results["accuracies"]
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(-(-len(summary) // 2), min(2, len(summary)), sharex=True, sharey=True, squeeze=False).flat
    for axis, (title, rows) in zip(panels, summary.items(), strict=False):
        for i, attack in enumerate(ATTACKS):
            _points(axis, rows, attack, 0.3 - 0.15 * i)
        axis.set(title=title, xlabel="accuracy on honest devices that test")
        axis.set_yticks(range(len(rows)), list(rows)[::-1])
        axis.grid(alpha=0.3)
    labels = panels[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=len(ATTACKS), frameon=False)
    figure.savefig(path, dpi=120)


def _points(axis: Any, rows: Rows, attack: str, shift: float) -> None:
    found = {place + shift: cells[attack] for place, cells in enumerate(reversed(rows.values())) if attack in cells}
    middle = [mean(values) for values in found.values()]
    below = [m - min(values) for m, values in zip(middle, found.values(), strict=True)]
    above = [max(values) - m for m, values in zip(middle, found.values(), strict=True)]
    axis.errorbar(middle, list(found), xerr=[below, above], fmt="o", markersize=4, capsize=2, label=attack)
