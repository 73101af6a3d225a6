"""Runs over nodes whose replies a test changes or swallows, and the replies of nodes that lie."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from conftest import simulated_json, small_settings
from flwr.app import Message

from fedsplit.flower.grid import InProcessGrid
from fedsplit.flower.record import from_record, to_record
from fedsplit.release.admitted import unguarded
from fedsplit.release.kept import Kept
from fedsplit.runs.client_app import client_app
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.training import TrainingRun
from fedsplit.wire import exchange as wire

Change = Callable[[int, Message, Message], Message | None]


class FaultyGrid(InProcessGrid):
    """Changes or swallows replies: ``change(round of the message, message, reply)``."""

    change: Change

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            sent = from_record(message.content)
            (identifier,) = super().push_messages([message])
            number = 0
            if message.metadata.message_type != "query":
                number = int(np.frombuffer(sent[sent.index(self.marker) :], dtype="<i8", count=2)[1])
            reply = self.change(number, message, self._replies.pop(identifier))
            if reply is not None:
                self._replies[identifier] = reply
            ids.append(identifier)
        return ids


def train(tmp_path: Path, change: Change, nodes: int = 5, **changes: dict[str, Any]) -> TrainingRun:
    protocol = {"timeout": 0.2, **changes.pop("protocol", {})}
    settings = small_settings(protocol=protocol, **changes)
    folder = tmp_path / "run"
    RunFolder(folder).open(settings, resume=False)
    run = TrainingRun(settings, folder)
    grid = FaultyGrid(client_app(simulated_json(settings), str(folder / "nodes")), nodes)
    grid.change = change
    grid.marker = run.strategy.progress.run.to_bytes(8, "little")
    run.train(grid)
    return run


def kept(number: int, message: Message, reply: Message) -> Message:
    return reply


def node_of(message: Message) -> int:
    return message.metadata.dst_node_id - 2


def in_round_2_of_node_1(change: Callable[[Message], Message]) -> Change:
    def changes(number: int, message: Message, reply: Message) -> Message:
        return change(reply) if number == 2 and node_of(message) == 1 else reply

    return changes


def upload_of(reply: Message) -> wire.Upload:
    return wire.Upload.from_bytes(from_record(reply.content), parameters=130)


def release_of(reply: Message) -> wire.Release:
    return upload_of(reply).release


def replaced(reply: Message, payload: bytes) -> Message:
    """Return the reply with another payload."""
    reply.content = to_record(payload)
    return reply


def changed(reply: Message, **fields: Any) -> Message:
    """Return the reply with some of its upload's fields changed."""
    return replaced(reply, wire.Upload(**{**vars(upload_of(reply)), **fields}).to_bytes())


def garbage(reply: Message, size: int = 7) -> Message:
    return replaced(reply, (b"garbage" * size)[:size])


def kept_of(release: wire.Release) -> Kept:
    return Kept(release.counts, release.bitmap, release.values(), release.width)


def fewer_records(reply: Message, refused: list[list[int]]) -> Message:
    """Return the reply with the last of its device's ten records left out of the release."""
    release = release_of(reply)
    kept = kept_of(release).take(np.arange(10) < 9)
    shorter = wire.Release.pack(unguarded(kept, "test"), release.devices, np.array([9]), release.targets[:9], "float32")
    return changed(reply, release=shorter, refused=np.array(refused, dtype=np.int64).reshape(-1, 3))
