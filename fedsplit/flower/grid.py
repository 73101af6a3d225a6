"""Grids: short adaptive polling over any of Flower's, and one that runs the ClientApp in this process."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_CLIENT_APP_RAISED = 2  # Flower's error code for an exception in a ClientApp
PULL_AGAIN, PULL_LONGEST = 0.02, 0.5  # seconds between two tries to fetch a part that is on its way
PULL_MOST = 10.0  # seconds to try: they do not come if the other side was killed while it sent
_SOONER, _SHARE = 0.8, 0.15  # of the time it took before; of the time waited so far


class Pauses:
    """How long to wait between two looks for something that comes again and again.

    A look over HTTP costs the other side about as much as a message, and a late one costs everybody time. So the first
    look is a little sooner than it ever came the last three times, and the next ones are ever further apart.

    Parameters
    ----------
    shortest, longest : float
        Seconds between two looks.
    """

    _RECENT = 3

    def __init__(self, shortest: float, longest: float) -> None:
        self._shortest, self._longest = shortest, longest
        self._took: deque[float] = deque([0.0], maxlen=self._RECENT)
        self._began = time.monotonic()
        self._look = 0.0

    def begin(self) -> None:
        """Begin to wait."""
        self._began = time.monotonic()

    def came(self) -> None:
        """Note that the last look has found it; what the look itself took does not count, or each would be later."""
        self._took.append(self._look)

    def next(self) -> float:
        """Return the seconds to wait before the next look."""
        waited = time.monotonic() - self._began
        first = _SOONER * min(self._took)
        pause = first - waited if first > waited else min(max(self._shortest, _SHARE * waited), self._longest)
        self._look = waited + pause
        return pause


def answers(reply: Message, sent: Mapping[str, int]) -> bool:
    """Whether a reply is from the node that was sent its message, or Flower's own word about it.

    Its metadata are the node's: it may name another node, and another message.
    """
    node, asked = reply.metadata.src_node_id, sent.get(reply.metadata.reply_to_message_id)
    return asked is not None and (node == asked or (reply.has_error() and node not in sent.values()))


class PollingGrid(Grid):
    """Another Grid with a ``send_and_receive`` that looks for replies often at first, then less often.

    Flower's own grids sleep 0.1 s (simulation) or 3 s (deployment) between two looks.

    Parameters
    ----------
    grid : Grid
    over : callable, optional
        Is shown the replies that have come, and says whether to wait for no others.
    """

    def __init__(self, grid: Grid, over: Callable[[Sequence[Message]], bool] = lambda _: False) -> None:
        self._grid = grid
        self._over = over
        self._pauses = Pauses(0.002, 0.1)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and return the replies that came within ``timeout`` seconds."""
        asked = list(messages)
        ids = self._grid.push_messages(asked)
        # what could not be sent, to a node that has just left, has no id
        sent = {i: m.metadata.dst_node_id for i, m in zip(ids, asked, strict=False) if i}
        waiting = set(sent)
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        replies: list[Message] = []
        self._pauses.begin()
        while waiting and time.monotonic() < deadline and not self._over(replies):
            time.sleep(self._pauses.next())
            new = [r for r in self._grid.pull_messages(waiting) if answers(r, sent)]
            if new and not replies:
                self._pauses.came()
            replies.extend(new)
            waiting -= {reply.metadata.reply_to_message_id for reply in new}
        return replies

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message. Flower has deprecated this in favour of ``Message``.

        Parameters
        ----------
        content : RecordDict
        message_type : str
        dst_node_id : int
            The node that gets it.
        group_id : str
            In Flower the round.
        ttl : float, optional
            Seconds until the message expires; default: Flower's.
        """
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that are connected."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes that are connected."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages and return their ids."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come."""
        return self._grid.pull_messages(message_ids)


class InProcessGrid(PollingGrid):
    """Runs a ClientApp in this process, for debugging, tests and short trials.

    Parameters
    ----------
    client_app : ClientApp
    num_nodes : int
        Virtual nodes, with the partition ids 0..num_nodes-1.
    """

    def __init__(self, client_app: ClientApp, num_nodes: int) -> None:
        super().__init__(self)
        self._app = client_app
        self._run = Run.create_empty(run_id=1)
        # Outside a Flower process nobody has said who we are, and a Message cannot be built without it.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self._contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={"partition-id": node - 2, "num-partitions": num_nodes},
                state=RecordDict(),
                run_config={},
            )
            for node in range(2, num_nodes + 2)
        }
        self._replies: dict[str, Message] = {}

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the virtual nodes."""
        return list(self._contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the virtual nodes."""
        return [NodeInfo(node_id=node) for node in self._contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Handle messages at once; the replies wait to be pulled."""
        ids = []
        for message in messages:
            identifier = str(uuid4())
            message.metadata.__dict__["_message_id"] = identifier
            self._replies[identifier] = self._handle(message)
            ids.append(identifier)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to some messages, each once."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def _handle(self, message: Message) -> Message:
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # as Flower does: the exception's text becomes the reply's reason
            return Message(Error(_CLIENT_APP_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)
