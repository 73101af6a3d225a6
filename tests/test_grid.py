"""Grids: who is looked for how often, and who is kept awake."""

from collections.abc import Callable, Iterable
from itertools import count
from types import SimpleNamespace

import pytest
from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedsplit import grid as module
from fedsplit.grid import KEEP_AWAKE, PollingGrid
from fedsplit.record import LONGEST_PAUSE, dozes, from_pause, from_record, to_pause, to_record

DOZING, WAKEFUL = 7, 8


class Nodes(Grid):
    """Two nodes that answer at once."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.replies: dict[str, Message] = {}
        self._count = count()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(f"message {next(self._count)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.sent.append(message)
            self.replies[ids[-1]] = Message(to_record(b"yes"), reply_to=message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(i) for i in list(message_ids) if i in self.replies]

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=DOZING), NodeInfo(node_id=WAKEFUL)]

    def get_node_ids(self) -> Iterable[int]:
        return [DOZING, WAKEFUL]

    def set_run(self, run: Run) -> None:
        raise AssertionError

    @property
    def run(self) -> Run:
        raise AssertionError

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise AssertionError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise AssertionError


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function by which seconds pass; a grid's own waits take none."""
    now = [100.0]

    def some(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: None))
    for name in ("_task_id", "_run_id", "_node_id"):  # a Message cannot be built by nobody
        monkeypatch.setattr(TaskIdentity, name, 1)
    return some


def ask(grid: PollingGrid) -> None:
    messages = [Message(to_record(b"?"), node, "train", ttl=40.0) for node in (DOZING, WAKEFUL)]
    assert len(grid.send_and_receive(messages, timeout=40.0)) == 2


def test_a_node_that_dozes_is_kept_awake(pass_time: Callable[[float], None]) -> None:
    """Behind each message it has a second one, for as long as the server took the last time."""
    nodes = Nodes()
    dozing: set[int] = set()
    grid = PollingGrid(nodes, dozing)
    ask(grid)
    assert [m.metadata.message_type for m in nodes.sent] == ["train"] * 2
    dozing.add(DOZING)
    for busy, pause in ((4.0, 3.5), (0.2, 0.0), (1000.0, 10.0)):  # at most a quarter of the timeout
        pass_time(busy)
        nodes.sent.clear()
        ask(grid)
        assert [m.metadata.message_type for m in nodes.sent] == ["train", "train", KEEP_AWAKE]
        assert nodes.sent[-1].metadata.dst_node_id == DOZING
        assert from_pause(nodes.sent[-1].content) == pytest.approx(pause)
    assert len(nodes.replies) == 1  # of the last one: those before were fetched, and thrown away


def test_who_was_not_asked_the_last_time_is_not_held_up(pass_time: Callable[[float], None]) -> None:
    nodes = Nodes()
    grid = PollingGrid(nodes, {DOZING})
    ask(grid)
    grid.send_and_receive([Message(to_record(b"?"), WAKEFUL, "train", ttl=40.0)], timeout=40.0)
    pass_time(30.0)
    ask(grid)
    assert nodes.sent[-1].metadata.message_type == KEEP_AWAKE and from_pause(nodes.sent[-1].content) == 0.0


def test_payloads_say_whether_a_node_dozes() -> None:
    for payload in (b"", b"some"):
        assert dozes(to_record(payload, dozes=True)) and not dozes(to_record(payload))
        assert from_record(to_record(payload, dozes=True)) == payload
    assert not dozes(RecordDict()) and not dozes(to_pause(1.0))


@pytest.mark.parametrize(
    ("asked", "stays"),
    [(1.5, 1.5), (1e9, LONGEST_PAUSE), (float("inf"), LONGEST_PAUSE), (-1.0, 0.0), (float("nan"), 0.0)],
)
def test_nobody_stays_awake_for_long(asked: float, stays: float) -> None:
    assert from_pause(to_pause(asked)) == stays
    assert from_pause(to_record(b"")) == from_pause(RecordDict()) == 0.0
