"""The tables and the picture of the studies `devices` and `rivals`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from simulations.devices.rows import ROWS
from simulations.shared.results import Results
from simulations.shared.statistics import between
from simulations.shared.tables import figure, markdown, megabytes, page, percent

TARGET = 0.8  # the accuracy of which the table says when it is reached
COLUMNS = (
    "row",
    "accuracy",
    "when pipelined ends",
    "simulated s",
    "s to .80",
    "MB up",
    "MB down",
    "G multiply-adds",
    "heard",
)
Runs = list[dict[str, Any]]
Points = Sequence[tuple[float, float]]


def tables(results: Results) -> str:
    """Return a table for each kind of devices."""
    return page(*(markdown(COLUMNS, _rows(rows), kind) for kind, rows in results["runs"].items()))


def _rows(rows: dict[str, Runs]) -> Iterator[list[str]]:
    """Yield each row's means over seeds, with the accuracy at the time when ``pipelined`` ends."""
    ends = mean(run["seconds"] for run in rows.get("pipelined", next(iter(rows.values()))))
    for name, runs in rows.items():
        seconds, up, down, adds, heard = (
            mean(run[key] for run in runs) for key in ("seconds", "bytes_up", "bytes_down", "multiply_adds", "heard")
        )
        yield [
            name,
            between([run["accuracy"] for run in runs]),
            between([at(run["points"], ends) for run in runs]),
            figure(seconds),
            _reached(runs),
            megabytes(up, 2),
            megabytes(down, 2),
            f"{adds / 1e9:.2f}",
            percent(heard),
        ]


def at(points: Points, seconds: float) -> float:
    """Return the accuracy at a time; NaN before the first test."""
    return next((found for when, found in reversed(points) if when <= seconds), float("nan"))


def reached(points: Points) -> float | None:
    """Return when the target is reached for the first time; None: never."""
    return next((when for when, found in points if found >= TARGET), None)


def _reached(runs: Runs) -> str:
    """Return the mean time to the target, if all runs have reached it."""
    times = [when for run in runs if (when := reached(run["points"])) is not None]
    return figure(mean(times)) if len(times) == len(runs) else "-"


def draw(results: Results, path: Path) -> None:
    """Plot accuracy over simulated time, the mean of seeds from when all have been tested on: a panel per preset."""
    from matplotlib.figure import Figure

    kinds = results["runs"]
    picture = Figure(figsize=(4.5 * len(kinds), 4), layout="constrained")
    panels = picture.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axis, (kind, rows) in zip(panels, kinds.items(), strict=True):
        for i, (name, runs) in enumerate(rows.items()):
            style = "-" if name in ROWS and ROWS[name].kind == "fedsplit" else "--"
            axis.plot(*_curve(runs), style, drawstyle="steps-post", color=f"C{i}", label=name)
        axis.set(title=kind, xlabel="simulated seconds", xscale="log", ylim=(0.4, 0.9))
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on held-out devices")
    picture.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    picture.savefig(path, dpi=120)


def _curve(runs: Runs) -> tuple[list[float], list[float]]:
    """Return times, none before a tenth of a second, and mean accuracies."""
    times = np.unique([when for run in runs for when, _ in run["points"]]).tolist()
    return [max(when, 0.1) for when in times], [mean(at(run["points"], when) for run in runs) for when in times]
