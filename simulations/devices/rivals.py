"""What fedsplit is compared with on devices of a virtual clock: Flower's FedAvg, and split learning written naively."""

import os
from collections.abc import Callable, Iterable
from typing import cast

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedsplit.common.seeds import scheduled
from fedsplit.data import Source
from fedsplit.model.split import SplitModel
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from fedsplit.release.policies import All
from fedsplit.server.batches import minibatches
from fedsplit.server.virtual.clock import VirtualClock
from fedsplit.server.warmup import WarmUp, warm_up
from simulations.devices.exchanges import Cost, step, whole
from simulations.devices.grid import ClockedGrid
from simulations.shared import naive

Note = Callable[[SplitModel], None]


def fedavg_app(settings: Settings, source: Source, epochs: int) -> ClientApp:
    """Return the ClientApp of FedAvg: local epochs with Adam, which begins anew in each round."""
    net, app = whole(Experiment(settings).model), ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        device = cast(int, context.node_config["partition-id"])
        number = cast(int, message.content.config_records["config"]["server-round"])
        records = source.device(device).train
        x, y = torch.from_numpy(records.x), torch.from_numpy(records.y)
        net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        lr = scheduled(settings.trunk.lr, settings.trunk.schedule, number, settings.run.rounds)
        optimizer = torch.optim.Adam(net.parameters(), lr, fused=True)
        rng = np.random.default_rng([settings.run.seed, device, number])
        for _ in range(epochs):
            for rows in minibatches(rng.permutation(len(x)), settings.protocol.batch_size):
                step(net, optimizer, x[rows], y[rows])
        content = RecordDict({"arrays": ArrayRecord(net.state_dict())})
        content["metrics"] = MetricRecord({"num-examples": len(x)})
        return Message(content, reply_to=message)

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
        return 0, epochs * cast(int, reply.content.metric_records["metrics"]["num-examples"])

    grid = ClockedGrid(fedavg_app(settings, source, epochs), source.count, devices, clock, cost, records)
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    strategy.start(grid, ArrayRecord(net.state_dict()), num_rounds=settings.run.rounds, evaluate_fn=evaluate)


def train_naively(settings: Settings, devices: Iterable[int], clock: VirtualClock, cost: Cost, note: Note) -> None:
    """Train with a message for every mini-batch and half-step; ``note`` is called after every fifth step."""
    os.environ[naive.SETTINGS] = settings.to_json()
    naive.forget()

    def records(reply: Message) -> tuple[int, int]:
        return (naive.BATCH, 0) if "cut" in reply.content else (0, naive.BATCH)

    def after(number: int, model: SplitModel) -> None:
        if (number + 1) % 5 == 0:
            note(model)

    grid = ClockedGrid(naive.app, Experiment(settings).source.count, devices, clock, cost, records)
    naive.train(grid, settings, settings.run.rounds - 1, after)
