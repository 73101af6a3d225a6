"""Compare the protocols on one data set: accuracy with interval, exchanges, bytes, exposures per record.

    python simulations/protocols.py configs/wearables.toml --seeds 5

Every row trains the same model on the same devices and is tested on the same held-out devices, once as the settings
drop activations and once without dropping. The rows:

centralised     plain PyTorch with all records in one place (dropping included): what the others are measured against
frozen          the first layer stays random, only the trunk learns: what every protocol must beat
synchronous     one small batch per round and two exchanges, no staleness
pipelined       one exchange per round with whole epochs as chunks, first-layer gradients one round late
single-pass     every record leaves its device once

A frozen first layer and pipelined training get the same number of passes over the records as centralised training.
"""

import argparse
import json
import logging
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fedsplit import simulate
from fedsplit.common.seeds import scheduled
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings, check_settings, load_settings
from fedsplit.release.streams import KEYED_ROUND, simulation_secret
from fedsplit.server.batches import minibatches

EPOCHS = 20
# 97.5 % quantiles of Student's t by degrees of freedom, for 95 % intervals of a mean
_STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def centralised(settings: Settings) -> dict[str, Any]:
    """Train the whole network in one place, with the same dropping between first layer and trunk."""
    experiment = Experiment(settings)
    source, model = experiment.source, experiment.model
    seed, policy = settings.run.seed, experiment.policy
    train = [source.device(d).train for d in range(source.count)]
    test = [source.device(d).test for d in source.test_devices]
    x, y = (torch.from_numpy(np.concatenate([getattr(r, name) for r in train])) for name in "xy")
    first, trunk = model.first_layer, model.trunk
    parameters = [*first.layer.parameters(), *trunk.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=settings.trunk.lr)  # both halves alike
    secret = simulation_secret(seed, 0)

    def forward(records: torch.Tensor, number: int, rows: np.ndarray[Any, Any]) -> torch.Tensor:
        outputs = first.activation(first.layer(records))
        mask = policy.mask(outputs.detach().flatten(1).numpy(), secret, number, rows)
        return trunk(outputs * torch.from_numpy(mask).reshape(outputs.shape))

    for epoch in range(1, EPOCHS + 1):
        for group in optimizer.param_groups:
            group["lr"] = scheduled(settings.trunk.lr, settings.trunk.schedule, epoch, EPOCHS)
        for rows in minibatches(np.random.default_rng([seed, epoch]).permutation(len(x)), settings.protocol.batch_size):
            loss = source.task.loss(forward(x[rows], epoch, rows), y[rows]) / len(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    trunk.eval()
    held_x, held_y = (np.concatenate([getattr(r, name) for r in test]) for name in "xy")
    with torch.no_grad():
        outputs = forward(torch.from_numpy(held_x), KEYED_ROUND, np.arange(len(held_x))).numpy()
    return {**source.task.score(outputs, held_y), "exposures_max": EPOCHS}


def changed(settings: Settings, changes: dict[str, dict[str, Any]]) -> Settings:
    """Return the settings with some keys of some sections changed (None removes a key)."""
    raw = settings.model_dump(by_alias=True, exclude_none=True)
    for section, values in changes.items():
        raw[section] = {k: v for k, v in (raw.get(section, {}) | values).items() if v is not None}
    return check_settings(raw)


def protocol(changes: dict[str, dict[str, Any]]) -> Callable[[Settings], dict[str, Any]]:
    """Return a row that runs fedsplit with the settings changed."""

    def run(settings: Settings) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return simulate(changed(settings, changes), out=folder)

    return run


def rows_for(settings: Settings) -> dict[str, Callable[[Settings], dict[str, Any]]]:
    """Return the rows by name; single-pass runs with the settings' own rounds and learning rates."""
    pipelined = {"mode": "pipelined", "chunk": "epoch"}
    # fewest records per device that still make about one mini-batch of all devices together
    source = Experiment(settings).source
    holders = sum(len(source.device(d).train) > 0 for d in range(source.count))
    chunk = max(1, round(settings.protocol.batch_size / holders))
    mean = sum(len(source.device(d).train) for d in range(source.count)) / holders
    single_pass = {"mode": "single-pass", "chunk": "spread"}
    return {
        "centralised": centralised,
        "frozen": protocol(
            {"run": {"rounds": EPOCHS}, "protocol": pipelined, "first-layer": {"strategy": "frozen", "args": None}}
        ),
        "synchronous": protocol(
            {
                "run": {"rounds": EPOCHS * math.ceil(mean / chunk)},
                "protocol": {"mode": "synchronous", "chunk": chunk, "batch-size": 10**6},
                "first-layer": {"lr": settings.trunk.lr},
            }
        ),
        "pipelined": protocol({"run": {"rounds": EPOCHS}, "protocol": pipelined, "first-layer": {"lr": 0.01}}),
        "single-pass": protocol({"protocol": single_pass}),
    }


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % interval over seeds."""
    if len(values) < 2:
        return statistics.mean(values), math.nan
    quantile = _STUDENT.get(len(values) - 1, 2.0)
    return statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def summarise(runs: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one row's figures: accuracy, its difference to centralised seed by seed, and costs."""
    accuracy, half = interval([r["test_accuracy"] for r in runs])
    pairs = [r["test_accuracy"] - b["test_accuracy"] for r, b in zip(runs, baseline, strict=True)]
    difference, difference_half = interval(pairs)
    costs = {k: statistics.median(r.get(k, 0) for r in runs) for k in ("exchanges", "bytes_up", "bytes_down")}
    return {
        "accuracy": accuracy,
        "interval": half,
        "to_centralised": difference,
        "to_centralised_interval": difference_half,
        **costs,
        "exposures_max": max(r["exposures_max"] for r in runs),
        "seconds": statistics.median(r["wall"] for r in runs),
        "accuracies": [r["test_accuracy"] for r in runs],
    }


def run_row(name: str, settings: Settings) -> dict[str, Any]:
    """Run one row with one seed and note its time; for a process of its own."""
    start = time.perf_counter()
    return {**rows_for(settings)[name](settings), "wall": time.perf_counter() - start}


def _start_worker() -> None:
    import flwr.supercore  # noqa: F401  sets its own log level when first imported

    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def measure(settings: Settings, seeds: int, only: list[str] | None) -> dict[str, dict[str, Any]]:
    """Run all rows for all seeds, with and without dropping."""
    variants = {"dropping": {}, "no dropping": {"dropping": {"policy": "none", "keep": None, "k": None}}}
    rows = [name for name in rows_for(settings) if not only or name in {"centralised", *only}]
    jobs = [(v, name, seed) for v in variants for name in rows for seed in range(seeds)]
    settings_of = [changed(settings, {**variants[v], "run": {"seed": s, "engine": "inline"}}) for v, _, s in jobs]
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    # fresh processes, since a fork of one that has used torch's threads can hang
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        results = pool.map(run_row, [name for _, name, _ in jobs], settings_of)
        bar = track(zip(jobs, results, strict=True), "training", len(jobs), console=Console(stderr=True))
        for (variant, name, _), result in bar:
            runs.setdefault((variant, name), []).append(result)
    return {v: {name: summarise(runs[v, name], runs[v, "centralised"]) for name in rows} for v in variants}


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """Print one table per variant."""
    for variant, rows in results.items():
        table = Table(title=variant, title_justify="left")
        for column in ("protocol", "accuracy", "to centralised", "exchanges", "MB up", "MB down", "exposures", "s"):
            table.add_column(column, justify="left" if column == "protocol" else "right")
        for name, row in rows.items():
            table.add_row(
                name,
                f"{row['accuracy']:.3f} ± {row['interval']:.3f}",
                f"{row['to_centralised']:+.3f} ± {row['to_centralised_interval']:.3f}",
                f"{row['exchanges']:,.0f}",
                f"{row['bytes_up'] / 1e6:.1f}",
                f"{row['bytes_down'] / 1e6:.1f}",
                str(row["exposures_max"]),
                f"{row['seconds']:.1f}",
            )
        Console(width=110).print(table)


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot accuracies with intervals, one panel per variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    for axis, (variant, rows) in zip(figure.subplots(1, len(results), sharex=True), results.items(), strict=True):
        names = list(rows)[::-1]
        axis.errorbar(
            [rows[n]["accuracy"] for n in names], names, xerr=[rows[n]["interval"] for n in names], fmt="o", capsize=3
        )
        axis.set(title=variant, xlabel="accuracy on held-out devices")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the comparison and write table, JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("simulations/results/protocols"))
    parser.add_argument("--only", nargs="*", help="rows besides centralised; default: all")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in fedsplit simulate")
    arguments = parser.parse_args()
    settings = load_settings(arguments.config, arguments.set)
    results = measure(settings, arguments.seeds, arguments.only)
    print_table(results)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "protocols.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results, arguments.out / "protocols.png")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
