"""All strategies under all attacks."""

import gc
import tempfile
from dataclasses import dataclass
from itertools import product
from typing import Any, cast
from unittest.mock import patch

import numpy as np
from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp

from fedsplit.common.errors import RunError
from fedsplit.common.seeds import seed_of
from fedsplit.flower.grid import InProcessGrid
from fedsplit.plan.experiment import Experiment
from fedsplit.runs.assembly import split_strategy
from fedsplit.runs.client_app import client_app
from simulations.shared.options import option
from simulations.shared.results import Results
from simulations.shared.workers import side_by_side
from simulations.strategies.hostile import HostileApp, TrimmedTrunk
from simulations.strategies.rows import ATTACKS, CLASSES, DEVICES, HOSTILE, MODES, PARTITIONS, ROWS, settings_for, told


@dataclass(frozen=True)
class Options:
    """What is trained, and how often."""

    seeds: int = option(3, quick=1)
    rounds: int = option(20, quick=2)
    modes: tuple[str, ...] = option(tuple(MODES), quick=("pipelined",), choices=tuple(MODES))
    partitions: tuple[str, ...] = option(tuple(PARTITIONS), quick=("iid",), choices=tuple(PARTITIONS))
    rows: tuple[str, ...] = option(
        tuple(ROWS), quick=("FedAvg", "FedMedian", "FedAdam, trimmed trunk"), choices=tuple(ROWS)
    )
    processes: int = option(0, help="0: as many as there are cores")


def study(options: Options) -> Results:
    """Return accuracies by mode and partition, row and attack, in the order of seeds."""
    cells = product(range(options.seeds), options.modes, options.partitions, options.rows, ATTACKS)
    jobs = [(*cell, options.rounds) for cell in cells if told(cell[3], cell[4])]
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    found = side_by_side(accuracy, jobs, "training", options.processes)
    for (_, mode, partition, row, attack, _), one in zip(jobs, found, strict=True):
        table.setdefault(f"{mode}, {partition}", {}).setdefault(row, {}).setdefault(attack, []).append(one)
    return {"accuracies": table}


def accuracy(seed: int, mode: str, partition: str, row: str, attack: str, rounds: int) -> float:
    """Train once; return the accuracy on the devices that test, who are honest."""
    experiment = Experiment(settings_for(seed, mode, partition, row, rounds))
    strategy = split_strategy(experiment, run=1, kind=TrimmedTrunk if ROWS[row][1] else None)
    with tempfile.TemporaryDirectory() as folder:
        app = client_app(experiment.settings.to_json(), f"{folder}/nodes")
        lying = HostileApp(app, attack, hostile(seed, attack), experiment.model.first_layer.size, seed)
        grid = InProcessGrid(cast(ClientApp, lying), experiment.source.count)
        try:
            with patch.object(gc, "collect"):  # which Flower's Bulyan does for every contribution
                strategy.start(grid, ArrayRecord(), num_rounds=rounds, timeout=60)
        except RunError:  # something is not finite
            return 1 / CLASSES
    evaluation: dict[str, Any] = strategy.progress.evaluation
    return float(evaluation["test_accuracy"])


def hostile(seed: int, attack: str) -> set[int]:
    """Return the devices that lie."""
    drawn = np.random.default_rng(seed_of(seed, "hostile devices")).permutation(DEVICES)[:HOSTILE]
    return set(drawn.tolist()) if attack != "none" else set()
