"""SplitStrategy on a virtual clock: devices that are away, late or lost, as a profile says.

To the clock every device is a node of its own, and all that a deployment does about a node that has not answered is
done about a device. Nodes, which host many, are asked in two steps where one message would do, since it takes the sizes
of releases to know who is late, and a node adds up the gradients of those who are not. Devices that are never heard do
the same work, and their ledgers count it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid

from fedsplit.common.arrays import IntArray, sum_groups
from fedsplit.common.errors import ConfigError, RunError
from fedsplit.plan.schedule import Row
from fedsplit.server.answers import PendingBlock
from fedsplit.server.rounds import SplitStrategy
from fedsplit.server.virtual.clock import VirtualClock, Work
from fedsplit.server.virtual.trace import SECOND
from fedsplit.wire.exchange import Upload
from fedsplit.wire.release import Release
from fedsplit.wire.sizes import Sizes

Rows = dict[int, list[Row]]


class VirtualStrategy(SplitStrategy):
    """Split training over devices that a profile describes.

    Parameters
    ----------
    clock : VirtualClock
    sizes : Sizes
        Of what devices send and are sent.
    record_seconds : tuple of float
        What one core of this machine needs to release a record, and for its gradient.
    min_devices : int
        The run stops when fewer of the devices that were asked were heard (all of them, if fewer were asked).
    rest : as :class:`SplitStrategy`
    """

    def __init__(
        self,
        *rest: Any,
        clock: VirtualClock,
        sizes: Sizes,
        record_seconds: tuple[float, float],
        min_devices: int,
        **more: Any,
    ) -> None:
        super().__init__(*rest, **more)
        self.clock = clock
        self.sizes = sizes
        self._seconds = record_seconds
        self._least = min_devices
        self._heard: list[Release] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the messages with the cut gradients of devices that are heard, after the releases have come."""
        self.clock.begin(self._begin_round(server_round, grid))
        rows = self._cohort(self.progress.round_number)
        there = self._there
        if self.options.mode != "synchronous":
            self._heard, answering = self._exchange(grid, rows, self._pending_of(there))
            return self._messages(MessageType.TRAIN, {}, answering)
        self._heard = []
        releases, _ = self._exchange(grid, rows, [])
        self._learn(releases)
        _, answering = self._exchange(grid, {}, self._pending_of(there))
        return self._messages(MessageType.TRAIN, {}, answering)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Train the trunk on what was heard, then step the first layer."""
        uploads = self._receive(replies, needed=self.options.min_nodes)
        if self.options.mode != "synchronous":
            self._learn(self._heard)
        self._step_first_layer(uploads)
        self.metrics.update(self.clock.report())
        return None, None

    def clock_state(self) -> dict[str, Any]:
        """Return the clock's state."""
        return self.clock.state()

    def load_clock(self, state: dict[str, Any]) -> None:
        """Set the clock."""
        self.clock.load_state(state)

    def _are_enough(self, nodes: Iterable[int], asked: Mapping[int, Any]) -> bool:
        return False  # it is the clock that says when a round is over

    def _flush(self, grid: Grid) -> None:
        _, answering = self._exchange(grid, {}, self._pending_of(self._there), needed=0)
        replies = grid.send_and_receive(self._messages(MessageType.TRAIN, {}, answering), timeout=self.options.timeout)
        self._step_first_layer(self._receive(replies, needed=0), "flush")
        self.metrics.update(self.clock.report())

    def _cohort(self, round_number: int) -> dict[int, list[Row]]:
        """Return the rows of devices that are there, after waiting for some who still have something to release."""
        waiting = self.schedule.waiting()
        candidates = np.union1d(np.array(waiting, dtype=np.int64), self._devices_pending)
        least = min(self._least, len(candidates))
        self._there = self.clock.there(candidates, least, must=not self._can_do_without)
        self.schedule.leave_out(set(candidates.tolist()) - set(self._there.tolist()))
        return super()._cohort(round_number)

    @property
    def _devices_pending(self) -> IntArray:
        return np.unique(np.concatenate([b.cut.devices for b in self.progress.pending] or [np.zeros(0, np.int64)]))

    def _pending_of(self, devices: IntArray) -> list[PendingBlock]:
        parts = [block.among(devices) for block in self.progress.pending]
        return [part for part in parts if len(part.records)]

    def _exchange(
        self, grid: Grid, rows: Rows, pending: Sequence[PendingBlock], needed: int | None = None
    ) -> tuple[list[Release], list[PendingBlock]]:
        """Have records released, and see on the clock who is heard.

        Returns
        -------
        tuple
            The releases that are heard, and the pending chunks of devices that are.

        Raises
        ------
        RunError
            If too few are.
        """
        uploads: list[Upload] = []
        if rows:
            messages = self._messages(MessageType.TRAIN, rows, [])
            uploads = self._receive(grid.send_and_receive(messages, timeout=self.options.timeout), needed=1)
        work, released, answered = self._work([row for those in rows.values() for row in those], uploads, pending)
        if not len(work.devices):
            return [], []
        outcome = self.clock.exchange(work, self.schedule.enough(sum(map(len, rows.values()))))
        self.clock.note_records(work, outcome, released, answered)
        heard = work.devices[outcome.heard]
        least = 0 if self._can_do_without else min(self._least if needed is None else needed, len(work.devices))
        if len(heard) < least:
            raise RunError(
                f"round {self.progress.round_number}: {len(heard)} of {len(work.devices)} devices were heard within "
                f"{self.clock.limit / SECOND:g} simulated seconds, protocol.min-nodes is {self._least}"
            )
        unheard = set(work.devices[~outcome.heard].tolist())
        self._ask_again(row for those in rows.values() for row in those if row[0] in unheard)
        self._lose(grid, [part for block in pending if len((part := block.without(heard)).records)])
        answering = [part for block in pending if len((part := block.among(heard)).records)]
        return [u.release.take(np.isin(u.release.devices, heard)) for u in uploads], answering

    def _lose(self, grid: Grid, pending: Sequence[PendingBlock]) -> None:
        """Have chunks answered whose answers do not arrive: what has left, a ledger must count."""
        if pending:
            grid.send_and_receive(self._messages(MessageType.TRAIN, {}, pending), timeout=self.options.timeout)
            self._sent = {}

    def _work(
        self, rows: Sequence[Row], uploads: Sequence[Upload], pending: Sequence[PendingBlock]
    ) -> tuple[Work, IntArray, IntArray]:
        """Add up what an exchange asks of each device; return the records that it releases and answers, too."""
        asked = np.array(rows, dtype=np.int64).reshape(-1, 4)
        devices = np.unique(np.concatenate([asked[:, 0], *(b.cut.devices for b in pending)]))

        def by_device(ids: Iterable[IntArray], numbers: Iterable[Any]) -> IntArray:
            total = np.zeros(len(devices), dtype=np.int64)
            for some, values in zip(ids, numbers, strict=True):
                np.add.at(total, np.searchsorted(devices, some), values)
            return total

        releases, cuts = [u.release for u in uploads], [b.cut for b in pending]
        chunks = by_device([asked[:, 0]], [1])
        computed = by_device([asked[:, 0]], [asked[:, 3] - asked[:, 2]])
        blocks = by_device([c.devices for c in cuts], [1 for _ in cuts])
        answered = by_device([c.devices for c in cuts], [b.records for b in pending])
        released = by_device([r.devices for r in releases], [r.records for r in releases])
        work = Work(
            devices,
            self.sizes.download(chunks, blocks, by_device([c.devices for c in cuts], [c.lengths for c in cuts])),
            self.sizes.upload(
                released,
                by_device([r.devices for r in releases], [sum_groups(r.counts, r.records) for r in releases]),
                by_device([u.failed for u in uploads], [1 for _ in uploads]),
                by_device([u.refused[:, 0] for u in uploads], [1 for _ in uploads]),
                (blocks > 0).astype(np.int64),
            ),
            computed.astype(np.float64) * self._seconds[0] + answered.astype(np.float64) * self._seconds[1],
            chunks > 0,
        )
        return work, released, answered

    def check_startable(self, counts: Mapping[int, int]) -> None:
        """Refuse what cannot begin, before anything does.

        Parameters
        ----------
        counts : mapping
            By device that trains, ascending: its number of training records.

        Raises
        ------
        ConfigError
            If there will never be enough devices at once, or none of them can answer within the deadline.
        """
        devices = np.array(list(counts), dtype=np.int64)
        if self._least > len(devices):
            raise ConfigError(f"protocol.min-nodes is {self._least}, but only {len(devices)} devices train")
        if why := self.clock.profile.presence.hopeless(devices, self._least):
            raise ConfigError(
                f"devices.profile: no round can begin: {why}, protocol.min-nodes is {self._least} of {len(devices)}"
            )
        first = replace(self.schedule, fraction=1.0, position={}, heard={})
        first.set_counts(counts)
        rows = list(first.rows(1).values())
        work, _, _ = self._work(rows, [], [])
        records = np.array([stop - start for *_, start, stop in rows], dtype=np.int64)
        # as if each record released nothing but zeros
        none = np.zeros(len(work.devices), np.int64)
        work = replace(work, bytes_up=self.sizes.upload(records, none, none, none, none))
        if self.first_layer and self.options.mode != "synchronous":  # from the second round on
            work = replace(work, seconds=work.seconds + records * self._seconds[1])
        needs = self.clock.duration(work)
        if len(needs) and needs.min() > self.clock.limit:
            raise ConfigError(
                f"protocol.deadline (or timeout) {self.clock.limit / SECOND:g} s is shorter than even the fastest "
                f"device, {work.devices[needs.argmin()]}, needs for a round: {needs.min() / SECOND:.3g} s"
            )
