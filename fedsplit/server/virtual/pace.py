"""A pace by a virtual clock: devices that are away, late or lost, as a profile says.

To the clock every device is a node of its own, and all that a deployment does about a node that has not answered is
done about a device. It takes the sizes of releases to know who is late, and a node adds up its devices' gradients: so
nodes are asked in two steps where one message would do, unless each device's gradient is asked for alone. Devices that
are never heard do the same work, and their ledgers count it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedsplit.common.arrays import IntArray
from fedsplit.common.errors import ConfigError, RunError
from fedsplit.model.head import Head
from fedsplit.plan.schedule import Row
from fedsplit.server.answers import PendingBlock
from fedsplit.server.pace import Heard
from fedsplit.server.parts import Parts
from fedsplit.server.pending import among, settled, without
from fedsplit.server.round import Round, Rows
from fedsplit.server.virtual.clock import Outcome, VirtualClock, Work
from fedsplit.server.virtual.trace import SECOND
from fedsplit.wire.exchange import Upload
from fedsplit.wire.release import Release
from fedsplit.wire.sizes import Sizes


class OnClock:
    """Exchanges with the devices that a profile describes.

    Parameters
    ----------
    parts : Parts
    clock : VirtualClock
    sizes : Sizes
        Of what devices send and are sent.
    record_seconds : tuple of float
        What one core of this machine needs to release a record, and for its gradient.
    least : int
        The run stops when fewer of the devices that were asked were heard (all of them, if fewer were asked).
    alone : bool
        Whether each device is asked for its own gradient, and in the same message as for its releases: as if it was
        alone on its node. To a guard that enforces both matters.
    """

    def __init__(
        self,
        parts: Parts,
        clock: VirtualClock,
        sizes: Sizes,
        record_seconds: tuple[float, float],
        least: int,
        *,
        alone: bool,
    ) -> None:
        self.parts = parts
        self.clock = clock
        self.sizes = sizes
        self._seconds = record_seconds
        self._least = least
        self._alone = alone

    def cohort(self, now: Round) -> Rows:
        """Return the rows of devices that are there, after waiting for some who still have something to release."""
        self.clock.begin(now.number)
        schedule, cuts = self.parts.schedule, [b.cut.devices for b in self.parts.progress.pending]
        candidates = np.unique(np.concatenate([np.array(schedule.waiting(), dtype=np.int64), *cuts]))
        least = min(self._least, len(candidates))
        now.there = self.clock.there(candidates, least, must=not self.parts.can_do_without)
        schedule.leave_out(set(candidates.tolist()) - set(now.there.tolist()))
        return now.by_node(schedule.rows(now.number))

    def exchange(self, now: Round, rows: Rows, pending: Sequence[PendingBlock], *, needed: int | None = None) -> Heard:
        """Have records released, find on the clock which devices are heard, and have their cut gradients answered.

        Parameters
        ----------
        now, rows, pending, needed : Round, dict, sequence of PendingBlock, int or None
            As in :meth:`fedsplit.server.pace.Pace.exchange`.

        Raises
        ------
        RunError
            If too few devices are heard.
        """
        pending = among(pending, now.there)
        uploads = now.exchange(rows, pending if self._alone else [], needed=1, alone=self._alone)
        asked = [row for those in rows.values() for row in those]
        work, released, answered = self._work(asked, uploads, pending)
        if not len(work.devices):
            return Heard([], [])
        outcome = self.clock.exchange(work, self.parts.schedule.enough(len(asked)))
        self.clock.note_records(work, outcome, released, answered)
        heard = self._heard(now, work, outcome, needed)
        unheard = set(work.devices[~outcome.heard].tolist())
        now.ask_again(row for row in asked if row[0] in unheard)
        releases = [u.release.among(heard) for u in uploads]
        if self._alone:
            self._wait_again(without(pending, heard))
            return Heard(releases, [u.gradients.among(heard) for u in uploads])
        if wasted := without(pending, heard):
            now.waste(wasted)
        least = self.parts.options.min_nodes if needed is None else needed
        answers = now.exchange({}, among(pending, heard), needed=least)
        return Heard(releases, [u.gradients for u in answers])

    def _wait_again(self, pending: list[PendingBlock]) -> None:
        """Keep cut gradients that were answered, and whose answers were not heard."""
        progress = self.parts.progress
        progress.pending = settled(progress.pending, (block.cut for block in pending)) + pending

    def answering(self, now: Round, releases: Sequence[Release], head: Head) -> Sequence[Release]:
        """Return the parts of devices whose answers come in time. The head's own computation counts as no time.

        Parameters
        ----------
        now, releases, head : Round, sequence of Release, Head
            As in :meth:`fedsplit.server.pace.Pace.answering`.
        """
        devices, records = (np.concatenate([getattr(r, of) for r in releases]) for of in ("devices", "records"))
        order = np.argsort(devices)
        size = head.features, head.size
        work = Work(
            devices[order],
            self.sizes.head_download(records[order], *size),
            self.sizes.head_upload(records[order], *size),
            np.zeros(len(devices)),
        )
        heard = self._heard(now, work, self.clock.exchange(work), None)
        return [part for r in releases if len((part := r.among(heard)).devices)]

    def report(self) -> dict[str, Any]:
        """Return the clock's figures of the round."""
        return self.clock.report()

    def result(self) -> dict[str, Any]:
        """Return the clock's figures of the run."""
        return {"simulated": self.clock.summary()}

    def save_table(self, path: Path) -> None:
        """Write what the clock has seen of each device."""
        self.clock.save_table(path)

    def state(self) -> dict[str, Any]:
        """Return the clock's state."""
        return self.clock.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Set the clock."""
        self.clock.load_state(state)

    def _heard(self, now: Round, work: Work, outcome: Outcome, needed: int | None) -> IntArray:
        """Return the devices that are heard; raises RunError if they are too few."""
        heard = work.devices[outcome.heard]
        least = 0 if self.parts.can_do_without else min(self._least if needed is None else needed, len(work.devices))
        if len(heard) < least:
            raise RunError(
                f"round {now.number}: {len(heard)} of {len(work.devices)} devices were heard within "
                f"{self.clock.limit / SECOND:g} simulated seconds, protocol.min-nodes is {self._least}"
            )
        return heard

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
        summed = (blocks > 0).astype(np.int64)
        if self._alone:  # a guard may have refused some
            summed = by_device([u.gradients.devices for u in uploads], [1 for _ in uploads])
        work = Work(
            devices,
            self.sizes.download(chunks, blocks, by_device([c.devices for c in cuts], [c.lengths for c in cuts])),
            self.sizes.upload(
                released,
                by_device([r.devices for r in releases], [r.lengths for r in releases]),
                by_device([u.failed for u in uploads], [1 for _ in uploads]),
                by_device([u.refused[:, 0] for u in uploads], [1 for _ in uploads]),
                summed,
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
        first = replace(self.parts.schedule, fraction=1.0, position={}, heard={})
        first.set_counts(counts)
        rows = list(first.rows(1).values())
        work, _, _ = self._work(rows, [], [])
        records = np.array([stop - start for *_, start, stop in rows], dtype=np.int64)
        # as if each record released nothing but zeros
        none = np.zeros(len(work.devices), np.int64)
        work = replace(work, bytes_up=self.sizes.upload(records, none, none, none, none))
        if self.parts.first_layer.teaches and self.parts.options.mode.delay:  # from the second round on
            work = replace(work, seconds=work.seconds + records * self._seconds[1])
        needs = self.clock.duration(work)
        if len(needs) and needs.min() > self.clock.limit:
            raise ConfigError(
                f"protocol.deadline (or timeout) {self.clock.limit / SECOND:g} s is shorter than even the fastest "
                f"device, {work.devices[needs.argmin()]}, needs for a round: {needs.min() / SECOND:.3g} s"
            )
