"""What releases tell of records, exactly: which coordinates they determine (arXiv 1711.07520 only counts equations).

Every kept output is a linear equation in its record. Coordinate j of the record is exactly determined iff its
*leverage* in the kept rows of the first layer, the j-th diagonal element of the projector on their span, is 1; below 1
it is the share of the coordinate's variance (white prior) that is known. Leverages sum to the rank. Scaling a row does
not change what it tells: ranks are taken of rows of norm 1, so that tiny rows do not pass for none.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsplit.common.arrays import IntArray
from fedsplit.model.kinds.base import double
from fedsplit.model.layer import FirstLayer

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
_DENSE = 20_000_000  # largest matrix that is held: 160 MB
_BLOCK = 2**21  # numbers that are worked on at once; more no longer fit the caches
_EXACT = 1e-6  # a leverage this close to 1 counts as 1


class LayerMap:
    """The linear map of a first layer on flat records, without its bias; held as a matrix only where that is small.

    Parameters
    ----------
    layer : FirstLayer
    weights : Mapping[str, array]
        The layer's parameters by name; computed with in float64.

    Attributes
    ----------
    n, width : int
        Coordinates of a record, outputs of the layer.
    """

    def __init__(self, layer: FirstLayer, weights: Mapping[str, NDArray[np.floating]]) -> None:
        self.layer = layer
        self.n = math.prod(layer.input_shape)
        self.width = layer.width
        self._linear = layer.kind.linear({name: double(w) for name, w in weights.items()})

    def apply(self, x: NDArray[np.floating]) -> Array:
        """Return the outputs ``(records, width)`` of records ``(records, n)``, float64."""
        inputs = double(x).reshape(-1, *self.layer.input_shape)
        outputs = self.layer.kind.apply(self._linear, inputs)
        return np.asarray(outputs.reshape(len(inputs), self.width).numpy())

    def transpose(self, u: NDArray[np.floating]) -> Array:
        """Return the transposed map ``(records, n)`` of ``u`` ``(records, width)``, float64."""
        d = double(u).reshape(-1, *self.layer.cut_shape)
        x = self.layer.kind.transpose(self._linear, d)
        return np.asarray(x.reshape(len(d), self.n).numpy())

    def rows(self, index: IntArray) -> Array:
        """Return some rows ``(k, n)`` of the map's matrix, float64."""
        return self._matrix[index] if self.width * self.n <= _DENSE else self._built(index)

    @cached_property
    def norms(self) -> Array:
        """Norm of every row, float64 ``(width,)``."""
        return np.asarray(self.layer.kind.norms(self._linear).reshape(-1).numpy())

    @cached_property
    def kernels(self) -> Array:
        """The distinct rows without what is zero by construction, float64 ``(rows, numbers)``."""
        return np.asarray(self.layer.kind.kernels(self._linear).numpy())

    @cached_property
    def name(self) -> bytes:
        """Equal only for equal rows."""
        return b"".join(parameter.numpy().tobytes() for parameter in self._linear.values())

    @cached_property
    def _matrix(self) -> Array:
        return self._built(np.arange(self.width))

    def _built(self, index: IntArray) -> Array:
        parts = np.array_split(index, 1 + len(index) * self.width // _BLOCK)
        return np.concatenate([self.transpose(np.equal.outer(part, np.arange(self.width))) for part in parts])


Release = tuple[LayerMap, Mask]
"""A layer's map, and the outputs kept of each record: ``(records, width)``."""


def leverage(rows: NDArray[np.floating]) -> tuple[int, Array]:
    """Return the rank of some rows ``(k, n)`` and the leverage in them of every coordinate, float64 ``(n,)`` in 0..1.

    >>> leverage(np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 5.0]]))[1].round(6)
    array([0.5, 0.5, 1. ])
    """
    ranks, bases = bases_of(double(rows)[None])
    return int(ranks[0]), _leverages(bases)[0]


def null_probe(
    maps: Sequence[LayerMap],
    masks: Sequence[Mask],
    *,
    probes: int = 8,
    iterations: int = 2000,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> tuple[Array, bool]:
    """Estimate one record's leverages without its rows: Gaussian probes are projected on the rows' null space (CGLS).

    A determined coordinate is 0 in every projection, any other almost surely in none: one probe tells them apart.
    Leverages below 1 are only estimates, and the largest of many errs upwards.

    Parameters
    ----------
    maps, masks : Sequence of LayerMap and of bool arrays (width,)
        The record's outputs kept under each map.
    tolerance : float
        Below it a projection is 0. A probe has converged when rows of norm 1 leave 1e-6 times that of it, relatively:
        less than the rounding of float32 outputs.

    Returns
    -------
    float64 array (n,), bool
        1 for determined coordinates, below 1 - 1e-6 for others; whether all probes converged (if not, ignore them).
    """
    pairs = zip(maps, masks, strict=True)
    scales = [np.divide(mask, m.norms, out=np.zeros(m.width), where=m.norms > 0) for m, mask in pairs]

    def forward(x: Array) -> Array:
        return np.concatenate([m.apply(x) * s for m, s in zip(maps, scales, strict=True)], axis=1)

    def back(u: Array) -> Array:
        parts = np.split(u, np.cumsum([m.width for m in maps])[:-1], axis=1)
        return np.asarray(sum(m.transpose(p * s) for m, s, p in zip(maps, scales, parts, strict=True)))

    def squares(x: Array) -> Array:
        return np.asarray(np.square(x).sum(axis=1, keepdims=True))

    g = np.random.default_rng(seed).standard_normal((probes, maps[0].n))
    v, left = g.copy(), forward(g)
    step = back(left)
    size, goal, tiny = squares(step), (1e-6 * tolerance) ** 2 * squares(left), np.finfo(np.float64).tiny
    for _ in range(iterations):
        if (squares(left) <= goal).all():
            break
        change = forward(step)
        rate = size / np.maximum(squares(change), tiny)
        v -= rate * step
        left -= rate * change
        slope = back(left)
        before, size = size, squares(slope)
        step = slope + size / np.maximum(before, tiny) * step
    known, unknown = np.square(g - v).sum(axis=0), np.square(v).sum(axis=0)  # of means h and 1 - h, and independent
    estimate = np.minimum(known / (known + unknown), 1 - 2 * _EXACT)
    estimate[np.abs(v).max(axis=0) < tolerance] = 1
    return estimate, bool((squares(forward(v)) <= 4 * goal).all())  # not of ``left``: rounding adds up in it


@dataclass(frozen=True)
class Coordinates:
    """What releases tell of the coordinates of some records; every field an array ``(records,)``.

    Attributes
    ----------
    equations, rank : int64
        Outputs kept, and independent ones among them (estimated where the rows were not held).
    largest, mean : float64
        Of the record's leverages.
    determined : float64
        Share of the coordinates that are exactly determined.
    converged : bool
        False where a null probe did not converge: such a record counts as determined.
    """

    equations: IntArray
    rank: IntArray
    largest: Array
    mean: Array
    determined: Array
    converged: Mask


def coordinates(releases: Sequence[Release], *, probes: int = 8, iterations: int = 2000, seed: int = 0) -> Coordinates:
    """Return what is known of each record from all its releases together.

    It is exact where a record's rows have at most 2e7 elements, and :func:`null_probe` estimates it otherwise.

    Parameters
    ----------
    releases : sequence of Release
        All list the same records.
    probes, iterations : int
        Of :func:`null_probe`.
    seed : int
        Of the probes.
    """
    maps, kept, alive = stacked(releases)
    n, ends = maps[0].n, np.cumsum([m.width for m in maps])[:-1]
    found = Coordinates(kept.sum(axis=1), *(np.zeros(len(kept), dtype) for dtype in "qddd?"))
    for block, k in _blocks(alive.sum(axis=1), n):
        if k * n <= _DENSE:
            ranks, bases = bases_of(gather(maps, alive[block]))
            h, converged = _leverages(bases), True
        else:
            own = np.split(alive[block[0]], ends)
            estimate, converged = null_probe(maps, own, probes=probes, iterations=iterations, seed=seed)
            h = estimate[None] if converged else np.ones((1, n))
            ranks = torch.from_numpy(h.sum(axis=1).round())
        found.rank[block], found.converged[block] = ranks.numpy(), converged
        found.largest[block], found.mean[block] = h.max(axis=1), h.mean(axis=1)
        found.determined[block] = (h > 1 - _EXACT).mean(axis=1)
    return found


def bases_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ranks ``(B,)`` of rows ``(B, k, n)`` and orthonormal bases ``(B, min(k, n), n)``, zeros at their ends.

    By Cholesky factors of Gram matrices, which must prove themselves; by singular values where they do not.
    """
    k, n = rows.shape[1:]
    if k <= n:
        gram = torch.from_numpy(np.matmul(rows.numpy(), rows.mT.numpy()))  # symmetric: numpy does half of torch's work
        norms = gram.diagonal(dim1=1, dim2=2).sqrt()[:, :, None]
        factor = torch.linalg.cholesky_ex(gram / norms / norms.mT)[0] * norms
        bases = torch.linalg.solve_triangular(factor.mT, rows.mT, upper=True, left=False).mT
        good = (torch.linalg.vector_norm(bases, dim=(1, 2)).square() - k).abs() <= 1e-10 * k  # leverages sum to k
    else:
        norms = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
        factor, info = torch.linalg.cholesky_ex((rows / norms).mT @ (rows / norms))
        diagonal = factor.diagonal(dim1=1, dim2=2)
        good = (info == 0) & (diagonal.amin(1) > 1e-5 * diagonal.amax(1))  # then of rank n
        bases = torch.eye(n, dtype=torch.float64).repeat(len(rows), 1, 1)
    ranks = torch.full((len(rows),), min(k, n))
    for b in torch.nonzero(~good).flatten().tolist():
        _, s, vt = torch.linalg.svd(rows[b] / norms[b].where(norms[b] > 0, 1), full_matrices=False)
        ranks[b] = rank_of(s, k, n)
        bases[b] = vt.where(torch.arange(len(s))[:, None] < ranks[b], 0)
    return ranks, bases


def rank_of(singular: Tensor, *shape: int) -> int:
    """Return how many singular values of a matrix of such a shape are not rounding."""
    return int((singular > singular[:1] * max(shape) * torch.finfo(torch.float64).eps).sum())


def _leverages(bases: Tensor) -> Array:
    return np.asarray(np.minimum(np.einsum("bkn,bkn->bn", bases.numpy(), bases.numpy()), 1))


def stacked(releases: Sequence[Release]) -> tuple[list[LayerMap], Mask, Mask]:
    """Return maps, the outputs kept under them side by side, and those of them whose rows are not zero.

    Releases under equal weights are joined: an output that is kept twice is one equation. Doubled rows and rows of
    zeros would also send every record the slow way of :func:`bases_of`.
    """
    joined: dict[bytes, Release] = {}
    for layer, mask in releases:
        known = joined.get(layer.name)
        joined[layer.name] = (layer, mask if known is None else mask | known[1])
    maps = [layer for layer, _ in joined.values()]
    kept = np.concatenate([mask for _, mask in joined.values()], axis=1)
    return maps, kept, kept & (np.concatenate([layer.norms for layer in maps]) > 0)


def gather(maps: list[LayerMap], kept: Mask) -> Tensor:
    """Return the rows ``(records, k, n)`` of records that keep k outputs each."""
    column = np.nonzero(kept)[1]
    rows, start = np.empty((len(column), maps[0].n)), 0
    for layer in maps:
        own = np.flatnonzero((column >= start) & (column < start + layer.width))
        rows[own] = layer.rows(column[own] - start)
        start += layer.width
    return torch.from_numpy(rows.reshape(len(kept), len(column) // len(kept), maps[0].n))


def _blocks(counts: IntArray, n: int) -> Iterator[tuple[IntArray, int]]:
    """Yield blocks of records with equally many rows, and how many."""
    for k in np.unique(counts).tolist():
        records = np.flatnonzero(counts == k)
        step = max(1, _BLOCK // max(1, k * n))
        yield from ((records[start : start + step], k) for start in range(0, len(records), step))
