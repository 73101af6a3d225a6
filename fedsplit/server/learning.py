"""What the trunk makes of a round's releases, where labels come with them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fedsplit.common.arrays import FloatArray
from fedsplit.common.seeds import seed_of
from fedsplit.server.batches import Batches
from fedsplit.server.parts import Parts
from fedsplit.server.round import Round
from fedsplit.server.trunk import Trunk
from fedsplit.wire.release import Release

Compare = Callable[[Trunk, Batches], dict[str, Any]]


@dataclass(frozen=True)
class Learned:
    """Cut gradients of a round's new releases.

    Attributes
    ----------
    releases : sequence of Release
        What the gradients are of, one of each node.
    values : float32 array (sent outputs,)
        Gradients of the summed loss at all that was sent, in canonical order (device, record).
    """

    releases: Sequence[Release]
    values: FloatArray


class Learner(Protocol):
    """Trains and scores the trunk.

    Attributes
    ----------
    compare : callable or None
        Adds to an evaluation, from the trunk and the released test records: scores of another model.
    """

    compare: Compare | None

    def check(self, records: int) -> None:
        """Refuse rounds that can bring so many records; raises ConfigError."""

    def learn(self, now: Round, releases: Sequence[Release]) -> Learned | None:
        """Train on a round's releases, each of at least one record; None: there is nothing to answer."""

    def evaluate(self, now: Round, releases: Sequence[Release]) -> dict[str, Any]:
        """Return scores over released test records; none, if none can be scored."""


class SharedLabels:
    """The whole trunk learns here, and in modes that replay also from all that has been released before.

    Parameters
    ----------
    parts : Parts
    compare : callable, optional
        Adds to an evaluation, from the trunk and the released test records: scores of another model.
    """

    def __init__(self, parts: Parts, compare: Compare | None = None) -> None:
        self.parts = parts
        self.compare = compare

    def check(self, records: int) -> None:
        """Any number will do."""

    def learn(self, now: Round, releases: Sequence[Release]) -> Learned | None:
        """Take passes over the releases, and those that are replayed, in mini-batches."""
        progress, replays = self.parts.progress, self.parts.options.mode.replays
        new = [Batches.join(releases)] if releases else []
        replay = list(progress.replay.values()) if replays else []
        if not new and not replay:
            return None
        fresh = sum(len(b) for b in replay)
        began = time.perf_counter()
        values, metrics = self.parts.trunk.train(Batches.concat([*replay, *new]), fresh, now.number)
        now.metrics.update(metrics, trunk_seconds=round(time.perf_counter() - began, 4))
        if replays and new:
            progress.replay[now.number] = new[0]
            self._forget_oldest(now.number)
        return Learned(releases, values) if new else None

    def evaluate(self, now: Round, releases: Sequence[Release]) -> dict[str, Any]:
        """Score the trunk."""
        if not releases:
            return {}
        test = Batches.join(releases)
        compared = self.compare(self.parts.trunk, test) if self.compare is not None else {}
        return {**self.parts.trunk.evaluate(test), **compared}

    def _forget_oldest(self, round_number: int) -> None:
        """Keep what is replayed within its limit: of the newest rounds as much as fits beside the public records."""
        replay, room = self.parts.progress.replay, self.parts.options.replay_bytes
        if room is None:
            return
        for number in sorted(replay, key=lambda n: (n > 0, -n)):  # public ones first, who fit, then the newest
            seed = seed_of(self.parts.schedule.seed, "replay", round_number, number)
            kept = replay[number].part(max(0, room), np.random.default_rng(seed))
            room -= kept.nbytes
            if len(kept):
                replay[number] = kept
            else:
                del replay[number]
