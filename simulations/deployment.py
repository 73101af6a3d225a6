"""Whether a real deployment on this machine trains what the simulation trains: the same parameters and accuracy.

    python -m simulations deployment

A SuperLink with TLS and keys, four nodes as processes of their own with the wearables data in folders of their own,
and, where it is permitted (root), in network namespaces of their own. The study `faults` injects faults into it.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fedsplit.plan.settings import Settings, load_settings
from simulations.shared.network import namespaces_permitted
from simulations.shared.options import option
from simulations.shared.processes import Deployment, deployment
from simulations.shared.results import Results
from simulations.shared.study import CONFIGS
from simulations.shared.tables import markdown

CONFIG = CONFIGS / "wearables.toml"
DEVICES, NODES = 20, 4
RUNS: dict[str, tuple[str, ...]] = {
    "SGD, FedAvg, float32, 5 rounds": (
        "run.rounds=5",
        'protocol.mode="pipelined"',
        'protocol.chunk="epoch"',
        'protocol.dtype="float32"',
        'first-layer.strategy="FedAvg"',
        "first-layer.lr=0.1",
        'trunk.optimizer="sgd"',
        "trunk.lr=0.05",
    ),
    "pipelined, 15 whole epochs": ("run.rounds=15", 'protocol.mode="pipelined"', 'protocol.chunk="epoch"'),
    "as shipped": (),
}
COLUMNS = (
    "run",
    "largest difference of a parameter",
    "accuracy, simulated",
    "deployed",
    "training, s, simulated",
    "deployed",
    "with all",
    "exchanges",
    "bytes up",
)


@dataclass(frozen=True)
class Options:
    """What is run."""

    runs: tuple[str, ...] = option(tuple(RUNS), quick=(next(iter(RUNS)),), choices=tuple(RUNS))


def study(options: Options) -> Results:
    """Run some settings as simulation and as deployment."""
    permitted, rows = namespaces_permitted(), []
    with TemporaryDirectory() as folder:
        for number, run in enumerate(options.runs):
            rows.append({"run": run, **compared(Path(folder) / str(number), RUNS[run], permitted)})
    return {"namespaces": permitted, "rows": rows}


def compared(folder: Path, overrides: Sequence[str], namespaces: bool) -> dict[str, Any]:
    """Run as deployment and as simulation; return what differs."""
    own = (*overrides, f"devices.per-node={DEVICES // NODES}")
    with deployment(folder, namespaces=namespaces) as trial:
        add_nodes(trial, load_settings(CONFIG, own))
        began = time.monotonic()
        trial.run(CONFIG, "run", *sets(own))
        real = trial.result("run")
        total = time.monotonic() - began
        trial.fedsplit("simulate", str(CONFIG), "--out", "simulation", "--json", *sets(own))
    simulated = json.loads((folder / "simulation" / "result.json").read_text())
    return {
        "difference": difference(folder / "run", folder / "simulation"),
        "accuracy": [result["test_accuracy"] for result in (simulated, real)],
        "training": [result["seconds"]["training"] for result in (simulated, real)],
        "total": total,
        "exchanges": real["exchanges"],
        "bytes_up": real["bytes_up"],
    }


def sets(overrides: Sequence[str]) -> list[str]:
    """Return overrides as options of a command."""
    return [part for override in overrides for part in ("--set", override)]


def add_nodes(trial: Deployment, settings: Settings) -> list[str]:
    """Make and start four warm nodes with five devices each."""
    names = [f"n{number}" for number in range(NODES)]
    for name, devices in zip(names, np.array_split(np.arange(DEVICES), NODES), strict=True):
        trial.make_node(name, devices.tolist(), settings)
        trial.start_node(name)
    return names


def difference(one: Path, other: Path) -> float:
    """Return the largest difference of any parameter between two run folders."""
    found = 0.0
    for half in ("first_layer", "trunk"):
        a, b = (load_file(folder / "checkpoint" / f"{half}.safetensors") for folder in (one, other))
        found = max(found, *(float(np.abs(a[name] - b[name]).max(initial=0)) for name in a))
    return found


def tables(results: Results) -> str:
    """Return a row for each run."""
    return markdown(COLUMNS, map(_cells, results["rows"]))


def _cells(row: dict[str, Any]) -> list[str]:
    accuracies = [f"{accuracy:.4f}" for accuracy in row["accuracy"]]
    seconds = [f"{seconds:.1f}" for seconds in (*row["training"], row["total"])]
    counts = [f"{row['exchanges']:,}", f"{row['bytes_up']:,}"]
    return [row["run"], f"{row['difference']:.2g}", *accuracies, *seconds, *counts]
