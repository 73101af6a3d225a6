"""The table and the picture of the frontier, and the policy that it recommends."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import numpy as np

from simulations.frontier.entries import PAPER, PUBLISHED
from simulations.shared.results import Results
from simulations.shared.statistics import by
from simulations.shared.tables import markdown, page

COLUMNS = ("policy", "accuracy", "strongest PSNR", "95th percentile", "SSIM", "identified")
Row = dict[str, Any]


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return means over seeds of each entry."""
    return [
        {
            "name": name,
            "family": family,
            "accuracy": mean(row["accuracy"] for row in mine),
            "accuracy_std": pstdev(row["accuracy"] for row in mine),
            "chosen_on_psnr": mean(row["chosen_on"]["psnr"] for row in mine),
            **{
                key: mean(row["reported"][key] for row in mine)
                for key in ("psnr", "psnr_p95", "ssim", "identification")
            },
        }
        for (name, family), mine in by(rows, "name", "family").items()
    ]


def recommended(rows: Sequence[Row]) -> Row:
    """Choose, on the first half of the targets, what is furthest below random dropping at its accuracy."""
    paper = sorted((r["accuracy"], r["chosen_on_psnr"], r["psnr"]) for r in rows if r["family"] == PAPER)
    accuracies, chosen_on, reported = (np.array(column) for column in zip(*paper, strict=True))
    inside = [r for r in rows if r["family"] not in (PAPER, *PUBLISHED) and r["accuracy"] >= accuracies[0]]
    if not inside:
        return {}
    best = max(inside, key=lambda r: np.interp(r["accuracy"], accuracies, chosen_on) - r["chosen_on_psnr"])
    gap = float(np.interp(best["accuracy"], accuracies, reported)) - best["psnr"]
    return {"name": best["name"], "accuracy": best["accuracy"], "psnr": best["psnr"], "below_random": gap}


def tables(results: Results) -> str:
    """Return a row for each entry, and what is recommended."""
    rows = summary(results["rows"])
    return page(markdown(COLUMNS, map(_cells, rows)), _said(recommended(rows)))


def _cells(row: Row) -> list[str]:
    decibels = [f"{row[key]:.1f} dB" for key in ("psnr", "psnr_p95")]
    shares = [f"{row[key]:.2f}" for key in ("ssim", "identification")]
    return [row["name"], f"{row['accuracy']:.3f} ± {row['accuracy_std']:.3f}", *decibels, *shares]


def _said(best: Row) -> str:
    if not best:
        return "No policy is as accurate as random dropping."
    return (
        f"Recommended (chosen on the other targets): {best['name']}, accuracy {best['accuracy']:.3f}, "
        f"{best['psnr']:.2f} dB, {best['below_random']:.2f} dB below random dropping at equal accuracy."
    )


def draw(results: Results, path: Path) -> None:
    """Draw accuracy over the strongest attack, a colour for each family."""
    from matplotlib.figure import Figure

    rows = summary(results["rows"])
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for (family,), mine in by(rows, "family").items():
        axis.plot([r["psnr"] for r in mine], [r["accuracy"] for r in mine], "o", label=family)
    for r in rows:
        axis.annotate(r["name"], (r["psnr"], r["accuracy"]), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axis.set(xlabel="strongest attack, PSNR (dB): less is better", ylabel="test accuracy")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
