"""What people look at after a run: the curves and the result table."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table


def draw_curves(folder: Path) -> None:
    """Draw ``curves.png`` from ``metrics.jsonl``: loss and, for classes, accuracy over rounds."""
    # matplotlib's pyplot would pick up a display and keep figures alive: the object interface does neither
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for side, style in (("train", "-"), ("test", "o-")):
            points = [(m["round"], m[f"{side}_{name}"]) for m in lines if m.get(f"{side}_{name}") is not None]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=side, markersize=4)
        axis.set(xlabel="round", ylabel=name)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False)
    figure.savefig(folder / "curves.png", dpi=120)


def result_table(result: dict[str, Any], folder: Path) -> Table:
    """Return the result as a table for a terminal."""
    table = Table(
        title=f"{result['name']}: {result['rounds']} rounds, {result['devices']} devices", title_justify="left"
    )
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in _rows(result):
        table.add_row(name, value)
    table.caption = f"written to {folder}"
    table.caption_justify = "left"
    return table


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key in ("test_accuracy", "test_r2", "test_rmse", "test_loss"):
        if result.get(key) is not None:
            rows.append((key, f"{result[key]:.4f}"))
    if result.get("test_f1"):
        rows.append(("test_f1 (lowest class)", f"{min(result['test_f1']):.4f}"))
    dense = result["dense_bytes_up"]
    share = f" (1/{dense / result['bytes_up']:.1f} of dense)" if result["bytes_up"] and dense else ""
    seconds = result["seconds"]
    rows += [
        ("exposures_max (training records)", str(result["exposures_max"])),
        ("test_exposures_max", str(result["test_exposures_max"])),
        ("samples released for training", f"{result['samples']:,}"),
        ("exchanges", f"{result['exchanges']:,}"),
        ("bytes_up", f"{result['bytes_up']:,}{share}"),
        ("bytes_down", f"{result['bytes_down']:,}"),
        ("seconds (startup + training)", f"{seconds['startup']:.1f} + {seconds['training']:.1f}"),
    ]
    return rows
