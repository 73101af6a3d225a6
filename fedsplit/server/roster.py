"""The server's view of the nodes: who is there, whose devices they have, what each has sent, and who is kept out."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, MessageType
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from fedsplit.common.certs import fingerprint, read_public_key
from fedsplit.common.errors import ConfigError, RunError, WireError
from fedsplit.flower.grid import answers
from fedsplit.flower.record import from_record, to_record
from fedsplit.wire.exchange import Registration

log = logging.getLogger(__name__)
Owners = Callable[[], Mapping[str, Sequence[int]]]


@dataclass
class Account:
    """What the server has seen of a node since it started.

    ``refused`` counts records that the node's guard refused, ``offences`` replies that no honest node would send;
    ``missed`` messages had no answer, or an error for one. Times are seconds since 1970.
    """

    devices: list[int] = field(default_factory=list)
    last_seen: float = 0.0
    exchanges: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    refused: int = 0
    missed: int = 0
    offences: int = 0
    quarantined: bool = False


class Roster:
    """The nodes of a run.

    Parameters
    ----------
    devices : int
        How many there are: ids are below.
    max_offences : int
        After how many a node is quarantined: nothing is asked of it any more, and its replies are not read.
    owners : callable, optional
        Returns the devices of each public key, by its fingerprint: a node may register no others. Asked anew as nodes
        come. Without it the first node that names a device has it.
    """

    def __init__(self, devices: int, max_offences: int, owners: Owners | None = None) -> None:
        self.nodes: dict[int, Registration] = {}
        self.accounts: dict[int, Account] = {}
        self.refusals: dict[int, str] = {}
        self.present: set[int] = set()
        self._devices = devices
        self._max_offences = max_offences
        self._owners = owners
        self._keys: dict[int, bytes] = {}
        self._earlier: dict[str, int] = {}  # offences in the part of a run before it was resumed
        self._taken: set[int] = set()
        self._asked: dict[str, tuple[int, float]] = {}  # by message: the node, and until when to wait for it

    def look(self, grid: Grid, timeout: float) -> tuple[int, int]:
        """List the nodes anew, ask those that came for their devices, and hear what they answer.

        Nobody waits: who has not answered yet is heard at a later look.

        Returns
        -------
        tuple of int
            How many nodes were asked, and the bytes that were heard.
        """
        listed: dict[int, NodeInfo] = {info.node_id: info for info in grid.get_nodes()}
        self._keys |= {node: info.public_key for node, info in listed.items()}
        before, self.present = self.present, {n for n in listed if not self.account(n).quarantined}
        if self.present != before:
            self.refusals = {}  # the one that had a refused node's devices may have gone
        self.nodes = {node: r for node, r in self.nodes.items() if node in self.present}
        self._taken = {d for r in self.nodes.values() for d in r.devices.tolist()}
        now = time.monotonic()
        self._asked = {message: (n, until) for message, (n, until) in self._asked.items() if until > now}
        waited_for = {node for node, _ in self._asked.values()}
        new = sorted(self.present - set(self.nodes) - set(self.refusals) - waited_for)
        messages = [Message(to_record(b""), node, MessageType.QUERY, ttl=timeout) for node in new]
        if messages:
            ids = grid.push_messages(messages)
            # a message that could not be sent has no id, and its node is asked again
            self._asked.update((m, (node, now + timeout)) for m, node in zip(ids, new, strict=False) if m)
        replies = grid.pull_messages(list(self._asked)) if self._asked else []
        sent = {message: node for message, (node, _) in self._asked.items()}
        replies = [reply for reply in replies if answers(reply, sent)]
        return len(messages), sum(self._hear(reply) for reply in replies)

    @property
    def waiting(self) -> bool:
        """Whether a node that is there has still to say which devices it has."""
        return any(node in self.present for node, _ in self._asked.values())

    def _hear(self, reply: Message) -> int:
        # there may be two: a node writes its reply's metadata itself
        node, _ = self._asked.pop(reply.metadata.reply_to_message_id, (None, 0.0))
        if node is None or node not in self.present:
            return 0
        try:
            payload = payload_of(reply)
            registration = Registration.from_bytes(payload)
            self._check(node, registration)
        except WireError as error:
            self.refusals[node] = str(error)
            self.offend(node, str(error))
        except RunError as error:
            if not unanswered(reply):  # else it is asked again
                self.refusals[node] = str(error)
                log.warning("%s could not register: %s", self.name(node), error)
        else:
            self.nodes[node] = registration
            self.account(node).devices = registration.devices.tolist()
            self._taken.update(self.account(node).devices)
            self.seen(node, len(payload))
            return len(payload)
        return 0

    def _check(self, node: int, registration: Registration) -> None:
        devices = registration.devices.tolist()
        if self._owners is not None:
            allowed = self._owners().get(self._fingerprint(node))
            if allowed is None:
                raise RunError("its key has no devices here: fedsplit server register lets it in")
            if wrong := sorted(set(devices) - set(allowed)):
                raise WireError(f"devices: {wrong[0]} does not belong to the node's key")
        if twice := self._taken.intersection(devices):
            # no offence: without a key a node that comes back is another one, and the old one seems to be there still
            raise RunError(f"devices: {min(twice)} is registered by another node")
        if devices and devices[-1] >= self._devices:
            raise WireError(f"devices must be below {self._devices}, got {devices[-1]}")

    def _fingerprint(self, node: int) -> str:
        try:
            return fingerprint(read_public_key(self._keys.get(node, b"")))
        except ConfigError:
            return ""

    @property
    def hopeless(self) -> bool:
        """Whether all nodes have answered and some were refused: of a simulation no others will come.

        A deployment can do without some, and others may come, as long as not every key that it knows was refused.
        """
        if self._owners is None:
            return bool(self.refusals) and len(self.refusals) + len(self.nodes) == len(self.present)
        owners = self._owners()
        refused = {key for node in self.refusals if (key := self._fingerprint(node)) in owners}
        return bool(refused) and len(refused) == len(owners)

    @property
    def offences(self) -> dict[str, int]:
        """How many replies each node has sent that no honest one would; a run that is resumed goes on from there.

        By the key's fingerprint, since nodes have other numbers after a restart of the SuperLink; else by the number.
        """
        found = {self._identity(node): account.offences for node, account in self.accounts.items() if account.offences}
        return {**self._earlier, **found}

    @offences.setter
    def offences(self, counted: Mapping[str, int]) -> None:
        self._earlier = dict(counted)

    def _identity(self, node: int) -> str:
        return self._fingerprint(node) or str(node)

    def account(self, node: int) -> Account:
        """Return a node's account."""
        if node not in self.accounts:
            before = self.offences.get(self._identity(node), 0)
            self.accounts[node] = Account(offences=before, quarantined=before >= self._max_offences)
        return self.accounts[node]

    def name(self, node: int) -> str:
        """Return what to call a node in a log."""
        devices = self.account(node).devices
        return f"node {node}" + (f" (devices {id_ranges(devices)})" if devices else "")

    def sent(self, node: int, size: int) -> None:
        """Note a message to a node."""
        self.account(node).exchanges += 1
        self.account(node).bytes_down += size

    def seen(self, node: int, size: int) -> None:
        """Note a good reply."""
        account = self.account(node)
        account.last_seen = time.time()
        account.bytes_up += size

    def miss(self, node: int, *, gone: bool) -> None:
        """Note that a node has not answered; one that is ``gone`` is asked for its devices before anything else."""
        self.account(node).missed += 1
        if gone:
            self.nodes.pop(node, None)

    def offend(self, node: int, what: str) -> None:
        """Note a reply that no honest node would send."""
        account = self.account(node)
        account.offences += 1
        log.warning("%s is left out: %s (offence %d)", self.name(node), what, account.offences)
        if account.offences >= self._max_offences:
            account.quarantined = True
            self.nodes.pop(node, None)
            log.warning("%s is quarantined after %d offences", self.name(node), account.offences)

    def rows(self) -> list[dict[str, Any]]:
        """Return the accounts for people and ``nodes.json``; ``state`` says where a node is."""
        return [
            {"node": str(node), "state": self._state(node), **vars(account), "devices": id_ranges(account.devices)}
            for node, account in sorted(self.accounts.items())
        ]

    def _state(self, node: int) -> str:
        if self.account(node).quarantined:
            return "quarantined"
        if node in self.refusals:
            return f"refused: {self.refusals[node]}"
        return "connected" if node in self.nodes else "away"


