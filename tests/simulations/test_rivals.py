"""The grid on a virtual clock with which the study of devices runs other ways of training."""

import os

import numpy as np
import pytest
import torch
from conftest import small_settings
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedsplit.plan.experiment import Experiment
from fedsplit.server.virtual.clock import VirtualClock
from fedsplit.server.virtual.presence import ByChance
from fedsplit.server.virtual.profile import Profile
from fedsplit.server.virtual.trace import SECOND
from simulations.devices.exchanges import Cost, array_bytes
from simulations.devices.grid import ClockedGrid
from simulations.devices.rivals import train_naively
from simulations.shared import naive

pytestmark = pytest.mark.slow  # trains whole networks

DEVICES, LIMIT = 4, 5.0
COST, CHEAP = Cost((0.25, 0.5), (1, 2)), Cost((0.0, 0.0), (1, 2))


def clock(uplink: float = 8.0, *, there: float = 1.0, dropout: float = 0.0) -> VirtualClock:
    """Return a clock of devices with one megabyte per second down and up, but for the last one's way up."""
    ones = np.ones(DEVICES)
    links = {"downlink": 8 * ones, "uplink": np.array([8.0] * (DEVICES - 1) + [uplink])}
    drawn = {"compute": ones, "latency": 0 * ones, **links}
    return VirtualClock(Profile(DEVICES, drawn, None, ByChance(there, DEVICES, 0), dropout), LIMIT, seed=0)


def says_its_id() -> ClientApp:
    """Return an app whose devices answer with their id, for as many records."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        device = int(context.node_config["partition-id"])
        arrays = ArrayRecord({"w": Array(np.full(1000, device, dtype=np.float32))})
        metrics = MetricRecord({"num-examples": device + 1})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    for kind in ("forward", "backward"):
        app.train(kind)(answer)
    app.train()(answer)
    return app


def grid(clock: VirtualClock, devices: range = range(DEVICES)) -> ClockedGrid:
    return ClockedGrid(says_its_id(), DEVICES, devices, clock, COST, lambda reply: (1, 2))


def ask(grid: ClockedGrid, kind: str = "train") -> list[int]:
    """Ask all; return who was heard."""
    messages = [Message(RecordDict(), node, kind) for node in grid.get_node_ids()]
    return [int(reply.content["arrays"]["w"].numpy()[0]) for reply in grid.send_and_receive(messages)]


def test_an_exchange_takes_what_its_slowest_device_needs() -> None:
    some = clock()
    assert ask(grid(some)) == [0, 1, 2, 3]
    size = int(some.counts.bytes_up[0])
    assert 4000 < size < 4300 and some.counts.bytes_down.sum() == 0
    assert some.now / SECOND == pytest.approx(0.25 + 2 * 0.5 + size / 1e6)
    assert some.counts.released.tolist() == [1] * 4 and some.counts.answered.tolist() == [2] * 4


def test_who_is_late_is_not_averaged() -> None:
    late = clock(uplink=1e-3)
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    start = ArrayRecord({"w": Array(np.zeros(1000, dtype=np.float32))})
    found = strategy.start(grid(late), start, num_rounds=1).arrays["w"].numpy()
    np.testing.assert_allclose(found, (0 * 1 + 1 * 2 + 2 * 3) / 6, rtol=1e-6)  # weighed by records, without device 3
    assert late.now == LIMIT * SECOND and late.counts.late.tolist() == [0, 0, 0, 1]
    assert late.counts.bytes_down.tolist() == [array_bytes(RecordDict({"arrays": start}))] * 4


def test_the_backward_half_is_of_the_same_round() -> None:
    some = grid(here := clock(there=0.5))
    for _ in range(20):
        there = ask(some, "train.forward")
        node = dict(zip(range(DEVICES), some.get_node_ids(), strict=True))
        messages = [Message(RecordDict(), node[device], "train.backward") for device in there]
        assert len(some.send_and_receive(messages)) == len(there)
    assert 0 < here.counts.away.sum() < 4 * 20


def test_only_those_who_hold_records_are_asked() -> None:
    assert ask(grid(clock(), range(1, 3))) == [1, 2]


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1 - 1e-12])
def test_naive_training_goes_on_without_lost_devices(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, naive.SETTINGS, "")  # is taken back afterwards
    settings = small_settings(run={"rounds": 5}, devices={"count": DEVICES, "test": [3]})
    before = Experiment(settings).model
    seen = []
    train_naively(settings, range(3), here := clock(dropout=dropout), CHEAP, seen.append)
    assert len(seen) == 1 and here.counts.asked[3] == 0
    moved = not torch.equal(seen[0].first_layer.layer.weight, before.first_layer.layer.weight)
    assert moved == (dropout < 0.6)
    assert (here.counts.lost.sum() == 0) == (dropout == 0.0)
