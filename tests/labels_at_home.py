"""Runs with labels at home, whose payloads a test keeps and changes, and searches for labels."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from conftest import simulated_json, small_settings
from flwr.app import Message

from fedsplit.flower.grid import InProcessGrid
from fedsplit.flower.record import from_record, to_record
from fedsplit.model.head import Head
from fedsplit.model.tasks import task_of
from fedsplit.plan.settings import Settings
from fedsplit.runs.client_app import client_app
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.training import TrainingRun
from fedsplit.wire.container import Reader

DEVICES = 5
HEAD = Head(8, 3, bias=True, task=task_of("classification"))  # of own:linear_model
AT_HOME = {"mode": "synchronous", "labels": "at-home", "batch-size": 1000}


def at_home(**changes: dict[str, Any]) -> Settings:
    """Return a small run with labels at home, of chunks that leave no device a single record."""
    protocol = {**AT_HOME, "chunk": 7, **changes.pop("protocol", {})}
    return small_settings(protocol=protocol, **changes)


class Wire(InProcessGrid):
    """Keeps all payloads, and may change or swallow replies."""

    def __init__(self, settings: Settings, states: Path, nodes: int) -> None:
        super().__init__(client_app(simulated_json(settings), str(states)), nodes)
        self.sent: list[tuple[int, bytes]] = []
        self.came: list[tuple[int, bytes]] = []
        self.change: Callable[[int, bytes, bytes], bytes | None] = lambda node, sent, came: came

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            node, sent = message.metadata.dst_node_id - 2, from_record(message.content)
            (identifier,) = super().push_messages([message])
            ids.append(identifier)
            reply = self._replies[identifier]
            if reply.has_error():
                continue
            came = from_record(reply.content)
            if message.metadata.message_type != "query":
                changed = self.change(node, sent, came)
                if changed is None:
                    del self._replies[identifier]
                    continue
                reply.content = to_record(changed)
            self.sent.append((node, sent))
            self.came.append((node, came))
        return ids


def run(
    settings: Settings, folder: Path, prepare: Callable[[Wire], None] = lambda wire: None
) -> tuple[TrainingRun, Wire]:
    RunFolder(folder).open(settings, resume=False)
    training = TrainingRun(settings, folder)
    wire = Wire(settings, folder / "nodes", -(-DEVICES // settings.devices.per_node))
    prepare(wire)
    training.train(wire)
    return training, wire


def forms(rows: np.ndarray) -> list[bytes]:
    """Numbers in every way that a message writes them."""
    found = [rows.astype(dtype).tobytes() for dtype in ("u1", "<u2", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8")]
    return found if rows.dtype.kind == "i" else found[5:]


def bodies(messages: Iterable[tuple[int, bytes]]) -> list[bytes]:
    """Return what stands behind the payloads' tables of arrays, where small numbers are many."""
    return [payload[Reader(payload, payload[3]).offset :] for _, payload in messages if payload]


def labels_in(payloads: list[bytes], y: np.ndarray) -> bool:
    """Whether labels, in their order, stand anywhere: as numbers of any type, counted from 0 or 1, or one-hot."""
    found = [*forms(y), *forms(y + 1), *forms(np.eye(3, dtype=np.int64)[y])]
    return any(form in payload for form in found for payload in payloads)
