"""Flower's grid for deployments, with replies that are fetched as their parts arrive.

Flower announces a reply before its parts are there, and its own grid then waits for them, for one reply after another:
behind a slow link nobody else would be heard meanwhile, and no deadline kept. This speaks Flower's internal runtime
API, as that grid does.
"""

import time
from collections.abc import Iterable
from typing import Any

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.message_pb2 import Message as Announced
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.superlink.grid.http_grid import HttpGrid

from fedsplit.flower.grid import PULL_AGAIN, PULL_LONGEST, Pauses, PollingGrid

_PRESENCE = 5.0  # seconds between two questions whether those who are sending are still there


class _Reply:
    """A reply that has been announced, and what has arrived of it."""

    def __init__(self, announced: Announced, tree: ObjectTree) -> None:
        self.id = announced.metadata.message_id
        self.asked = announced.metadata.reply_to_message_id
        self.node = announced.metadata.src_node_id
        self.expires = time.monotonic() + announced.metadata.ttl
        self.missing = [part.object_id for part in iterate_object_tree(tree)]
        self.found: dict[str, bytes] = {}
        self.again = 0.0
        self._pauses = Pauses(PULL_AGAIN, PULL_LONGEST)

    def put_off(self) -> None:
        """Try again after a pause, which grows."""
        self.again = time.monotonic() + self._pauses.next()

    def whole(self) -> Message | None:
        """Return the message, all of whose parts are there; None if they are none."""
        try:
            message = inflate_object_from_contents(self.id, self.found)
        except Exception:  # what a hostile node sends may break anything
            return None
        if not isinstance(message, Message) or not (message.has_error() or isinstance(message.content, RecordDict)):
            return None
        message.metadata.__dict__["_message_id"] = self.id
        return message


class DeploymentGrid(PollingGrid):
    """Flower's grid for deployments, whose ``pull_messages`` returns the replies that are whole and waits for none.

    Parameters
    ----------
    grid : HttpGrid
    """

    def __init__(self, grid: HttpGrid) -> None:
        super().__init__(grid)
        self._http = grid
        self._coming: list[_Reply] = []
        self._there: tuple[float, set[int]] = (0.0, set())

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to some messages that are whole by now, or an error for one that will never be."""
        asked, messages = set(message_ids), []
        self._hear(asked - {reply.asked for reply in self._coming})
        for reply in [r for r in self._coming if r.asked in asked or r.expires < time.monotonic()]:
            if (message := self._fetch(reply)) is not None:
                self._forget(reply)
                messages += [message] if reply.asked in asked else []
        return messages

    @property
    def _client(self) -> Any:
        return self._http._runtime_client  # noqa: SLF001  Flower has no public way to what a reply is made of

    def _hear(self, asked: set[str]) -> None:
        """Ask which replies have been announced; Flower tells it once."""
        if asked:
            told = self._client.PullMessages(PullAppMessagesRequest(message_ids=sorted(asked)))
            self._coming += map(_Reply, told.messages_list, told.message_object_trees)

    def _fetch(self, reply: _Reply) -> Message | None:
        """Fetch what has arrived of a reply; return it, or an error, or None if there is more to come."""
        if time.monotonic() < reply.again:
            return None
        client, run = self._client, self.run.run_id
        pull = make_pull_object_fn_protobuf(client.PullObject, self._http.node, run)
        try:
            while reply.missing:
                reply.found[reply.missing[0]] = pull(reply.missing[0])
                del reply.missing[0]
        except ObjectUnavailableError:
            if reply.expires < time.monotonic() or not self._is_there(reply.node):
                return self._never(reply, "it was not sent to its end")
            reply.put_off()
            return None
        except ObjectPullError as error:
            return self._never(reply, str(error))
        return reply.whole() or self._never(reply, "it is not a message")

    def _is_there(self, node: int) -> bool:
        when, nodes = self._there
        if time.monotonic() - when > _PRESENCE:
            nodes = set(self.get_node_ids())
            self._there = time.monotonic(), nodes
        return node in nodes

    def _never(self, reply: _Reply, why: str) -> Message:
        """Return Flower's word that a reply cannot be had."""
        me = self._http.node.node_id
        about = Metadata(self.run.run_id, "", me, me, reply.asked, "", time.time(), 0.0, SYSTEM_MESSAGE_TYPE)
        return make_message(about, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, f"the reply is unavailable: {why}"))

    def _forget(self, reply: _Reply) -> None:
        """Have the server forget a reply, too."""
        self._coming.remove(reply)
        request = ConfirmMessageReceivedRequest(
            node=self._http.node, run_id=self.run.run_id, message_object_id=reply.id
        )
        self._client.ConfirmMessageReceived(request)
