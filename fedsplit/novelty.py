"""Which releases are of something new: distances to what has been normal, in a trunk that tells recordings apart.

A trunk that learns to classify looks away from whatever its classes share, and so from what a class never seen differs
in. Here its outputs are the *recordings* of the training devices (stretches of consecutive records), which needs no
labels and makes it keep how somebody moves; that is how speakers are verified (Snyder et al., "X-vectors", ICASSP 2018,
without their backend). Dropping more of a release at random, as augmentation, keeps the trunk from resting on a few
outputs. What is normal is stored as one centre per recording: those of the device itself (calibrated) or, lacking
these, those of all training devices.

Everything here is the server's and sees releases alone.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsplit.errors import DataError
from fedsplit.packing import IntArray
from fedsplit.schedule import seed_of
from fedsplit.trunk import Batches, minibatches

_BLOCK = 512  # records made dense at once
_LEAST = 1e-6  # added to the scales: a feature may be constant


@dataclass(frozen=True)
class Teaching:
    """How the trunk learns to tell recordings apart.

    Attributes
    ----------
    epochs, batch_size : int
    lr : float
        Of Adam, with a cosine schedule.
    drop : float
        Of each record a share of the outputs, drawn from 0..drop, is set to zero on top of what the device dropped.
    """

    epochs: int = 40
    batch_size: int = 64
    lr: float = 0.002
    drop: float = 0.5


def teach(
    trunk: nn.Module, cut_shape: tuple[int, ...], batches: Batches, recordings: IntArray, options: Teaching, seed: int
) -> None:
    """Train a trunk in place to tell which recording a release is of.

    Parameters
    ----------
    trunk : nn.Module
        Takes ``(batch, *cut_shape)``, returns one output per recording.
    batches : Batches
        Releases of the training devices; their targets are not used.
    recordings : int64 array (records,)
        0..n-1, each at least once.

    Raises
    ------
    DataError
        If the recordings are fewer than two or do not fit the batches.
    """
    if len(recordings) != len(batches) or len(np.unique(recordings)) < 2:
        raise DataError(f"need a recording for each of {len(batches)} records and two recordings or more")
    optimizer = torch.optim.Adam(trunk.parameters(), options.lr)
    steps = options.epochs * -(-len(batches) // options.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    targets = torch.from_numpy(recordings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "novelty"))
        trunk.train()
        for epoch in range(options.epochs):
            order = np.random.default_rng(seed_of(seed, "novelty", epoch)).permutation(len(batches))
            for rows in minibatches(order, options.batch_size):
                cut = _thinned(_dense(batches, rows, cut_shape), options.drop)
                loss = nn.functional.cross_entropy(trunk(cut), targets[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()


def _thinned(cut: Tensor, most: float) -> Tensor:
    share = most * torch.rand((len(cut), *[1] * (cut.ndim - 1)))
    return cut * (torch.rand(cut.shape) >= share)


def _dense(batches: Batches, rows: IntArray, cut_shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(batches.dense(rows)[0]).reshape(-1, *cut_shape)


def features(trunk: nn.Sequential, cut_shape: tuple[int, ...], batches: Batches) -> NDArray[np.float64]:
    """Return what every ReLU of the trunk gives, each channel's mean over time or image: ``(records, features)``."""
    trunk.eval()
    parts = []
    with torch.no_grad():
        for start in range(0, len(batches), _BLOCK):
            h = _dense(batches, np.arange(start, min(start + _BLOCK, len(batches))), cut_shape)
            pooled = []
            for module in trunk:
                h = module(h)
                if isinstance(module, nn.ReLU):
                    pooled.append(h.flatten(2).mean(dim=2) if h.ndim > 2 else h)
            parts.append(torch.cat(pooled, dim=1).numpy().astype(np.float64))
    return np.concatenate(parts)


@dataclass(frozen=True)
class Space:
    """Where releases are compared: features in units of their spread over the training records, made unit vectors.

    Length says mostly how strong a movement is and how much of it was dropped, hence directions alone.

    Attributes
    ----------
    mean, scale : float64 arrays (features,)
    """

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]

    @classmethod
    def of(cls, training: NDArray[np.float64]) -> "Space":
        """Take mean and standard deviation of the training records' features ``(records, features)``."""
        return cls(training.mean(axis=0), training.std(axis=0) + _LEAST)

    def units(self, found: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the unit vectors ``(records, features)`` of some records' features.

        >>> Space(np.zeros(2), np.array([1.0, 2.0])).units(np.array([[3.0, 8.0]]))
        array([[0.6, 0.8]])
        """
        standard = (found - self.mean) / self.scale
        length = np.linalg.norm(standard, axis=1, keepdims=True)
        return np.asarray(standard / np.maximum(length, _LEAST))


@dataclass(frozen=True)
class Normal:
    """What has been normal: one centre per recording.

    Attributes
    ----------
    centres : float64 array (recordings, features)
        Means of unit vectors.
    """

    centres: NDArray[np.float64]

    @classmethod
    def of(cls, units: NDArray[np.float64], recordings: IntArray) -> "Normal":
        """Take the centres of some recordings of normal records; ``recordings`` are any numbers that tell them apart.

        Raises
        ------
        DataError
            If there are no records.
        """
        if not len(units):
            raise DataError("no normal records to calibrate with")
        return cls(np.stack([units[recordings == r].mean(axis=0) for r in np.unique(recordings)]))

    def scores(self, units: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return each record's squared distance to the nearest centre, 0..4: larger is newer.

        >>> Normal(np.array([[1.0, 0.0]])).scores(np.array([[1.0, 0.0], [0.0, 1.0]]))
        array([0., 2.])
        """
        return np.asarray(_squared(units, self.centres).min(axis=1))

    def episode_score(self, units: NDArray[np.float64]) -> float:
        """Return how new an episode of consecutive records is: the mean's score, so that what varies cancels out."""
        return float(self.scores(units.mean(axis=0, keepdims=True))[0])


def _squared(units: NDArray[np.float64], centres: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.square(units[:, None] - centres).sum(axis=2))


def threshold(units: NDArray[np.float64], recordings: IntArray, false_alarms: float) -> float:
    """Return the score that a share of normal records exceeds, judged by a device's own calibration records.

    Each is scored without having a part in its centre; recordings of one record are left out.

    Raises
    ------
    DataError
        If no recording has two records.
    """
    normal = Normal.of(units, recordings)
    _, which, counts = np.unique(recordings, return_inverse=True, return_counts=True)
    n = counts[which]
    if not (n > 1).any():
        raise DataError("the threshold needs a calibration recording of two records or more")
    without = (normal.centres[which] * n[:, None] - units) / np.maximum(n - 1, 1)[:, None]
    own = np.square(units - without).sum(axis=1)
    distances = _squared(units, normal.centres)
    distances[np.arange(len(units)), which] = own
    return float(np.quantile(distances.min(axis=1)[n > 1], 1 - false_alarms))
