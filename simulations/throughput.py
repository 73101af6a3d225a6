"""How fast a simulation trains, beside a plain PyTorch loop and beside split learning written naively on Flower.

    python -m simulations throughput --devices 20 1000 10000 --records 100000

The same network, records, mini-batch size and cores; start-up (Ray, reading data, torch's first optimizer) is not
counted. Repetitions are interleaved, each is compared with the plain loop beside it. The naive app runs at the first
number of devices for a few steps of 16 records on each, which are larger mini-batches, in its favour; what enforcing
with leverage checks costs is measured on a single pass over fewer records.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from fedsplit import simulate
from fedsplit.common.errors import RunError
from fedsplit.model.tasks import task_of
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings, check_settings
from fedsplit.server.batches import minibatches
from simulations.shared import naive, replicated
from simulations.shared.options import option
from simulations.shared.results import Results
from simulations.shared.settings import Changes
from simulations.shared.tables import markdown, page
from simulations.shared.workers import quiet

MODELS = {"conv": {"name": "sensor-cnn", "width": 16}, "light": {"name": "mlp", "width": 256}}
NODES = 2
PLAIN, OBSERVING = "plain loop", "single pass, observing"
Rows = Mapping[str, Callable[[], float]]


@dataclass(frozen=True)
class Options:
    """How much is trained, and how often."""

    devices: tuple[int, ...] = option((20, 1000, 10_000), quick=(20,))
    records: int = option(100_000, quick=2000)
    guarded: int = option(10_000, quick=500, help="records of the rows about enforcing")
    epochs: int = option(2, quick=1)
    repeats: int = option(3, quick=1)
    naive_steps: int = option(15, quick=2)
    models: tuple[str, ...] = option(tuple(MODELS), quick=("light",), choices=tuple(MODELS))


def settings_for(model: str, devices: int, epochs: int, engine: str, changes: Changes | None = None) -> Settings:
    """Return a pipelined run with whole epochs as chunks, a quarter of the outputs kept; the guard observes."""
    return check_settings(
        {
            "run": {"name": "throughput", "rounds": epochs, "engine": engine},
            "data": replicated.DATA,
            "devices": {"count": devices, "per-node": -(-devices // NODES), "test": [0]},
            "model": MODELS[model],
            "dropping": {"policy": "random", "keep": 0.25},
            "protocol": {"mode": "pipelined", "chunk": "epoch"},
            **(changes or {}),
        }
    )


def single_pass(model: str, devices: int, guard: str) -> Settings:
    """Return a run over a frozen first layer that the shipped limits allow: each record is released once."""
    changes: Changes = {
        "protocol": {"mode": "single-pass", "chunk": "epoch"},
        "dropping": {"policy": "top-k", "k": 48},
        "first-layer": {"strategy": "frozen"},
        "guard": {"mode": guard},
    }
    return settings_for(model, devices, 1, "ray", changes)


def plain_loop(settings: Settings) -> float:
    """Train the whole network in one place, with masks from torch's own generator; return seconds per record."""
    model, keep = Experiment(settings).model, settings.dropping.keep or 1.0
    first = model.first_layer
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
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return (time.perf_counter() - began) / (settings.run.rounds * len(x))


def fedsplit_run(settings: Settings) -> float:
    """Simulate; return the seconds of training per record."""
    with tempfile.TemporaryDirectory() as folder:
        result = simulate(settings, out=folder)
    if result["guard"]["mode"] == "enforce" and result["guard"]["refused"]:
        raise RunError(f"the guard refused records: {result['guard']['refused']}")
    return float(result["seconds"]["training"] / result["samples"])


def training_rows(model: str, devices: int, epochs: int) -> Rows:
    """Return what is compared with the plain loop, by name."""
    on_ray, inline = (settings_for(model, devices, epochs, engine) for engine in ("ray", "inline"))
    return {
        PLAIN: partial(plain_loop, inline),
        "fedsplit on Ray": partial(fedsplit_run, on_ray),
        "fedsplit in one process": partial(fedsplit_run, inline),
    }


def guard_rows(model: str, devices: int) -> Rows:
    """Return the two whose difference is what enforcing costs, by name."""
    return {
        OBSERVING: partial(fedsplit_run, single_pass(model, devices, "observe")),
        "single pass, enforcing": partial(fedsplit_run, single_pass(model, devices, "enforce")),
    }


def measure(rows: Rows, repeats: int, **named: Any) -> list[dict[str, Any]]:
    """Measure all rows in turns; return the seconds of a record in each."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, run in rows.items():
            seconds[name].append(run())
            print(f"{named}, {name}: {1e6 * seconds[name][-1]:.1f} us a record", file=sys.stderr)
    return [{**named, "row": name, "seconds": own} for name, own in seconds.items()]


def study(options: Options) -> Results:
    """Return the rows of training, and those of enforcing."""
    quiet()
    os.environ[replicated.RECORDS] = str(options.records)
    trained: list[dict[str, Any]] = []
    first = options.devices[0]
    for model in options.models:
        for devices in options.devices:
            rows = dict(training_rows(model, devices, options.epochs))
            if devices == first:
                rows["naive Flower app"] = partial(
                    naive.run, settings_for(model, devices, 1, "ray"), options.naive_steps
                )
            trained += measure(rows, options.repeats, model=model, devices=devices)
    os.environ[replicated.RECORDS] = str(options.guarded)
    guarded = [measure(guard_rows(model, first), options.repeats, model=model) for model in options.models]
    return {"training": trained, "guard": [row for rows in guarded for row in rows]}


def tables(results: Results) -> str:
    """Return the table of training, and that of enforcing."""
    trained, guarded = results["training"], results["guard"]
    rows = [
        (row["model"], f"{row['devices']:,}", row["row"], *_cells(row, trained, ("model", "devices"), PLAIN))
        for row in trained
    ]
    enforced = [(row["model"], row["row"], *_cells(row, guarded, ("model",), OBSERVING)) for row in guarded]
    return page(
        markdown(("network", "devices", "", "µs a record", "ratio"), rows),
        markdown(("network", "", "µs a record", "ratio"), enforced),
    )


def _cells(row: dict[str, Any], rows: list[dict[str, Any]], same: tuple[str, ...], base: str) -> tuple[str, str]:
    """Return a row's median time, and its median ratio to the row ``base`` that is the same in some keys."""
    other = next(o for o in rows if o["row"] == base and all(o[key] == row[key] for key in same))
    ratio = median(own / its for own, its in zip(row["seconds"], other["seconds"], strict=True))
    return f"{1e6 * median(row['seconds']):,.1f}", f"{ratio:.2f}"
