"""What an attacker knows of records before and after their equations: a Gaussian for each class, within a box."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsplit.common.arrays import IntArray
from fedsplit.model.kinds.base import double

Array = NDArray[np.float64]
Floats = NDArray[np.floating]
Labels = NDArray[np.integer] | None  # None: no classes, as in regression
Rows = Sequence[Floats]  # one array per record
Noise = float | Sequence[Floats]

_FEW = 10  # public records below which a class has no mean and covariance of its own
_SHRINK = 100.0  # public records at which a class's own covariance weighs as much as the pooled one
_RIDGE = 0.02  # of the mean variance, added to every covariance
_ATOM = 0.01  # share of public records at the end of a feature's range that makes it a limit


@dataclass(frozen=True)
class Prior:
    """What public records tell of a private one.

    Attributes
    ----------
    means, covariances : float64 arrays (classes, n) and (classes, n, n)
        Of each class; covariances are shrunk towards the pooled one and positive definite.
    mean, pooled : float64 arrays (n,) and (n, n)
        The mean of all records, the covariance within classes.
    low, high : float64 arrays (n,)
        Where records lie.
    stated : bool
        Whether this box is certain, not guessed from public records.
    """

    means: Array
    covariances: Array
    mean: Array
    pooled: Array
    low: Array
    high: Array
    stated: bool

    @classmethod
    def of(cls, x: Floats, y: Labels, box: tuple[float, float] | None = None, classes: int = 1) -> "Prior":
        """Estimate from public records ``(N, n)`` and their labels ``(N,)``.

        Parameters
        ----------
        box : (low, high) or None
            As stated, such as 0 and 1 for images; None takes a feature's range, open where few records reach its end.
        classes : int
            At least so many: private records can be of classes that no public record has.
        """
        n, own, values = x.shape[1], classes_of(y, len(x)), np.asarray(x, np.float64)
        counts = np.bincount(own, minlength=classes)
        mean, means = values.mean(axis=0), class_means(values, own, len(counts))
        within, around = values - means[own], values - mean
        pooled, spread = within.T @ within / len(x), around.T @ around / len(x)
        ridge = np.eye(n) * max(_RIDGE * np.trace(pooled) / n, 1e-8)
        covariances = np.empty((len(counts), n, n))
        for c, count in enumerate(counts):
            shrunk = (within[own == c].T @ within[own == c] + _SHRINK * pooled) / (count + _SHRINK)
            covariances[c] = (shrunk if count >= _FEW else spread) + ridge
        low, high = (_limit(values), -_limit(-values)) if box is None else (np.full(n, box[0]), np.full(n, box[1]))
        return cls(means, covariances, mean, pooled + ridge, low, high, box is not None)

    @classmethod
    def blank(cls, n: int) -> "Prior":
        """Return the prior of an attacker without public records: mean 0, variance 1, no box."""
        zero, one, end = np.zeros(n), np.eye(n), np.full(n, np.inf)
        return cls(zero[None], one[None], zero, one, -end, end, False)

    def clip(self, x: Array) -> Array:
        """Bring records ``(N, n)`` into the box."""
        return np.clip(x, self.low, self.high)

    @property
    def magnitude(self) -> float:
        """The root mean square of a record's values."""
        return float(np.sqrt(np.square(self.means).mean() + np.diagonal(self.pooled).mean()))


def classes_of(labels: Labels, count: int) -> IntArray:
    """Return labels as int64; all of class 0 without any."""
    return np.zeros(count, np.int64) if labels is None else np.asarray(labels, np.int64)


def class_means(x: Array, y: IntArray, classes: int) -> Array:
    """Return the mean of each class; a class of few records gets the mean of all.

    Parameters
    ----------
    x : float64 array (records, n)
    y : int array (records,)
    classes : int

    Returns
    -------
    float64 array (classes, n)
    """
    own = [x[y == c] for c in range(classes)]
    return np.stack([(part if len(part) >= _FEW else x).mean(axis=0) for part in own])


def _limit(x: Array) -> Array:
    """Return each feature's least value ``(n,)``, -inf where hardly a record has it: others may well go below."""
    least = x.min(axis=0)
    return np.where((x == least).sum(axis=0) >= max(2.0, _ATOM * len(x)), least, -np.inf)


def equations_of(equations: tuple[Rows, Rows, Noise], i: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return record i's rows ``(k, n)``, right-hand side and noise ``(k,)``."""
    rows, rhs, noise = double(equations[0][i]), double(equations[1][i]), equations[2]
    return rows, rhs, torch.full_like(rhs, noise) if isinstance(noise, int | float) else double(noise[i])


def whiten(covariance: Tensor, rows: Tensor, left: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return V and t so that N(0, C), given ``rows x = left + noise``, is N(V't, C - V'V).

    Parameters
    ----------
    covariance : float64 Tensor (n, n)
        C.
    rows : float64 Tensor (k, n)
    left : float64 Tensor (k,)
    noise : float64 Tensor (k,)
        Its standard deviation for each equation.

    Returns
    -------
    float64 Tensor (k, n)
        V.
    float64 Tensor (k,)
        t.
    """
    cross = rows @ covariance  # (k, n)
    gram = cross @ rows.T
    floor = 1e-12 * gram.trace() / max(1, len(rows)) + 1e-30  # rows can depend on each other, or be zero
    factor = torch.linalg.cholesky(gram + torch.diag(noise.square() + floor))
    both = torch.linalg.solve_triangular(factor, torch.hstack([cross, left[:, None]]), upper=False)
    return both[:, :-1], both[:, -1]


def posterior(prior: Prior, c: int, rows: Tensor, rhs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return what equations tell of a record of a class.

    Parameters
    ----------
    prior : Prior
    c : int
        The class.
    rows : float64 Tensor (k, n)
    rhs : float64 Tensor (k,)
    noise : float64 Tensor (k,)
        Its standard deviation for each equation.

    Returns
    -------
    float64 Tensor (n,)
        The record's mean.
    float64 Tensor (k, n)
        V: the record's covariance is C - V'V.
    """
    mean = torch.from_numpy(prior.means[c])
    v, told = whiten(torch.from_numpy(prior.covariances[c]), rows, rhs - rows @ mean, noise)
    return mean + v.T @ told, v
