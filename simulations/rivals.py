"""What fedsplit is compared with on devices of a virtual clock: Flower's FedAvg, and split learning written naively."""

import os
from collections.abc import Callable, Iterable

import naive
import numpy as np
import torch
from exchanges import Cost, array_bytes, step, whole
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedsplit.common.seeds import scheduled
from fedsplit.data import Source
from fedsplit.flower.grid import InProcessGrid
from fedsplit.model.split import SplitModel
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from fedsplit.release.policies import All
from fedsplit.server.batches import minibatches
from fedsplit.server.virtual.clock import VirtualClock, Work
from fedsplit.server.warmup import WarmUp, warm_up

Note = Callable[[SplitModel], None]


class ClockedGrid(InProcessGrid):
    """Runs a ClientApp on devices of a virtual clock: a reply from one that is away, late or lost does not come.

    Parameters
    ----------
    app : ClientApp
    count : int
        Devices, each a node of its own with its id as partition id.
    devices : iterable of int
        Those that are asked.
    clock : VirtualClock
    cost : Cost
    records : callable
        Returns from a reply how many records it took on the way to the cut, and how many on the way back.
    """

    def __init__(
        self,
        app: ClientApp,
        count: int,
        devices: Iterable[int],
        clock: VirtualClock,
        cost: Cost,
        records: Callable[[Message], tuple[int, int]],
    ) -> None:
        super().__init__(app, count)
        nodes = {int(context.node_config["partition-id"]): node for node, context in self._contexts.items()}
        self._node = {device: nodes[device] for device in devices}
        self._clock = clock
        self._cost = cost
        self._records = records
        self._round = 0

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the devices' nodes."""
        return list(self._node.values())

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Have the devices that are there answer, and return the replies that come in time."""
        asked = {message.metadata.dst_node_id: message for message in messages}
        devices = np.array([d for d, node in self._node.items() if node in asked], dtype=np.int64)
        if not len(devices):
            return []
        if all(message.metadata.message_type != "train.backward" for message in asked.values()):
            self._round += 1  # the backward half is of the same round: whoever was there still is
            self._clock.begin(self._round)
            devices = self._clock.there(devices, least=1)
        sent = [asked[self._node[device]] for device in devices.tolist()]
        replies = list(self.pull_messages(self.push_messages(sent)))
        forward, back = np.array([self._records(reply) for reply in replies]).T
        work = Work(
            devices,
            np.array([array_bytes(message.content) for message in sent]),
            np.array([array_bytes(reply.content) for reply in replies]),
            forward * self._cost.seconds[0] + back * self._cost.seconds[1],
        )
        outcome = self._clock.exchange(work)
        self._clock.note_records(work, outcome, forward, back)
        return [reply for reply, heard in zip(replies, outcome.heard, strict=True) if heard]


def fedavg_app(settings: Settings, source: Source, epochs: int) -> ClientApp:
    """Return the ClientApp of FedAvg: local epochs with Adam, which begins anew in each round."""
    net, app = whole(Experiment(settings).model), ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        device, number = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])
        records = source.device(device).train
        x, y = torch.from_numpy(records.x), torch.from_numpy(records.y)
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        lr = scheduled(settings.trunk.lr, settings.trunk.schedule, number, settings.run.rounds)
        optimizer = torch.optim.Adam(net.parameters(), lr, fused=True)
        rng = np.random.default_rng([settings.run.seed, device, number])
        for _ in range(epochs):
            for rows in minibatches(rng.permutation(len(x)), settings.protocol.batch_size):
                step(net, optimizer, x[rows], y[rows])
        content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": len(x)})}
        return Message(RecordDict(content), reply_to=message)

    return app


def train_fedavg(
    settings: Settings, devices: Iterable[int], clock: VirtualClock, cost: Cost, epochs: int, note: Note
) -> None:
    """Train the whole network with Flower's FedAvg, first on the records of donors if the settings name some.

    ``note`` is called before the first round and after each.
    """
    experiment = Experiment(settings)
    source, model = experiment.source, experiment.model
    if (public := experiment.public) is not None and settings.public is not None:
        options = WarmUp(settings.public.epochs, settings.public.lr, settings.protocol.batch_size, penalty=0.0)
        warm_up(model, public, source.task, All(), options, settings.run.seed)
    net = whole(model)

    def evaluate(number: int, arrays: ArrayRecord) -> None:
        net.load_state_dict(arrays.to_torch_state_dict())
        note(model)

    def records(reply: Message) -> tuple[int, int]:
        return 0, epochs * int(reply.content["metrics"]["num-examples"])

    grid = ClockedGrid(fedavg_app(settings, source, epochs), source.count, devices, clock, cost, records)
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    strategy.start(grid, ArrayRecord(net.state_dict()), num_rounds=settings.run.rounds, evaluate_fn=evaluate)


def train_naively(settings: Settings, devices: Iterable[int], clock: VirtualClock, cost: Cost, note: Note) -> None:
    """Train with a message for every mini-batch and half-step; ``note`` is called after every fifth step."""
    os.environ[naive.SETTINGS] = settings.to_json()

    def records(reply: Message) -> tuple[int, int]:
        return (naive.BATCH, 0) if "cut" in reply.content else (0, naive.BATCH)

    def after(number: int, model: SplitModel) -> None:
        if (number + 1) % 5 == 0:
            note(model)

    grid = ClockedGrid(naive.app, Experiment(settings).source.count, devices, clock, cost, records)
    naive.train(grid, settings, settings.run.rounds - 1, after)
