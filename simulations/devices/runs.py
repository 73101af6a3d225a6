"""One way of training, once: accuracy over simulated time, and what a device spends."""

import csv
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from fedsplit import simulate
from fedsplit.model.split import SplitModel
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from fedsplit.server.trunk import trunk_outputs
from fedsplit.server.virtual.clock import VirtualClock
from fedsplit.server.virtual.profile import Profile
from fedsplit.server.virtual.trace import SECOND
from fedsplit.server.warmup import public_release
from simulations.devices.exchanges import Cost, deadline, holders
from simulations.devices.rivals import train_fedavg, train_naively
from simulations.devices.rows import Row
from simulations.shared.settings import changed, tested

Point = tuple[float, float]  # simulated seconds, accuracy
Counts = dict[str, NDArray[Any]]


def run(row: Row, settings: Settings, cost: Cost) -> dict[str, Any]:
    """Run one row with one seed; for a process of its own."""
    began, limit = time.process_time(), deadline(row, settings, cost)
    if row.kind == "fedsplit":
        found = _run_fedsplit(changed(settings, {"protocol": {"deadline": limit}}), cost)
    else:
        found = _run_rival(row, settings, cost, limit)
    return {**found, "deadline": limit, "cpu_seconds": time.process_time() - began}


def _run_rival(row: Row, settings: Settings, cost: Cost, limit: float) -> dict[str, Any]:
    test, profile, points = Tested(settings), settings.devices.profile, []
    assert profile is not None
    source = test.experiment.source
    clock = VirtualClock(Profile.of(profile, source.count, settings.run.seed), limit, settings.run.seed)

    def note(model: SplitModel) -> None:
        points.append((clock.now / SECOND, test.accuracy(model)))

    if row.kind == "naive":
        train_naively(settings, holders(settings, source), clock, cost, note)
    else:
        train_fedavg(settings, holders(settings, source), clock, cost, row.epochs, note)
    return figures(points, vars(clock.counts), cost)


def _run_fedsplit(settings: Settings, cost: Cost) -> dict[str, Any]:
    """Simulate, and test what each round's checkpoint holds."""
    test, points = Tested(settings), []
    model = test.experiment.model
    with tempfile.TemporaryDirectory() as folder:

        def note(metrics: dict[str, Any]) -> None:
            model.first_layer.layer.load_state_dict(load_file(f"{folder}/checkpoint/first_layer.safetensors"))
            model.trunk.load_state_dict(load_file(f"{folder}/checkpoint/trunk.safetensors"))
            points.append((metrics["simulated_seconds"], test.accuracy(model)))

        result = simulate(settings, out=folder, report=note)
        counts = _counts(Path(folder, "devices.csv"))
    if (alone := result.get("public_only_accuracy")) is not None:
        points.insert(0, (0.0, alone))
    return {**figures(points, counts, cost), "exposures": result["exposures_max"]}


def _counts(path: Path) -> Counts:
    with path.open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return {name: np.array([float(line[name]) for line in lines]) for name in lines[0]}


class Tested:
    """Tests a model on all test records, whose outputs are dropped as in training."""

    def __init__(self, settings: Settings) -> None:
        self.experiment = Experiment(settings)
        self._records = tested(self.experiment.source)

    def accuracy(self, model: SplitModel) -> float:
        """Return the accuracy of a model, which may be trained further."""
        dtype = self.experiment.settings.protocol.dtype
        released = public_release(model, self._records, self.experiment.policy, dtype, seed=0)
        outputs = trunk_outputs(model.trunk.eval(), model.first_layer.cut_shape, released)
        model.trunk.train()
        return float(self.experiment.source.task.score(outputs, self._records.y)["test_accuracy"])


def figures(points: list[Point], counts: Counts, cost: Cost) -> dict[str, Any]:
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
