"""The picture of the study of health monitoring: areas under the ROC curve by method."""

from pathlib import Path
from statistics import mean
from typing import Any

from simulations.health.data import PRIVATE
from simulations.shared.results import Results

COLOURS = {"none": "C0", PRIVATE: "C1"}
Row = dict[str, Any]


def draw(results: Results, path: Path) -> None:
    """Draw the methods' areas on both policies."""
    from matplotlib.figure import Figure

    rows = [row for row in results["folds"] if row["layer"] == "donors" and row["policy"] in COLOURS]
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, measure in zip(axes, ("window", "episode"), strict=True):
        for shift, policy in ((-0.15, "none"), (0.15, PRIVATE)):
            mine = [row for row in rows if row["policy"] == policy]
            _points(axis, mine, names, measure, shift)
        axis.axvline(0.5, color="grey", linewidth=0.8)
        axis.set(xlabel=f"AUC, {measure}s", yticks=range(len(names)), yticklabels=names, xlim=(0.3, 1))
    axes[0].invert_yaxis()
    axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


def _points(axis: Any, rows: list[Row], names: list[str], measure: str, shift: float) -> None:
    """Draw a policy's means, calibrated ones filled."""
    policy = rows[0]["policy"]
    for calibrated, fill, end in ((True, "full", ""), (False, "none", ", uncalibrated")):
        found = {
            name: [r[measure] for r in rows if (r["method"], r["calibrated"]) == (name, calibrated)] for name in names
        }
        places = {names.index(name) + shift: mean(values) for name, values in found.items() if values}
        axis.plot(
            list(places.values()), list(places), "o", color=COLOURS[policy], fillstyle=fill, label=f"{policy}{end}"
        )
