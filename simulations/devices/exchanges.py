"""What an exchange takes in each way of training: bytes, multiply-adds, seconds, and the deadline that follows."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, RecordDict
from numpy.typing import NDArray
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedsplit.data import Source
from fedsplit.model.split import SplitModel
from fedsplit.model.tasks import task_of
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from fedsplit.server.virtual.calibration import record_seconds
from fedsplit.server.virtual.clock import VirtualClock, Work
from fedsplit.server.virtual.profile import Profile
from fedsplit.server.virtual.trace import SECOND
from fedsplit.wire.sizes import Sizes
from simulations.devices.rows import Row
from simulations.shared import naive

SHARE, POPULATION = 0.95, 2000  # of exchanges that make the deadline, among so many devices


@dataclass(frozen=True)
class Cost:
    """What a record costs a device on the way to the cut and on the way back (FedAvg: all of it on the way back).

    ``seconds`` of one core of this machine, and multiply-adds.
    """

    seconds: tuple[float, float]
    multiply_adds: tuple[int, int]


def array_bytes(content: RecordDict) -> int:
    """Return the bytes of a message's arrays, as Flower serialises them."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def whole(model: SplitModel) -> nn.Sequential:
    """Return the network in one piece, which shares the model's parameters."""
    return nn.Sequential(model.first_layer.layer, model.first_layer.activation, model.trunk)


def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    """Take a step on a mini-batch."""
    optimizer.zero_grad()
    loss = task_of("classification").loss(net(x), y) / len(y)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def measured(row: Row, settings: Settings) -> Cost:
    """Measure what a record costs on one core."""
    experiment = Experiment(settings)
    if row.kind == "FedAvg":
        return _of_whole(experiment.model, settings.protocol.batch_size)
    first = experiment.model.first_layer
    x = torch.randn(naive.BATCH, *first.input_shape)

    def forward() -> torch.Tensor:
        found: torch.Tensor = first.activation(first.outputs(x))
        return found

    def both() -> None:
        forward().sum().backward()  # type: ignore[no-untyped-call]

    there, all_of_it = (_multiply_adds(work) // naive.BATCH for work in (forward, both))
    if row.kind == "fedsplit":
        seconds = record_seconds(first, experiment.policy, settings.protocol.dtype)
        return Cost(seconds, (there, all_of_it - there))
    # naive split learning computes the outputs once more on the way back
    return Cost((_seconds(forward) / naive.BATCH, _seconds(both) / naive.BATCH), (there, all_of_it))


def _of_whole(model: SplitModel, batch: int) -> Cost:
    """Measure a step of the whole network."""
    net = whole(model)
    x, y = torch.randn(batch, *model.first_layer.input_shape), torch.zeros(batch, dtype=torch.int64)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def train() -> None:
        step(net, optimizer, x, y)

    return Cost((0.0, _seconds(train) / batch), (0, _multiply_adds(train) // batch))


def _seconds(work: Callable[[], Any]) -> float:
    found = []
    for _ in range(31):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return median(found)


def _multiply_adds(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops()) // 2


def holders(settings: Settings, source: Source) -> dict[int, int]:
    """Return by device that trains: its number of records."""
    sizes = {d: len(source.device(d).train) for d in range(source.count) if d not in settings.donors}
    return {device: records for device, records in sizes.items() if records}


def deadline(row: Row, settings: Settings, cost: Cost) -> float:
    """Return the seconds in which 95 % of exchanges would be over, if many devices of the profile had these records."""
    source, profile = Experiment(settings).source, settings.devices.profile
    assert profile is not None
    clock = VirtualClock(Profile.of(profile, POPULATION, seed=0), limit=1.0, seed=0)
    records = np.resize(list(holders(settings, source).values()), POPULATION)
    exchanges = _exchanges(row, settings, cost, Experiment(settings).model, records)
    needs = [clock.duration(Work(np.arange(POPULATION), *exchange)) for exchange in exchanges]
    return float(f"{max(np.quantile(need, SHARE) for need in needs) / SECOND:.3g}")


def _exchanges(row: Row, settings: Settings, cost: Cost, model: SplitModel, records: NDArray[Any]) -> list[Any]:
    """Return bytes down, bytes up and seconds of the devices in a typical exchange; in each half-step."""
    first, one = model.first_layer, np.ones(len(records), dtype=np.int64)
    there, back = cost.seconds
    if row.kind == "naive":
        batch, weights = naive.BATCH, 4 * first.size * one
        dense = 4 * first.width * batch * one
        return [(weights, dense + 8 * batch, batch * there * one), (weights + dense, weights, batch * back * one)]
    if row.kind == "FedAvg":
        size = array_bytes(RecordDict({"arrays": ArrayRecord(whole(model).state_dict())})) * one
        return [(size, size, row.epochs * records * back)]
    if settings.protocol.mode == "single-pass":
        records = -(-records // settings.run.rounds)
    learns = one * (settings.protocol.mode != "release-once")
    values = records * (settings.dropping.k or first.width // 2)  # relu lets about half of the outputs through
    sizes = Sizes(first.size, first.width, value=2, bits=0, columns=None)
    down, up = sizes.download(one, learns, learns * values), sizes.upload(records, values, 0 * one, 0 * one, learns)
    return [(down, up, records * (there + learns * back))]
