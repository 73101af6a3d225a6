"""One round: what is asked of the nodes, and what they answer."""

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedsplit.common.errors import FedsplitError, RunError, WireError
from fedsplit.flower.record import to_record
from fedsplit.plan.schedule import Row
from fedsplit.server.answers import PendingBlock, check_size, check_upload
from fedsplit.server.parts import Parts
from fedsplit.server.pending import settled
from fedsplit.server.roster import payload_of, unanswered
from fedsplit.wire.exchange import CutGradients, Download, Upload

log = logging.getLogger(__name__)
Rows = dict[int, list[Row]]
"""The schedule's rows by node."""


class _Payload(Protocol):
    def to_bytes(self) -> bytes: ...


Asked = TypeVar("Asked", bound=_Payload)
Answer = TypeVar("Answer")


class Round:
    """A round of a run: all that it holds ends with it.

    Parameters
    ----------
    parts : Parts
    grid : Grid
    number : int
        Counted from 1 through the whole run.

    Attributes
    ----------
    metrics : dict
        What the round will have brought.
    there : int64 array (devices,)
        Devices that a virtual clock says are there.
    """

    def __init__(self, parts: Parts, grid: Grid, number: int) -> None:
        self.parts = parts
        self.number = number
        self.metrics: dict[str, Any] = {"round": number}
        self.there = np.zeros(0, dtype=np.int64)
        self._grid = grid
        self._keep_from = min([b.cut.round_number for b in parts.progress.pending], default=number)
        self._asked: Mapping[int, Any] = {}  # by node: what it was sent in the exchange that goes on
        self._enough: int | None = None  # devices whose answers that exchange is over with
        self._until = float("inf")

    # ------------------------------------------------------------------ exchanges

    def exchange(
        self,
        rows: Rows,
        pending: Sequence[PendingBlock],
        *,
        needed: int,
        enough: int | None = None,
        alone: bool = False,
    ) -> list[Upload]:
        """Have nodes answer cut gradients and release training records.

        Parameters
        ----------
        rows : dict
            By node: the rows of the schedule that it is asked for.
        pending : sequence of PendingBlock
        needed : int
            How many nodes must answer well; all of them, if fewer are asked.
        enough : int, optional
            Devices among ``rows`` after whose answers nobody waits for others.
        alone : bool
            Whether the gradient of each device is asked for, whatever the first layer needs.

        Returns
        -------
        list of Upload
            The good ones, in the order of their devices.

        Raises
        ------
        RunError
            If fewer nodes answered well than the run needs.
        """
        asked = self._downloads(rows, pending, alone=alone)
        self._enough = enough
        found = self._hear(asked, pending, needed, test=False)
        progress = self.parts.progress
        progress.pending = settled(progress.pending, (cut for node in found for cut in asked[node].pending))
        for node, upload in found.items():
            self._sit_out(upload, asked[node])
        self.ask_again([row for node in asked if node not in found for row in asked[node].schedule.tolist()])
        return list(found.values())

    def test(self, rows: Rows) -> list[Upload]:
        """Have nodes release test records; return the good uploads, in the order of their devices."""
        return list(self._hear(self._downloads(rows, []), [], 0, test=True).values())

    def waste(self, pending: Sequence[PendingBlock]) -> None:
        """Have cut gradients answered, and hear nothing: what has left, a ledger must count."""
        self._send(self._downloads({}, pending), test=False)

    def question(
        self,
        asked: Mapping[int, Asked],
        read: Callable[[bytes, Asked], Answer],
        needed: int,
        *,
        test: bool = False,
    ) -> dict[int, Answer]:
        """Send some nodes a payload each; return the good answers by node, in the order of ``asked``.

        Parameters
        ----------
        asked : mapping
            By node.
        read : callable
            Raises WireError for a payload that no honest node would send.
        needed : int
        test : bool
            Whether it is about test records, for which there is no deadline.

        Raises
        ------
        RunError
            As :meth:`exchange`.
        """
        self._asked = asked
        found = self._answers(self._send(asked, test=test), asked, read, needed)
        self._asked, self._enough = {}, None
        return found

    def over(self, replies: Iterable[Message]) -> bool:
        """Whether an exchange is over with these replies: the deadline has passed, or there are enough."""
        nodes = {reply.metadata.src_node_id for reply in replies if not reply.has_error()}
        honest = [node for node in nodes if not self.parts.roster.account(node).offences]  # as far as one can see
        return self._is_late or self._are_enough(honest)

    def ask_again(self, rows: Iterable[Row]) -> None:
        """Note which of the schedule's rows have brought nothing."""
        if self.parts.options.asks_again:
            for device, _, start, _ in rows:
                self.parts.schedule.not_released(device, start)

    def by_node(self, rows: Mapping[int, Row]) -> Rows:
        """Sort the schedule's rows, which are by device, to the nodes that have these."""
        found = {}
        for node, registration in self.parts.roster.nodes.items():
            if mine := [rows[d] for d in registration.devices.tolist() if d in rows]:
                found[node] = mine
        return found

    @property
    def home(self) -> dict[int, int]:
        """The node of each device that is there."""
        return {d: node for node, r in self.parts.roster.nodes.items() for d in r.devices.tolist()}

    # ------------------------------------------------------------------- messages

    def _downloads(self, rows: Rows, pending: Sequence[PendingBlock], *, alone: bool = False) -> dict[int, Download]:
        """Return what each node is sent that has rows or pending blocks, in the order of their devices."""
        parts, home = self.parts, self.home
        blocks: dict[int, list[CutGradients]] = {}
        for block in pending:
            nodes = {home.get(d) for d in block.cut.devices.tolist()}
            if len(nodes) == 1 and (node := nodes.pop()) is not None:
                blocks.setdefault(node, []).append(block.cut)
        weights = parts.layer.flatten(parts.first_layer.weights)
        return {
            node: Download(
                run=parts.progress.run,
                round_number=self.number,
                keep_from=self._keep_from,
                per_device=alone or parts.first_layer.per_device,
                nonce=secrets.randbits(62),
                weights=weights,
                schedule=np.array(rows.get(node, []), dtype=np.int64).reshape(-1, 4),
                pending=blocks.get(node, []),
            )
            for node in sorted({*rows, *blocks}, key=lambda n: int(parts.roster.nodes[n].devices[0]))
        }

    def _send(self, asked: Mapping[int, _Payload], *, test: bool) -> Iterable[Message]:
        messages = [self._message(node, payload.to_bytes(), test=test) for node, payload in asked.items()]
        return self._grid.send_and_receive(messages, timeout=self.parts.options.timeout)

    def _message(self, node: int, payload: bytes, *, test: bool) -> Message:
        """Return a message to a node, and count it; one of training has until the deadline from now on."""
        self.parts.progress.totals.bytes_down += len(payload)
        self.parts.progress.totals.exchanges += 1
        self.parts.roster.sent(node, len(payload))
        timeout, deadline = self.parts.options.timeout, self.parts.options.deadline
        if test:
            return Message(to_record(payload), node, MessageType.EVALUATE, ttl=timeout)
        if deadline is not None:
            timeout, self._until = min(timeout, deadline), time.monotonic() + deadline
        return Message(to_record(payload), node, MessageType.TRAIN, ttl=timeout)

    # -------------------------------------------------------------------- answers

    def _hear(
        self, asked: Mapping[int, Download], pending: Sequence[PendingBlock], needed: int, *, test: bool
    ) -> dict[int, Upload]:
        parts = self.parts

        def read(payload: bytes, download: Download) -> Upload:
            check_size(len(payload), download, parts.layer.width, parts.layer.size, parts.targets)
            upload = Upload.from_bytes(payload, parameters=parts.layer.size)
            check_upload(upload, download, pending, parts.layer.width, parts.targets)
            return upload

        found = self.question(asked, read, needed, test=test)
        for node, upload in found.items():
            parts.roster.account(node).refused += int(upload.refused[:, 2].sum())
            if len(upload.lost):
                log.warning("%s has lost its pending chunk of round %s", parts.roster.name(node), upload.lost.tolist())
            if failed := upload.failed.tolist():
                log.warning("round %d: devices %s sat out", self.number, failed)
            parts.progress.totals.add(upload, parts.layer.width, test=test)
        return found

    def _sit_out(self, upload: Upload, asked: Download) -> None:
        """Note what devices could not release."""
        for device, _, start, _ in asked.schedule.tolist():
            if device in upload.failed:
                self.parts.schedule.not_released(device, start)

    def _answers(
        self,
        replies: Iterable[Message],
        asked: Mapping[int, Asked],
        read: Callable[[bytes, Asked], Answer],
        needed: int,
    ) -> dict[int, Answer]:
        """Read the replies to what was asked; who has not answered, or badly, is noted in the roster."""
        good: dict[int, Answer] = {}
        reasons: dict[int, str] = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            if node not in asked and reply.has_error():
                continue  # Flower's own word that a node has not answered
            if node not in asked or node in good or node in reasons:
                log.warning("round %d: a reply that nobody asked for", self.number)
                continue
            try:
                good[node] = self._read(reply, asked[node], read)
            except FedsplitError as error:
                reasons[node] = str(error)
                self._left_out(reply, error)
        self._missed([node for node in asked.keys() - good.keys() - reasons.keys()], good)
        if len(good) < min(needed, len(asked)) and not self.parts.can_do_without:
            why = f"; first reason: {next(iter(reasons.values()))}" if reasons else ""
            raise RunError(
                f"round {self.number}: {len(good)} of {len(asked)} nodes answered, "
                f"protocol.min-nodes is {self.parts.options.min_nodes}{why}"
            )
        return {node: good[node] for node in asked if node in good}

    def _read(self, reply: Message, asked: Asked, read: Callable[[bytes, Asked], Answer]) -> Answer:
        payload = payload_of(reply)
        answer = read(payload, asked)
        self.parts.roster.seen(reply.metadata.src_node_id, len(payload))
        self.parts.progress.totals.bytes_up += len(payload)
        return answer

    def _left_out(self, reply: Message, error: FedsplitError) -> None:
        """Note a reply that is none: one that no honest node would send is an offence."""
        node, roster = reply.metadata.src_node_id, self.parts.roster
        if isinstance(error, WireError):
            roster.offend(node, str(error))
            return
        gone = unanswered(reply)
        roster.miss(node, gone=gone)
        what = "has not answered" if gone else f"is left out: {error}"
        log.warning("round %d: %s %s", self.number, roster.name(node), what)

    def _missed(self, silent: Iterable[int], good: Iterable[int]) -> None:
        """Note the nodes that have not answered."""
        spare, late = self._are_enough(good), self._is_late
        self._until = float("inf")
        for node in silent:
            self.parts.roster.miss(node, gone=not spare and not late)
            if not spare:  # else it is only slower than others
                log.warning("round %d: %s has not answered", self.number, self.parts.roster.name(node))

    @property
    def _is_late(self) -> bool:
        return time.monotonic() > self._until

    def _are_enough(self, nodes: Iterable[int]) -> bool:
        """Whether the devices of some nodes, of those that were asked, are as many as are wanted."""
        if self._enough is None:
            return False
        return sum(len(self._asked[node].schedule) for node in nodes if node in self._asked) >= self._enough
