"""The grid of real deployments: nobody waits for a reply that is still on its way."""

import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from fedsplit.flower.record import from_record, to_record
from fedsplit.server.link.replies import DeploymentGrid

RUN = 1


class SuperLink:
    """What the grid calls, as Flower's SuperLink answers it: each reply is announced once, with parts to follow."""

    def __init__(self) -> None:
        self.parts: dict[str, bytes | None] = {}
        self.announced: list[tuple[Any, Any]] = []
        self.nodes = {2, 3}
        self.forgotten: list[str] = []
        self.asked: list[list[str]] = []
        self.node, self.run, self._runtime_client = Node(node_id=1), SimpleNamespace(run_id=RUN), self

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes

    def send(self, node: int, payload: bytes, ttl: float = 600.0) -> tuple[str, dict[str, bytes]]:
        """Announce a node's reply; return the id of what it answers, and its parts."""
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, 1
        question = Message(RecordDict(), node, "train", ttl=ttl)
        question.metadata.__dict__["_message_id"] = f"question {node}"
        TaskIdentity.node_id = node
        reply = Message(to_record(payload), reply_to=question)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        tree = get_object_tree(reply)
        parts = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
        self.parts |= dict.fromkeys(parts)
        self.announced.append((message_to_proto(remove_content_from_message(reply)), tree))
        return f"question {node}", parts

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        self.asked.append(sorted(request.message_ids))
        told = [a for a in self.announced if a[0].metadata.reply_to_message_id in request.message_ids]
        self.announced = [a for a in self.announced if a not in told]
        return PullAppMessagesResponse(
            messages_list=[message for message, _ in told], message_object_trees=[tree for _, tree in told]
        )

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        found = request.object_id in self.parts
        part = self.parts.get(request.object_id)
        return PullObjectResponse(object_found=found, object_available=part is not None, object_content=part or b"")

    def ConfirmMessageReceived(self, request: ConfirmMessageReceivedRequest) -> None:
        self.forgotten.append(request.message_object_id)


@pytest.fixture
def link() -> SuperLink:
    return SuperLink()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only the test moves."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


def test_a_reply_on_its_way_holds_up_nobody(link: SuperLink, now: list[float]) -> None:
    grid = DeploymentGrid(cast(HttpGrid, link))
    (slow, late), (fast, parts) = link.send(2, b"slow"), link.send(3, b"fast")
    link.parts |= parts
    (first,) = grid.pull_messages([slow, fast])
    assert from_record(first.content) == b"fast" and first.metadata.src_node_id == 3
    for name, part in late.items():  # each of the parts may be the last
        now[0] += 1
        assert not list(grid.pull_messages([slow]))
        link.parts[name] = part
    now[0] += 1
    (second,) = grid.pull_messages([slow])
    assert from_record(second.content) == b"slow" and second.metadata.reply_to_message_id == slow
    assert len(link.forgotten) == 2 and link.asked == [[slow, fast]]  # what was announced is not asked again


def test_other_questions_leave_what_is_coming_alone(link: SuperLink, now: list[float]) -> None:
    grid = DeploymentGrid(cast(HttpGrid, link))
    slow, parts = link.send(2, b"slow")
    assert not list(grid.pull_messages([slow]))
    link.parts |= parts
    now[0] += 1
    assert not list(grid.pull_messages(["question 3"]))
    assert len(list(grid.pull_messages([slow]))) == 1


@pytest.mark.parametrize("why", ["gone", "expired", "forgotten", "no message"])
def test_what_will_never_be_whole_is_an_error(why: str, link: SuperLink, now: list[float]) -> None:
    grid = DeploymentGrid(cast(HttpGrid, link))
    asked, parts = link.send(2, b"x", ttl=60.0)
    assert not list(grid.pull_messages([asked]))
    now[0] += 10
    assert not list(grid.pull_messages([asked]))  # it has time until then
    if why == "gone":
        link.nodes = {3}
        now[0] += 10
    elif why == "expired":
        now[0] += 60
    elif why == "forgotten":
        link.parts = {}
        now[0] += 1
    else:
        link.parts |= {name: b"ConfigRecord  0\x00" for name in parts}
        now[0] += 1
    (reply,) = grid.pull_messages([asked])
    assert reply.has_error() and reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE
    assert reply.metadata.reply_to_message_id == asked and len(link.forgotten) == 1
    assert not list(grid.pull_messages([]))


def test_what_nobody_asks_for_any_more_is_forgotten_in_the_end(link: SuperLink, now: list[float]) -> None:
    grid = DeploymentGrid(cast(HttpGrid, link))
    asked, _ = link.send(2, b"x", ttl=60.0)
    for seconds, forgotten in ((0, 0), (50, 0), (20, 1)):
        now[0] += seconds
        assert not list(grid.pull_messages([asked] if not seconds else []))
        assert len(link.forgotten) == forgotten
