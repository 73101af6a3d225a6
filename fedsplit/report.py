"""What people look at after a run: the curves and the result table."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

_REFUSED = {
    "enforce": "refused by the guard",
    "observe": "a real node would refuse",
    "by each owner": "over the owners' limits",  # some enforce them, others only count
}


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


def audit_table(report: dict[str, Any], folder: Path) -> Table:
    """Return an audit's figures as a table for a terminal."""
    criterion, control = report["criterion"], report["control"]
    table = Table(title=f"{report['name']}: {report['targets']} records attacked", title_justify="left")
    for name in ("attack", "PSNR (dB)", "95th percentile", "nMSE", "SSIM", "identified"):
        table.add_column(name, justify="left" if name == "attack" else "right")
    for name, scores in {**report["baselines"], **report["attacks"]}.items():
        keys = ("psnr", "psnr_p95", "nmse", "ssim", "identification")
        cells = ["-" if scores[key] is None else f"{scores[key]:.3f}" for key in keys]
        style = "dim" if name in report["baselines"] else "bold" if name == report["strongest"]["attack"] else None
        table.add_row(name, *cells, style=style)
    table.caption = (
        f"criterion: {criterion['equations_max']} equations of {criterion['numbers']} numbers at most, "
        f"largest leverage {criterion['leverage_max']:.3f}, {criterion['determined']:.1%} of numbers determined\n"
        f"negative control {control['psnr']:.1f} dB; {report['cpu_seconds']:.0f} s CPU; written to {folder}"
    )
    table.caption_justify = "left"
    return table


def _privacy(result: dict[str, Any]) -> list[tuple[str, str]]:
    ledger, guard = result["ledger"], result["guard"]
    rows = [("exposures_max (training records)", str(result["exposures_max"]))]
    if ledger["releases"] > result["exposures_max"]:
        rows.append(("releases of a shared segment, at most", str(ledger["releases"])))
    rows.append(("equations about a record, at most", f"{ledger['equations']:,}"))
    rows.append(("bits about a record, at most", f"{ledger['bits']:,}"))
    if ledger["leverage"] is not None:
        rows.append(("largest leverage of a number", f"{ledger['leverage']:.3f}"))
    if isinstance(ledger["epsilon"], float):
        rows.append((f"epsilon (delta {ledger['delta']:g})", f"{ledger['epsilon']:.2f}"))
    for refused, of in (("refused", ""), ("test_refused", " of test records")):
        if guard[refused]:
            said = ", ".join(f"{reason} {count:,}" for reason, count in guard[refused].items())
            rows.append((f"{_REFUSED[guard['mode']]}, of releases{of}", said))
    if result.get("public_only_accuracy") is not None:
        gain, interval = 100 * result["gain_over_public"], 100 * result["gain_interval"]
        rows.append(("public records alone", f"{result['public_only_accuracy']:.4f}"))
        rows.append(("gain over them (points)", f"{gain:+.2f} ± {interval:.2f}"))
    return rows


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key in ("test_accuracy", "test_r2", "test_rmse", "test_loss"):
        if result.get(key) is not None:
            rows.append((key, f"{result[key]:.4f}"))
    if result.get("test_f1"):
        rows.append(("test_f1 (lowest class)", f"{min(result['test_f1']):.4f}"))
    dense = result["dense_bytes_up"]
    share = f" ({result['bytes_up'] / dense:.2f} of dense activations)" if dense else ""
    seconds = result["seconds"]
    rows += [
        *_privacy(result),
        ("test_exposures_max", str(result["test_exposures_max"])),
        ("samples released for training", f"{result['samples']:,}"),
        ("exchanges", f"{result['exchanges']:,}"),
        ("bytes_up", f"{result['bytes_up']:,}{share}"),
        ("bytes_down", f"{result['bytes_down']:,}"),
        ("seconds (startup + training)", f"{seconds['startup']:.1f} + {seconds['training']:.1f}"),
    ]
    return rows
