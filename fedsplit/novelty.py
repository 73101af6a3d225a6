"""Which releases are of something new: distances to what has been normal, in a trunk that tells recordings apart.

A trunk that learns to classify looks away from whatever its classes share, and so from what a class never seen differs
in. Here its outputs are the *recordings* of the training devices (stretches of consecutive records), which needs no
labels and makes it keep how somebody moves; that is how speakers are verified (Snyder et al., "X-vectors", ICASSP 2018,
with a plainer backend). Dropping more of a release at random, as augmentation, keeps the trunk from resting on a few
outputs. What is normal is stored as one centre per recording: those of the device itself (calibrated) or, lacking
these, those of all training devices; a distance counts in units of how far the recording's own records lie.

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
_LEAST = 1e-6  # of scales and lengths: a feature may be constant, a release empty
_SHRINKAGE = 0.3  # of the covariance towards a multiple of the identity: there are more features than recordings
_OWN = 0.75  # weight of a recording's own spread against the mean of all: it comes from a few records


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
    """Return what every ReLU of the trunk gives, ``(records, features)``: each channel's mean and largest value."""
    trunk.eval()
    parts = []
    with torch.no_grad():
        for start in range(0, len(batches), _BLOCK):
            h = _dense(batches, np.arange(start, min(start + _BLOCK, len(batches))), cut_shape)
            pooled = []
            for module in trunk:
                h = module(h)
                if isinstance(module, nn.ReLU):
                    flat = h.flatten(2) if h.ndim > 2 else h.unsqueeze(2)  # (records, channels, places)
                    pooled += [flat.mean(dim=2), flat.amax(dim=2)]
            parts.append(torch.cat(pooled, dim=1).numpy().astype(np.float64))
    return np.concatenate(parts)


@dataclass(frozen=True)
class Space:
    """Where releases are compared: whitened by how records of one recording differ, made unit vectors.

    What varies within a recording says little of what is new. Length says mostly how strong a movement is and how much
    of it was dropped, hence directions alone.

    Attributes
    ----------
    mean : float64 array (features,)
    whitening : float64 array (features, features)
    """

    mean: NDArray[np.float64]
    whitening: NDArray[np.float64]

    @classmethod
    def of(cls, training: NDArray[np.float64], recordings: IntArray) -> "Space":
        """Fit to the training records' features ``(records, features)`` and which recording each is of."""
        scale = training.std(axis=0) + _LEAST
        _, which = np.unique(recordings, return_inverse=True)
        within = (training - _means(training, which)[which]) / scale
        covariance = within.T @ within / len(within)
        even = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        values, vectors = np.linalg.eigh((1 - _SHRINKAGE) * covariance + _SHRINKAGE * even)
        return cls(training.mean(axis=0), vectors / np.sqrt(np.maximum(values, _LEAST**2)) / scale[:, None])

    def units(self, found: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the unit vectors ``(records, features)`` of some records' features.

        >>> Space(np.zeros(2), np.diag([1.0, 0.5])).units(np.array([[3.0, 8.0]]))
        array([[0.6, 0.8]])
        """
        white = (found - self.mean) @ self.whitening
        return np.asarray(white / np.maximum(np.linalg.norm(white, axis=1, keepdims=True), _LEAST))


@dataclass(frozen=True)
class Normal:
    """What has been normal: where the recordings lie, and how far from there their records do.

    Attributes
    ----------
    centres : float64 array (recordings, features)
        Means of unit vectors.
    spreads : float64 array (recordings,)
        Mean squared distances of records, drawn towards the mean of all recordings.
    """

    centres: NDArray[np.float64]
    spreads: NDArray[np.float64]

    @classmethod
    def of(cls, units: NDArray[np.float64], recordings: IntArray) -> "Normal":
        """Fit to normal records' unit vectors; ``recordings`` are any numbers that tell their recordings apart.

        Raises
        ------
        DataError
            If no recording has two records that differ.
        """
        _, which, counts = np.unique(recordings, return_inverse=True, return_counts=True)
        centres = _means(units, which)
        squares = np.bincount(which, np.square(units - centres[which]).sum(axis=1), len(counts))
        several = counts > 1
        if not squares[several].any():
            raise DataError("need normal records, of one recording two or more that differ")
        spreads = squares / np.maximum(counts - 1, 1)
        mean = spreads[several].mean()
        return cls(centres, np.where(several, _OWN * spreads + (1 - _OWN) * mean, mean))

    def scores(self, units: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return each record's squared distance to the nearest recording, in units of its spread: larger is newer.

        >>> Normal(np.array([[1.0, 0.0]]), np.array([0.5])).scores(np.array([[1.0, 0.0], [0.0, 1.0]]))
        array([0., 4.])
        """
        squares = np.square(units).sum(axis=1)[:, None] + np.square(self.centres).sum(axis=1)
        return np.asarray((np.maximum(squares - 2 * units @ self.centres.T, 0) / self.spreads).min(axis=1))

    def episode_score(self, units: NDArray[np.float64]) -> float:
        """Return how new an episode of consecutive records is: the mean's score, so that what varies cancels out.

        An episode's scores are smaller than a record's, the more so the longer it is.
        """
        return float(self.scores(units.mean(axis=0, keepdims=True))[0])


def threshold(units: NDArray[np.float64], recordings: IntArray, false_alarms: float) -> float:
    """Return the score that a share of a device's normal records exceeds, each judged by all others.

    A record without another of its recording is not judged. Raises DataError like :meth:`Normal.of`.
    """
    scores = []
    for i in np.flatnonzero((recordings[:, None] == recordings).sum(axis=1) > 1):
        others = np.arange(len(units)) != i
        scores.append(Normal.of(units[others], recordings[others]).scores(units[i : i + 1])[0])
    if not scores:
        raise DataError("the threshold needs a calibration recording of two records or more")
    return float(np.quantile(scores, 1 - false_alarms))


def _means(rows: NDArray[np.float64], which: IntArray) -> NDArray[np.float64]:
    return np.stack([rows[which == r].mean(axis=0) for r in range(int(which.max(initial=-1)) + 1)] or [rows[:0].sum(0)])
