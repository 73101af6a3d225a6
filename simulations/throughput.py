"""How fast a simulation trains, beside a plain PyTorch loop and beside split learning written naively on Flower.

    python simulations/throughput.py --devices 20 1000 10000 --records 100000

The same network, records, mini-batch size and cores; start-up (Ray, reading data, torch's first optimizer) is not
counted. Repetitions are interleaved, each is compared with the plain loop beside it. The naive app runs at the first
number of devices for a few steps of 16 records on each, which are larger mini-batches, in its favour; what enforcing
with leverage checks costs is measured on a single pass over fewer records. Writes a table and `throughput.json` to
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

import naive
import numpy as np
import replicated
import torch
from rich.console import Console
from rich.table import Table

from fedsplit import simulate
from fedsplit.model.tasks import task_of
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings, check_settings
from fedsplit.server.batches import minibatches

RESULTS = Path(__file__).parent / "results" / "throughput"
MODELS = {"conv": {"name": "sensor-cnn", "width": 16}, "light": {"name": "mlp", "width": 256}}
NODES = 2


def settings_for(model: str, devices: int, epochs: int, engine: str, **sections: dict[str, Any]) -> Settings:
    """Return a pipelined run with whole epochs as chunks, a quarter of the outputs kept; the guard observes."""
    return check_settings(
        {
            "run": {"name": "throughput", "rounds": epochs, "engine": engine},
            "data": {"builder": "replicated:device", "task": "classification", "outputs": 7},
            "devices": {"count": devices, "per-node": -(-devices // NODES), "test": [0]},
            "model": MODELS[model],
            "dropping": {"policy": "random", "keep": 0.25},
            "protocol": {"mode": "pipelined", "chunk": "epoch"},
            **sections,
        }
    )


def plain_loop(settings: Settings) -> float:
    """Train the whole network in one place, with masks from torch's own generator; return seconds per record."""
    model = Experiment(settings).model
    first, keep = model.first_layer, Experiment(settings).policy.keep
    rows = np.arange(int(os.environ[replicated.RECORDS])) % len(replicated.windows().x)
    x, y = (torch.from_numpy(a[rows]) for a in (replicated.windows().x, replicated.windows().y))
    optimizer = torch.optim.Adam([*first.layer.parameters(), *model.trunk.parameters()], settings.trunk.lr)
    began = time.perf_counter()
    for epoch in range(settings.run.rounds):
        for chosen in minibatches(np.random.default_rng(epoch).permutation(len(x)), settings.protocol.batch_size):
            outputs = first.activation(first.outputs(x[chosen]))
            predictions = model.trunk(outputs * (torch.rand(outputs.shape) < keep))
            loss = task_of("classification").loss(predictions, y[chosen]) / len(chosen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return (time.perf_counter() - began) / (settings.run.rounds * len(x))


def fedsplit_run(settings: Settings) -> float:
    """Simulate; return the seconds of training per record."""
    with tempfile.TemporaryDirectory() as folder:
        result = simulate(settings, out=folder)
    if result["guard"]["mode"] == "enforce" and result["guard"]["refused"]:
        raise SystemExit(f"the guard refused records: {result['guard']['refused']}")
    return float(result["seconds"]["training"] / result["samples"])


def single_pass(model: str, devices: int, guard: str) -> Settings:
    """Return a run over a frozen first layer that the shipped limits allow: each record is released once."""
    return settings_for(
        model,
        devices,
        1,
        "ray",
        protocol={"mode": "single-pass", "chunk": "epoch"},
        dropping={"policy": "top-k", "k": 48},
        **{"first-layer": {"strategy": "frozen"}},
        guard={"mode": guard},
    )


def rows_for(model: str, devices: int, epochs: int) -> dict[str, Callable[[], float]]:
    """Return what is compared with the plain loop, by name."""
    return {
        "plain loop": lambda: plain_loop(settings_for(model, devices, epochs, "inline")),
        "fedsplit on Ray": lambda: fedsplit_run(settings_for(model, devices, epochs, "ray")),
        "fedsplit in one process": lambda: fedsplit_run(settings_for(model, devices, epochs, "inline")),
    }


def guard_rows(model: str, devices: int) -> dict[str, Callable[[], float]]:
    """Return the two whose difference is what enforcing costs, by name."""
    return {
        "single pass, observing": lambda: fedsplit_run(single_pass(model, devices, "observe")),
        "single pass, enforcing": lambda: fedsplit_run(single_pass(model, devices, "enforce")),
    }


def measure(
    rows: dict[str, Callable[[], float]], model: str, devices: int, repeats: int, base: str
) -> list[dict[str, Any]]:
    """Measure all rows in turns; ratios are to the row ``base``."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, run in rows.items():
            seconds[name].append(run())
            print(f"{model}, {devices} devices, {name}: {1e6 * seconds[name][-1]:.1f} us a record", file=sys.stderr)
    return [
        {
            "model": model,
            "devices": devices,
            "row": name,
            "microseconds": 1e6 * median(own),
            "to": base,
            "ratio": median(s / p for s, p in zip(own, seconds[base], strict=True)),
        }
        for name, own in seconds.items()
    ]


def measure_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return all rows of the table."""
    os.environ[replicated.RECORDS] = str(arguments.records)
    found, first = [], arguments.devices[0]
    for model in arguments.models:
        for devices in arguments.devices:
            rows = rows_for(model, devices, arguments.epochs)
            if devices == first:
                settings = settings_for(model, devices, 1, "ray")
                rows["naive Flower app"] = lambda settings=settings: naive.run(settings, arguments.naive_steps)  # type: ignore[misc]
            found += measure(rows, model, devices, arguments.repeats, "plain loop")
    os.environ[replicated.RECORDS] = str(arguments.guarded)
    for model in arguments.models:
        found += measure(guard_rows(model, first), model, first, arguments.repeats, "single pass, observing")
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[20, 1000, 10_000])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--guarded", type=int, default=10_000, help="records of the rows about enforcing")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--naive-steps", type=int, default=15)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    rows = measure_all(arguments)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "throughput.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    title = f"{arguments.records:,} records, {arguments.epochs} epochs, medians of {arguments.repeats}"
    table = Table(title=title, title_justify="left")
    for name in ("model", "devices", "row", "us a record", "ratio"):
        table.add_column(name, justify="left" if name in ("model", "row") else "right")
    for r in rows:
        ratio = f"{r['ratio']:.2f}" + ("" if r["to"] == "plain loop" else " of observing")
        table.add_row(r["model"], f"{r['devices']:,}", r["row"], f"{r['microseconds']:.1f}", ratio)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
