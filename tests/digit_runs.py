"""Runs over digits with public records, whose messages are watched."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import simulated_json, small_settings
from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo

from fedsplit.flower.grid import InProcessGrid
from fedsplit.flower.record import from_record
from fedsplit.model.split import SplitModel
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from fedsplit.runs.client_app import client_app
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.training import TrainingRun
from fedsplit.wire import exchange as wire


def parameters(model: SplitModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for m in (model.first_layer.layer, model.trunk) for p in m.parameters()])


def digits(**changes: dict[str, Any]) -> Settings:
    """Ten nodes of one device: two give their digits, six train, two test."""
    base: dict[str, dict[str, Any]] = {
        "run": {"rounds": 5},
        "data": {"name": "digits", "builder": None, "task": None, "outputs": None},
        "devices": {"count": 10, "test": 2, "partition": "iid"},
        "model": {"name": "mlp", "builder": None, "width": 32},
        "dropping": {"policy": "top-k", "k": 6},
        "protocol": {"mode": "release-once", "dtype": "float16"},
        "public": {"devices": [0, 1], "epochs": 4, "lr": 0.005},
        "trunk": {"optimizer": "adam", "lr": 0.005},
    }
    for section, values in changes.items():
        base.setdefault(section, {}).update(values)
        base[section] = {k: v for k, v in base[section].items() if v is not None or section in ("data", "model")}
    return small_settings(**base)


class Watched(InProcessGrid):
    """Notes what goes to and fro, and hides some partitions' nodes."""

    parameters = 65 * 32

    def __init__(self, *args: Any, hidden: Sequence[int] = ()) -> None:
        super().__init__(*args)
        self.hidden = set(hidden)
        self.sent: list[tuple[str, int, wire.Download]] = []
        self.received: list[tuple[str, int, wire.Upload]] = []

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [info for info in super().get_nodes() if info.node_id - 2 not in self.hidden]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            (identifier,) = super().push_messages([message])
            kind, partition = message.metadata.message_type, message.metadata.dst_node_id - 2
            if kind != "query":
                down, up = (from_record(m.content) for m in (message, self._replies[identifier]))
                self.sent.append((kind, partition, wire.Download.from_bytes(down, parameters=self.parameters)))
                self.received.append((kind, partition, wire.Upload.from_bytes(up, parameters=self.parameters)))
            ids.append(identifier)
        return ids


def watch(
    chosen: Settings, folder: Path, hidden: Sequence[int] = (), after: Callable[[int, Watched], None] | None = None
) -> tuple[TrainingRun, Watched, list[int]]:
    """Train; return the run, its grid and how many messages there had been after each round."""
    RunFolder(folder).open(chosen, resume=False)
    exchanges: list[int] = []

    def report(metrics: dict[str, Any]) -> None:
        exchanges.append(run.strategy.progress.totals.exchanges)
        if after:
            after(metrics["round"], grid)

    run = TrainingRun(chosen, folder, report)
    grid = Watched(
        client_app(simulated_json(chosen), str(folder / "nodes")), Experiment(chosen).nodes, hidden=list(hidden)
    )
    run.train(grid)
    return run, grid, exchanges


def sizes(run: TrainingRun, devices: Iterable[int]) -> dict[int, int]:
    return {d: len(run.source.device(d).train) for d in devices}


def released(grid: Watched, kind: str = "train") -> dict[int, int]:
    """How many records each device released, all exchanges together."""
    found: dict[int, int] = {}
    for k, _, upload in grid.received:
        for device, count in zip(upload.release.devices.tolist(), upload.release.records.tolist(), strict=True):
            if k == kind:
                found[device] = found.get(device, 0) + count
    return found