_UNANSWERED = (
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
)


def unanswered(reply: Message) -> bool:
    """Whether a reply is Flower's word that there will be none: too late, node gone, app gone, upload incomplete."""
    return reply.has_error() and reply.error.code in _UNANSWERED


def payload_of(reply: Message) -> bytes:
    """Return a reply's payload.

    Raises
    ------
    RunError
        With the reason, if it is an error: fedsplit's own say what happened without any data.
    WireError
        If there is no payload.
    """
    if reply.has_error():
        # a ClientApp's exception text comes along
        said = ((reply.error.reason or "").strip().splitlines() or ["no reason given"])[-1][:1000]
        raise RunError("".join(c for c in said if c.isprintable()))
    return from_record(reply.content)


def id_ranges(ids: Sequence[int]) -> str:
    """Write ascending ids shortly: 0-3, 7."""
    parts: list[list[int]] = []
    for i in ids:
        if parts and i == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], i]
        else:
            parts.append([i])
    return ", ".join("-".join(map(str, part)) for part in parts)


def ids_in(ranges: str) -> list[int]:
    """Undo :func:`id_ranges`."""
    ends = [part.split("-") for part in ranges.split(", ") if part]
    return [i for each in ends for i in range(int(each[0]), int(each[-1]) + 1)]
