"""A trunk that learns to tell recordings apart, and is scored by what it notices."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray, IntArray
from fedsplit.common.errors import DataError, RunError
from fedsplit.server.batches import Batches
from fedsplit.server.novelty.detector import DETECTOR, Detector
from fedsplit.server.novelty.space import Features, Normal, Space, features
from fedsplit.server.trunk import Trunk
from fedsplit.wire.query import EPISODE

log = logging.getLogger(__name__)
_CALIBRATING = 1 / 3  # of each normal recording, where a device has no other normal records
Flags = NDArray[np.bool_]


class NoveltyTrunk(Trunk):
    """A trunk of a task that watches devices; see :class:`fedsplit.model.tasks.novelty.Novelty`."""

    detector: Detector | None = None
    """Of the last evaluation."""
    known: Batches | None = None
    """What was learned from last."""
    normal: Batches | None = None
    """What is normal for devices, if that is not what was learned from."""

    def files(self) -> dict[str, bytes]:
        """Return the weights, and what is known of normal recordings once there was an evaluation."""
        return super().files() | ({DETECTOR: self.detector.to_bytes()} if self.detector else {})

    def train(self, batches: Batches, fresh: int, round_number: int) -> tuple[FloatArray, dict[str, float]]:
        """Train on all records that belong to a recording. There are no cut gradients, since the first layer is frozen.

        Parameters
        ----------
        batches, fresh, round_number : Batches, int, int
            As in :meth:`Trunk.train`; ``fresh`` does not matter.
        """
        public = batches.devices < 0  # whose targets count through all devices already
        known = batches.take(np.flatnonzero(public | (batches.targets < self.outputs)))
        self.known = replace(known, targets=np.maximum(known.devices, 0) * self.outputs + known.targets)
        return super().train(self.known, len(known), round_number)

    def prepare_comparison(self, other: Trunk, test: Batches) -> bool:
        """Take over what is normal for devices, whatever was learned from; without something new there is no score."""
        assert isinstance(other, NoveltyTrunk)
        self.normal = other.known
        return bool((test.targets == self.outputs).any())

    def evaluate(self, batches: Batches) -> dict[str, Any]:
        """Score the tested devices' records by what is normal for each, and keep a :class:`Detector`.

        Normal is what a device has released to train with, or else the first third of each of its normal recordings
        that are tested, which is then not tested.

        Returns
        -------
        dict
            ``test_auc`` and ``test_episode_auc``: the probability that something new scores higher than something
            normal of the same device, for records and for any :data:`EPISODE` consecutive ones. Means over devices;
            None if no device has both.

        Raises
        ------
        RunError
            If no device has released normal records.
        """
        if self.known is None:
            raise RunError("no device has released normal records")
        space = Space.of(features(self.module, self.cut_shape, self.known), self.known.targets)
        normal = self.known if self.normal is None else self.normal
        own, units = (space.units(features(self.module, self.cut_shape, each)) for each in (normal, batches))
        judged: list[Judged] = []
        held_out: list[Judged] = []
        for device in np.unique(batches.devices).tolist():
            mine, before = batches.devices == device, normal.devices == device
            try:
                if not np.isfinite(units[mine]).all():
                    raise DataError("its records give no finite numbers")
                if before.any():
                    calibrated = Normal.of(own[before], normal.targets[before])
                    judged.append(judge(calibrated, units[mine], batches.targets[mine], self.outputs))
                else:
                    held_out.append(self_calibrated(units[mine], batches.targets[mine], self.outputs))
            except DataError as error:
                log.warning("device %d is not scored: %s", device, error)
        # a trunk knows recordings of devices that it learned from: what is normal for others scores higher
        normal_scores = [j.episodes[~j.new_episodes] for j in held_out or judged]
        self.detector = Detector(space, np.concatenate([np.zeros(0), *normal_scores]))
        both = [j for j in judged + held_out if 0 < j.new.mean() < 1]
        if not both:
            log.warning("no tested device has both something normal and something new: thresholds are known, no AUC")
        return {
            "test_accuracy": None,
            "test_loss": None,
            "test_auc": float(np.mean([auc(j.new, j.scores) for j in both])) if both else None,
            "test_episode_auc": float(np.mean([auc(j.new_episodes, j.episodes) for j in both])) if both else None,
        }


@dataclass(frozen=True)
class Judged:
    """The scores of one device's tested records, and of its episodes; which of them are something new.

    Attributes
    ----------
    new : bool array (records,)
    scores : float64 array (records,)
    new_episodes : bool array (episodes,)
    episodes : float64 array (episodes,)
    """

    new: Flags
    scores: Features
    new_episodes: Flags
    episodes: Features


def judge(normal: Normal, units: Features, targets: IntArray, outputs: int) -> Judged:
    """Score one device's records and episodes.

    An episode is :data:`EPISODE` consecutive records of one target, or all of them if they are fewer.

    Parameters
    ----------
    normal : Normal
        What has been normal for the device.
    units : float64 array (records, features)
        Unit vectors of the records, in order.
    targets : int64 array (records,)
        A target of ``outputs`` is something new.
    outputs : int
        The most normal recordings that a device has.
    """
    borders = np.flatnonzero(np.diff(targets)) + 1
    stretches = np.split(np.arange(len(targets)), borders)
    parts = [s[i : i + EPISODE] for s in stretches for i in range(max(1, len(s) - EPISODE + 1))]
    return Judged(
        targets == outputs,
        normal.scores(units),
        np.array([targets[rows[0]] == outputs for rows in parts]),
        np.array([normal.episode_score(units[rows]) for rows in parts]),
    )


def self_calibrated(units: Features, targets: IntArray, outputs: int) -> Judged:
    """Calibrate with the first third of each of a device's normal recordings, and judge its other records.

    Parameters
    ----------
    units, targets, outputs : float64 array (records, features), int64 array (records,), int
        As in :func:`judge`.
    """
    first = np.zeros(len(targets), dtype=bool)
    for recording in np.unique(targets[targets < outputs]):
        rows = np.flatnonzero(targets == recording)
        first[rows[: int(len(rows) * _CALIBRATING)]] = True
    return judge(Normal.of(units[first], targets[first]), units[~first], targets[~first], outputs)


def auc(new: Flags, scores: Features) -> float:
    """Return the probability that something new scores higher than something normal; ties count half.

    >>> auc(np.array([True, False, False]), np.array([2.0, 1.0, 2.0]))
    0.75
    """
    normal, tested = np.sort(scores[~new]), scores[new]
    below, upto = np.searchsorted(normal, tested, "left"), np.searchsorted(normal, tested, "right")
    return float((below + upto).mean() / 2 / len(normal))
