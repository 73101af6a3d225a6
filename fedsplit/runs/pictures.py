"""Pictures of runs: their curves, and several runs side by side."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsplit.common.errors import ConfigError
from fedsplit.common.figures import AXES, FIGURES, axis_of
from fedsplit.common.files import writing
from fedsplit.runs.comparing import Run, curves
from fedsplit.runs.folder import RunFolder


def draw_curves(folder: RunFolder) -> None:
    """Draw ``curves.png`` from ``metrics.jsonl``: loss and, for classes, accuracy over rounds, and simulated time."""
    # matplotlib's pyplot would pick up a display and keep figures alive: the object interface does neither
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in folder.rounds()]
    panels = [("loss", "round"), ("accuracy", "round")]
    if any("simulated_seconds" in m for m in lines):
        known = any(m.get(f"{side}_accuracy") is not None for m in lines for side in ("train", "test"))
        panels.append(("accuracy" if known else "loss", "simulated_seconds"))
    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    for axis, (name, over) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for side, style in (("train", "-"), ("test", "o-")):
            points = [(m[over], m[f"{side}_{name}"]) for m in lines if m.get(f"{side}_{name}") is not None]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=side, markersize=4)
        axis.set(xlabel=axis_of(over).label, ylabel=name)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False)
    figure.savefig(folder.curves, dpi=120)


def draw_comparison(runs: Sequence[Run], path: Path) -> bool:
    """Draw accuracy over rounds, over bytes sent up and over exposures; return whether there was anything to draw.

    A part that no run has figures for is left out; see :func:`fedsplit.runs.comparing.notes`.

    Raises
    ------
    ConfigError
        If the path is not that of a PNG file, or cannot be written.
    """
    # the object interface, as for a run's own curves
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if path.suffix.lower() != ".png":
        raise ConfigError(f"--out must name a .png file, got {str(path)!r}")
    panels = [x.name for x in AXES if any(any(curves(run, x.name)) for run in runs)]
    if not panels:
        return False
    figure = Figure(figsize=(1 + 4 * len(panels), 4 + 0.2 * len(runs)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for over, axis in zip(panels, axes, strict=True):
        _draw_panel(axis, runs, over)
    axes[0].set_ylabel(" or ".join(_scores(runs)))
    handles = [Line2D([], [], color=f"C{number}") for number in range(len(runs))]
    labels = [run.label if run.finished else f"{run.label} (unfinished)" for run in runs]
    title = "markers: test records; thin lines: training records"
    legend = figure.legend(handles, labels, loc="outside lower center", frameon=False, title=title)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a folder's name may hold dollars
    with writing(f"plot {path}"):
        figure.savefig(path, dpi=120)
    return True


def _draw_panel(axis: Any, runs: Sequence[Run], over: str) -> None:
    drawn = axis_of(over)
    for number, run in enumerate(runs):
        for points, style, width in zip(curves(run, over), ("-", "o-"), (0.8, 1.5), strict=True):
            x, y = [p[0] / drawn.per for p in points], [p[1] for p in points]
            axis.plot(x, y, style, color=f"C{number}", linewidth=width, markersize=4)
    axis.set_xlabel(drawn.label)
    axis.grid(alpha=0.3)
    if drawn.whole:
        axis.locator_params("x", integer=True)


def _scores(runs: Sequence[Run]) -> list[str]:
    """Return what the scores are called of which any run has told: each once, in the table's order."""
    told = {name for run in runs for figures in run.rounds for name in figures}
    drawn = [known for known in FIGURES.values() if known.better == "higher" and known.name in told]
    return list(dict.fromkeys(known.score for known in drawn if known.score))
