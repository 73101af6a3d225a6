"""What training would take on real devices: accuracy against simulated time, bytes and multiply-adds of a device.

    python simulations/devices.py

The network and the devices of configs/wearables.toml on a virtual clock, for each preset of `[devices.profile]`. Every
row is tested again and again on all records of the same held-out devices, outside the training, which takes no
simulated time and no bytes:

naive split         a message for every mini-batch and half-step, weights in each, nothing dropped (naive.py)
FedAvg, E epochs    Flower's FedAvg of the whole network, E local epochs in a round
FedAvg, warmed up   the same with one epoch, after training on the records of the donors of release-once
pipelined           one exchange per round with a whole epoch of records, 100 of 800 outputs kept
pipelined, all      the same with nothing dropped
single-pass         every record is released once, 100 of 800 outputs kept
release-once        the same in one exchange, over a first layer that the records of four donors have taught

An exchange ends with the last answer, or at a deadline: each row's own, which 95 % of exchanges would make if many
devices of the preset had these records. Who is away, late or lost is left out of that round or step in all rows. Writes
a table, `devices.json` and `devices.png` to `simulations/results/devices`. With `--tune` the rows are the rivals
with other local epochs and learning rates, on other seeds.
"""

import argparse
import csv
import json
import logging
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from exchanges import Cost, Row, deadline, holders, measured
from numpy.typing import NDArray
from protocols import changed, interval
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rivals import train_fedavg, train_naively
from safetensors.torch import load_file

from fedsplit import simulate
from fedsplit.data import Records, Source
from fedsplit.model.split import SplitModel
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings, load_settings, presets
from fedsplit.server.trunk import trunk_outputs
from fedsplit.server.virtual.clock import VirtualClock
from fedsplit.server.virtual.profile import Profile
from fedsplit.server.virtual.trace import SECOND
from fedsplit.server.warmup import public_release

RESULTS = Path(__file__).parent / "results" / "devices"
CONFIG = Path(__file__).parent.parent / "configs" / "wearables.toml"
TARGET = 0.8  # the accuracy of which the table says when it is reached
Changes = dict[str, dict[str, Any]]
Point = tuple[float, float]  # simulated seconds, accuracy

ALL: Changes = {"dropping": {"policy": "none", "k": None}}
DONORS: Changes = {"public": {"devices": [0, 1, 2, 3], "epochs": 40}}
EPOCHS: Changes = {"run": {"rounds": 20}, "protocol": {"mode": "pipelined", "chunk": "epoch"}}
PIPELINED: Changes = {**EPOCHS, "first-layer": {"lr": 0.01}}
ONCE: Changes = {"run": {"rounds": 40}, "protocol": {"mode": "release-once", "chunk": "epoch"}}


def _rival(kind: str, rounds: int, lr: float, epochs: int = 0, public: Changes | None = None) -> Row:
    own = {"run": {"rounds": rounds}, "trunk": {"lr": lr}, "protocol": {"dtype": "float32"}}
    return Row(kind, {**own, **ALL, **(public or {})}, epochs)


ROWS = {
    "naive split": _rival("naive", 300, 0.005),
    "FedAvg, 1 epoch": _rival("FedAvg", 100, 0.01, 1),
    "FedAvg, 5 epochs": _rival("FedAvg", 30, 0.01, 5),
    "FedAvg, warmed up": _rival("FedAvg", 50, 0.01, 1, DONORS),
    "pipelined": Row("fedsplit", PIPELINED),
    "pipelined, all": Row("fedsplit", {**PIPELINED, **ALL}),
    "single-pass": Row("fedsplit"),
    "release-once": Row("fedsplit", {**ONCE, **DONORS}),
}
CHOICES = {
    "pipelined": ROWS["pipelined"],
    **{f"naive split, {lr:g}": _rival("naive", 300, lr) for lr in (0.002, 0.005, 0.01)},
    **{
        f"FedAvg, {epochs}, {lr:g}": _rival("FedAvg", rounds, lr, epochs)
        for epochs, rounds in ((1, 100), (5, 30), (20, 10))
        for lr in (0.002, 0.005, 0.01, 0.02)
    },
    "FedAvg, 1, 0.01, longer": _rival("FedAvg", 200, 0.01, 1),
    **{
        f"FedAvg, warmed up, {epochs}, {lr:g}": _rival("FedAvg", rounds, lr, epochs, DONORS)
        for epochs, rounds in ((1, 50), (5, 20))
        for lr in (0.002, 0.005, 0.01)
    },
}
"""What the rivals' local epochs and learning rates were chosen from."""


