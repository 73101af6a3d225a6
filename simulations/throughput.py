"""How fast a simulation trains, beside a plain PyTorch loop.

    python simulations/throughput.py --devices 20 1000 10000 --records 100000

The same network, records, mini-batch size and cores everywhere; start-up (Ray, reading data) is not counted.
Repetitions are interleaved, each is compared with the plain loop beside it. Writes a table and `throughput.json` to
`simulations/results/throughput`.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import replicated
import torch
from rich.console import Console
from rich.table import Table

from fedsplit import simulate
from fedsplit.assemble import data_source, dropping, split_model
from fedsplit.config import Settings, check_settings
from fedsplit.dropping import simulation_secret
from fedsplit.trunk import minibatches, summed_loss

RESULTS = Path(__file__).parent / "results" / "throughput"
MODELS = {"conv": {"name": "sensor-cnn", "width": 16}, "light": {"name": "mlp", "width": 256}}
NODES = 2


def settings_for(model: str, devices: int, epochs: int, engine: str, guard: dict[str, Any]) -> Settings:
    """Return a pipelined run with whole epochs as chunks, a quarter of the outputs kept."""
    return check_settings(
        {
            "run": {"name": "throughput", "rounds": epochs, "engine": engine},
            "data": {"builder": "replicated:device", "task": "classification", "outputs": 7},
            "devices": {"count": devices, "per-node": -(-devices // NODES), "test": [0]},
            "model": MODELS[model],
            "dropping": {"policy": "random", "keep": 0.25},
            "protocol": {"mode": "pipelined", "chunk": "epoch"},
            "guard": guard,
        }
    )


def plain_loop(settings: Settings) -> float:
    """Train the whole network in one place with the same dropping; return seconds."""
    source, policy = data_source(settings), dropping(settings)
    model, secret = split_model(settings, source), simulation_secret(settings.run.seed, 0)
    rows = np.arange(int(os.environ[replicated.RECORDS])) % len(replicated.windows().x)
    x, y = (torch.from_numpy(a[rows]) for a in (replicated.windows().x, replicated.windows().y))
    optimizer = torch.optim.Adam([*model.first_layer.layer.parameters(), *model.trunk.parameters()], 1e-3)
    began = time.perf_counter()
    for epoch in range(settings.run.rounds):
        for chosen in minibatches(np.random.default_rng(epoch).permutation(len(x)), settings.protocol.batch_size):
            outputs = model.first_layer.outputs(x[chosen])
            mask = policy.mask(outputs.detach().flatten(1).numpy(), secret, epoch, chosen)
            predictions = model.trunk(outputs * torch.from_numpy(mask).reshape(outputs.shape))
            loss = summed_loss("classification", predictions, y[chosen]) / len(chosen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return time.perf_counter() - began


def fedsplit_run(settings: Settings) -> float:
    """Simulate; return the seconds of training."""
    with tempfile.TemporaryDirectory() as folder:
        return float(simulate(settings, out=folder)["seconds"]["training"])


def rows_for(model: str, devices: int, epochs: int) -> dict[str, Callable[[], float]]:
    """Return what is measured, by name."""
    observe = {"mode": "observe"}

    def run(engine: str) -> Callable[[], float]:
        return lambda: fedsplit_run(settings_for(model, devices, epochs, engine, observe))

    return {
        "plain loop": lambda: plain_loop(settings_for(model, devices, epochs, "inline", observe)),
        "fedsplit on Ray": run("ray"),
        "fedsplit in one process": run("inline"),
    }


def measure(model: str, devices: int, epochs: int, repeats: int) -> list[dict[str, Any]]:
    """Measure all rows in turns; the first is what the others are compared with."""
    rows = rows_for(model, devices, epochs)
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, run in rows.items():
            seconds[name].append(run())
            print(f"{model}, {devices} devices, {name}: {seconds[name][-1]:.1f} s", file=sys.stderr)
    plain = seconds["plain loop"]
    return [
        {
            "model": model,
            "devices": devices,
            "row": name,
            "seconds": median(own),
            "ratio": median(s / p for s, p in zip(own, plain, strict=True)),
        }
        for name, own in seconds.items()
    ]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[20, 1000, 10_000])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    os.environ[replicated.RECORDS] = str(arguments.records)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    rows = [
        row
        for model in arguments.models
        for devices in arguments.devices
        for row in measure(model, devices, arguments.epochs, arguments.repeats)
    ]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "throughput.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    table = Table(title=f"{arguments.records:,} records, {arguments.epochs} epochs", title_justify="left")
    for name in ("model", "devices", "row", "seconds", "times the plain loop"):
        table.add_column(name, justify="left" if name in ("model", "row") else "right")
    for r in rows:
        table.add_row(r["model"], f"{r['devices']:,}", r["row"], f"{r['seconds']:.1f}", f"{r['ratio']:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
