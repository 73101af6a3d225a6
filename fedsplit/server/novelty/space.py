"""Where releases are compared, and how far from what has been normal they lie.

The trunk of the task ``novelty`` learns to tell the *recordings* of the training devices apart (stretches of
consecutive records), which needs no labels; that is how speakers are verified (Snyder et al., "X-vectors", ICASSP 2018,
with a plainer backend). What is normal for a device is one centre for each of its own recordings; a distance counts in
units of how far the recording's own records lie.

Everything here is the server's and sees releases alone.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsplit.common.arrays import IntArray
from fedsplit.common.errors import ConfigError, DataError
from fedsplit.model.activations import ACTIVATIONS
from fedsplit.server.batches import Batches

Features = NDArray[np.float64]
_BLOCK = 512  # records made dense at once
_LEAST = 1e-6  # of scales and lengths: a feature may be constant, a release empty
_SHRINKAGE = 0.3  # of the covariance towards a multiple of the identity: there are more features than recordings
_OWN = 0.75  # weight of a recording's own spread against the mean of all: it comes from a few records


def features(trunk: nn.Module, cut_shape: tuple[int, ...], batches: Batches) -> Features:
    """Return the mean and the largest value of each channel, over every activation of the trunk.

    Parameters
    ----------
    trunk : torch.nn.Module
        It is put into evaluation mode.
    cut_shape : tuple of int
        Shape of a record's outputs at the cut.
    batches : Batches
        Released records.

    Returns
    -------
    float64 array (records, features)

    Raises
    ------
    ConfigError
        If the trunk has no activation.
    """
    hidden: list[Tensor] = []
    found = [module for module in trunk.modules() if isinstance(module, tuple(ACTIVATIONS.values()))]
    if not found:
        raise ConfigError(f"task 'novelty' needs a trunk with an activation ({', '.join(ACTIVATIONS)})")
    hooks = [module.register_forward_hook(lambda _, __, output: hidden.append(output)) for module in found]
    trunk.eval()
    parts = []
    try:
        with torch.no_grad():
            for start in range(0, len(batches), _BLOCK):
                hidden.clear()
                rows = np.arange(start, min(start + _BLOCK, len(batches)))
                trunk(torch.from_numpy(batches.dense(rows)[0]).reshape(-1, *cut_shape))
                parts.append(torch.cat([_pooled(h) for h in hidden], dim=1).numpy().astype(np.float64))
    finally:
        for hook in hooks:
            hook.remove()
    return np.concatenate(parts)


def _pooled(hidden: Tensor) -> Tensor:
    flat = hidden.flatten(2) if hidden.ndim > 2 else hidden.unsqueeze(2)  # (records, channels, places)
    return torch.cat([flat.mean(dim=2), flat.amax(dim=2)], dim=1)


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

    mean: Features
    whitening: Features

    @classmethod
    def of(cls, training: Features, recordings: IntArray) -> "Space":
        """Fit to the training records' features ``(records, features)`` and which recording each is of."""
        scale = training.std(axis=0) + _LEAST
        _, which = np.unique(recordings, return_inverse=True)
        within = (training - _means(training, which)[which]) / scale
        covariance = within.T @ within / len(within)
        even = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        values, vectors = np.linalg.eigh((1 - _SHRINKAGE) * covariance + _SHRINKAGE * even)
        return cls(training.mean(axis=0), vectors / np.sqrt(np.maximum(values, _LEAST**2)) / scale[:, None])

    def units(self, found: Features) -> Features:
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

    centres: Features
    spreads: Features

    @classmethod
    def of(cls, units: Features, recordings: IntArray) -> "Normal":
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

    def scores(self, units: Features) -> Features:
        """Return each record's squared distance to the nearest recording, in units of its spread: larger is newer.

        >>> Normal(np.array([[1.0, 0.0]]), np.array([0.5])).scores(np.array([[1.0, 0.0], [0.0, 1.0]]))
        array([0., 4.])
        """
        squares = np.square(units).sum(axis=1)[:, None] + np.square(self.centres).sum(axis=1)
        return np.asarray((np.maximum(squares - 2 * units @ self.centres.T, 0) / self.spreads).min(axis=1))

    def episode_score(self, units: Features) -> float:
        """Return how new an episode of consecutive records is: the mean's score, so that what varies cancels out.

        An episode's scores are smaller than a record's, the more so the longer it is.
        """
        return float(self.scores(units.mean(axis=0, keepdims=True))[0])


def _means(rows: Features, which: IntArray) -> Features:
    return np.stack([rows[which == r].mean(axis=0) for r in range(int(which.max(initial=-1)) + 1)] or [rows[:0].sum(0)])