# -------------------------------------------------------------------------------------------------------------- runs


def run(row: Row, settings: Settings, cost: Cost) -> dict[str, Any]:
    """Run one row with one seed; for a process of its own."""
    began, limit = time.process_time(), deadline(row, settings, cost)
    if row.kind == "fedsplit":
        found = _run_fedsplit(changed(settings, {"protocol": {"deadline": limit}}), cost)
    else:
        found = _run_rival(row, settings, cost, limit)
    return {**found, "deadline": limit, "cpu_seconds": time.process_time() - began}


def _run_rival(row: Row, settings: Settings, cost: Cost, limit: float) -> dict[str, Any]:
    source, profile, points = Experiment(settings).source, settings.devices.profile, []
    assert profile is not None
    clock = VirtualClock(Profile.of(profile, source.count, settings.run.seed), limit, settings.run.seed)

    def note(model: SplitModel) -> None:
        points.append((clock.now / SECOND, accuracy(model, settings, source)))

    if row.kind == "naive":
        train_naively(settings, holders(settings, source), clock, cost, note)
    else:
        train_fedavg(settings, holders(settings, source), clock, cost, row.epochs, note)
    return figures(points, vars(clock.counts), cost)


def _run_fedsplit(settings: Settings, cost: Cost) -> dict[str, Any]:
    """Simulate, and test what each round's checkpoint holds."""
    source, points = Experiment(settings).source, []
    model = Experiment(settings).model
    with tempfile.TemporaryDirectory() as folder:

        def note(metrics: dict[str, Any]) -> None:
            model.first_layer.layer.load_state_dict(load_file(f"{folder}/checkpoint/first_layer.safetensors"))
            model.trunk.load_state_dict(load_file(f"{folder}/checkpoint/trunk.safetensors"))
            points.append((metrics["simulated_seconds"], accuracy(model, settings, source)))

        result = simulate(settings, out=folder, report=note)
        with Path(folder, "devices.csv").open(encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    if (alone := result.get("public_only_accuracy")) is not None:
        points.insert(0, (0.0, alone))
    counts = {name: np.array([float(line[name]) for line in lines]) for name in lines[0]}
    return {**figures(points, counts, cost), "exposures": result["exposures_max"]}


def accuracy(model: SplitModel, settings: Settings, source: Source) -> float:
    """Return the accuracy on all test records, whose outputs are dropped as in training."""
    parts = [source.device(d).test for d in source.test_devices]
    test = Records(np.concatenate([r.x for r in parts]), np.concatenate([r.y for r in parts]))
    released = public_release(model, test, Experiment(settings).policy, settings.protocol.dtype, seed=0)
    outputs = trunk_outputs(model.trunk.eval(), model.first_layer.cut_shape, released)
    model.trunk.train()
    return float(source.task.score(outputs, test.y)["test_accuracy"])


def figures(points: list[Point], counts: dict[str, NDArray[Any]], cost: Cost) -> dict[str, Any]:
    """Return one run's figures; bytes, multiply-adds and exchanges are means over the devices that took part."""
    work = cost.multiply_adds[0] * counts["released"] + cost.multiply_adds[1] * counts["answered"]
    sums = {"exchanges": counts["asked"], "bytes_up": counts["bytes_up"], "bytes_down": counts["bytes_down"]}
    part = counts["asked"] > 0
    return {
        "points": points,
        "accuracy": points[-1][1],
        "seconds": points[-1][0],
        **{name: float(values[part].mean()) for name, values in {**sums, "multiply_adds": work}.items()},
        "heard": float(counts["heard"].sum() / counts["asked"].sum()),
    }


def at(points: list[Point], seconds: float) -> float:
    """Return the accuracy at a time."""
    return next((found for when, found in reversed(points) if when <= seconds), float("nan"))


def reached(points: list[Point]) -> float:
    """Return when the target is reached for the first time."""
    return next((when for when, found in points if found >= TARGET), float("inf"))


# ---------------------------------------------------------------------------------------------------------- the study


def _start_worker() -> None:
    import flwr.supercore  # noqa: F401  sets its own log level when first imported

    logging.getLogger("flwr").setLevel(logging.ERROR)
    logging.getLogger("fedsplit").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def measure(rows: dict[str, Row], kinds: list[str], seeds: range) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Run everything; return runs by preset and row, in the order of seeds."""
    base = load_settings(CONFIG, ["run.engine=inline"])
    torch.set_num_threads(1)
    costs: dict[str, Cost] = {}
    known: dict[tuple[str, str], Cost] = {}
    for name, row in rows.items():
        own = changed(base, row.changes)
        key = (row.kind, own.dropping.policy)
        known[key] = costs[name] = known.get(key) or measured(row, own)
    jobs = [(kind, name, seed) for kind in kinds for name in rows for seed in seeds]
    settings = []
    for kind, name, seed in jobs:
        own = changed(base, rows[name].changes)
        release, gradient = costs[name].seconds
        profile = {"preset": kind, "release-seconds": release, "gradient-seconds": gradient}
        settings.append(changed(own, {"run": {"seed": seed}, "devices": {"profile": profile}}))
    found: dict[str, dict[str, list[dict[str, Any]]]] = {kind: {name: [] for name in rows} for kind in kinds}
    # fresh processes, since a fork of one that has used torch's threads can hang
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        runs = pool.map(run, [rows[name] for _, name, _ in jobs], settings, [costs[name] for _, name, _ in jobs])
        bar = track(zip(jobs, runs, strict=True), "training", len(jobs), console=Console(stderr=True))
        for (kind, name, _), result in bar:
            found[kind][name].append(result)
    return found


def summarise(rows: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return one preset's figures by row: means over seeds, with the accuracy at the time when ``pipelined`` ends."""
    ends = mean(r["seconds"] for r in rows.get("pipelined", next(iter(rows.values()))))
    summary = {}
    for name, runs in rows.items():
        means = {key: mean(r[key] for r in runs) for key in runs[0] if key not in ("points", "accuracy")}
        accuracies = [r["accuracy"] for r in runs]
        found, half = interval(accuracies)
        then, then_half = interval([at(r["points"], ends) for r in runs])
        summary[name] = {
            "accuracy": found,
            "interval": half,
            "accuracies": accuracies,
            "then": then,
            "then_interval": then_half,
            "reached": [reached(r["points"]) for r in runs],
            **means,
        }
    return summary


def print_tables(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Print a table per preset."""
    columns = ("accuracy", "when pipelined ends", "seconds", f"to {TARGET}", "MB up", "MB down", "G mult-adds", "heard")
    for kind, rows in results.items():
        table = Table(title=kind, title_justify="left")
        for column in ("row", *columns):
            table.add_column(column, justify="left" if column == "row" else "right")
        for name, row in rows.items():
            table.add_row(
                name,
                f"{row['accuracy']:.3f} ± {row['interval']:.3f}",
                f"{row['then']:.3f} ± {row['then_interval']:.3f}",
                _figure(row["seconds"]),
                _figure(mean(row["reached"])),
                f"{row['bytes_up'] / 1e6:.2f}",
                f"{row['bytes_down'] / 1e6:.2f}",
                f"{row['multiply_adds'] / 1e9:.2f}",
                f"{100 * row['heard']:.0f} %",
            )
        Console(width=130).print(table)


def _figure(value: float) -> str:
    if value == float("inf"):
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def draw(results: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Plot accuracy over simulated time, the mean of seeds from when all have been tested on: a panel per preset."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(results), 4), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axis, (kind, rows) in zip(panels, results.items(), strict=True):
        for i, (name, runs) in enumerate(rows.items()):
            times = np.unique([when for r in runs for when, _ in r["points"]])
            curve = [mean(at(r["points"], when) for r in runs) for when in times]
            style = "-" if name in ROWS and ROWS[name].kind == "fedsplit" else "--"
            axis.plot(np.maximum(times, 0.1), curve, style, drawstyle="steps-post", color=f"C{i}", label=name)
        axis.set(title=kind, xlabel="simulated seconds", xscale="log", ylim=(0.4, 0.9))
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on held-out devices")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--presets", nargs="+", choices=presets(), default=list(presets()))
    parser.add_argument("--tune", action="store_true", help="rows: what the rivals' settings were chosen from")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.tune:
        runs = measure(CHOICES, options.presets, range(100, 100 + options.seeds))
    else:
        runs = measure(ROWS, options.presets, range(options.seeds))
    results = {kind: summarise(rows) for kind, rows in runs.items()}
    print_tables(results)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "devices.json").write_text(json.dumps({"rows": results, "runs": runs}, indent=1) + "\n")
    draw(runs, options.out / "devices.png")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
