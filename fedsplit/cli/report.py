"""What people look at after a run: the curves and the result table, also of several runs side by side."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedsplit.common.figures import SHOWN, figure, others
from fedsplit.runs.comparing import Run, differing, listed

_REFUSED = {
    "enforce": "refused by the guard",
    "observe": "a real node would refuse",
    "by each owner": "over the owners' limits",  # some enforce them, others only count
}


_SIDE_BY_SIDE = 4  # runs whose figures fit into 80 columns


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
    if result.get("public_only_auc") is not None:
        rows.append(("public records alone (test_auc)", f"{result['public_only_auc']:.4f}"))
    return rows


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    own = [name for name in others(result) if name.startswith("test_")]  # of a task
    names = [*(known.name for known in SHOWN if known.name.startswith("test_")), *own]
    rows = [(name, _written(result, name)) for name in names if result.get(name) is not None]
    if result.get("test_f1"):
        rows.append(("test_f1 (lowest class)", f"{min(result['test_f1']):.4f}"))
    dense = result["dense_bytes_up"]
    share = f" ({result['bytes_up'] / dense:.2f} of dense activations)" if dense else ""
    seconds = result["seconds"]
    rows += [
        *_privacy(result),
        ("test_exposures_max", _written(result, "test_exposures_max")),
        ("samples released for training", _written(result, "samples")),
        ("exchanges", _written(result, "exchanges")),
        ("bytes_up", f"{_written(result, 'bytes_up')}{share}"),
        ("bytes_down", _written(result, "bytes_down")),
        ("seconds (startup + training)", f"{seconds['startup']:.1f} + {seconds['training']:.1f}"),
    ]
    rows += [(name, _written(result, name)) for name in others(result) if name not in names]
    return [*rows, *_simulated(result["simulated"])] if "simulated" in result else rows


def _written(result: dict[str, Any], name: str) -> str:
    return figure(name).written(figure(name).of(result))


def _simulated(found: dict[str, Any]) -> list[tuple[str, str]]:
    up, down, heard = found["bytes_up"], found["bytes_down"], found["participation"]
    unheard = ", ".join(f"{name} {found[name]:,}" for name in ("away", "late", "lost", "spare"))
    return [
        ("simulated seconds", f"{found['seconds']:,.1f}"),
        ("bytes up + down of a device, mean", f"{up['mean']:,.0f} + {down['mean']:,.0f}"),
        ("heard of a device: least, mean, most", f"{heard['least']}, {heard['mean']:.1f}, {heard['most']}"),
        ("not heard", unheard),
        ("releases that were never heard", f"{found['wasted']:,} of {found['released']:,}"),
    ]


def comparison_tables(runs: Sequence[Run]) -> Iterator[Table]:
    """Yield tables for a terminal of 80 columns, each of at most four runs: figures, then the settings that differ."""
    figures = [figure(name) for name in listed(runs) if any(name in run.figures for run in runs)]
    settings = differing(runs)
    for start in range(0, len(runs), _SIDE_BY_SIDE):
        some = slice(start, start + _SIDE_BY_SIDE)
        table = Table(box=None, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for run in runs[some]:
            header = Text(run.label if run.finished else f"{run.label}\n(unfinished)")
            table.add_column(header, justify="right", overflow="fold")
        table.add_row("rounds", *(_progress(run) for run in runs[some]))
        for each in figures:
            table.add_row(Text(each.title), *(each.written(run.figures.get(each.name)) for run in runs[some]))
        table.add_row()
        table.add_row(Text("settings that differ" if settings else "no setting differs", style="bold"))
        for key, values in settings.items():
            table.add_row(Text(key), *(Text(_setting(value)) for value in values[some]))
        yield table


def _progress(run: Run) -> str:
    return str(run.done) if run.finished else f"{run.done} of {run.planned}"


def _setting(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, default=str)
