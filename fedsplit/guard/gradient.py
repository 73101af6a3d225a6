"""What sums of first-layer gradients tell of records, alone and together with released activations.

The server knows the deltas D (each record's gradient at the pre-activations), so that ``dW = D' X`` is a linear system
in the records X: a record is handed back exactly iff its leverage in D is 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsplit.guard.criterion import Array, LayerMap, Mask, bases_of, gather, rank_of, stacked
from fedsplit.model.kinds.base import double

_SMALL = 1e-12  # squared sine of the angle below which a gradient's equation adds nothing to the activations'


def record_leverage(delta: NDArray[np.floating], ridge: float = 0.0) -> Array:
    """Return how much a sum of a dense layer's gradients tells of each record: float64 ``(N,)`` in 0..1.

    The sum is ``delta' X``, and record i is handed back exactly iff ``d_i (delta' delta)^+ d_i'`` is 1. Deltas are
    taken as exact: directions that only their rounding made count too, which errs on the safe side.

    Parameters
    ----------
    delta : array (N, m)
        Each record's gradient at the pre-activations; several releases over the same records side by side.
    ridge : float
        Added to ``delta' delta``: variance of the noise on the sum over that of a coordinate.
    """
    u, s = _column_space(double(delta), scale=ridge == 0)
    return np.asarray((u.square() @ (s.square() / (s.square() + ridge))).clamp(0, 1).numpy())


@dataclass(frozen=True)
class Joint:
    """What activations and sums of first-layer gradients over the same N records tell of them together.

    Attributes
    ----------
    share : float
        Equations of both over unknowns; k/n + r/N for a dense layer. From 1 on everything is determined, generically.
    largest : float
        Convolution: largest leverage of any coordinate in all equations together. Linear: largest of ``leverage``.
    leverage : float64 array (N,)
        :func:`record_leverage` in the gradients alone; of a record with several positions, the largest of these.
    rank : int
        Row rank r of the gradients: of the deltas side by side, for a convolution unfolded over positions.
    """

    share: float
    largest: float
    leverage: Array
    rank: int


def joint(
    layer: LayerMap, deltas: Sequence[NDArray[np.floating]], kept: Sequence[Mask], maps: Sequence[LayerMap] = ()
) -> Joint:
    """Return what releases of N records' activations and of sums of their gradients tell together.

    Parameters
    ----------
    deltas : Sequence of arrays (N, width)
        Gradients at the pre-activations, for each sum that is released.
    kept : Sequence of bool arrays (N, width)
        Outputs kept, for each release of activations.
    maps : Sequence[LayerMap]
        The map of each release of activations; without it all are of ``layer``.
    """
    layers, outputs, alive = stacked(list(zip(maps or [layer] * len(kept), kept, strict=True)))
    spread = torch.cat([layer.layer.kind.spread(double(delta)) for delta in deltas], dim=-1)
    groups, records, positions, _ = spread.shape
    spaces = [_column_space(rows.flatten(0, 1))[0].reshape(records, positions, -1) for rows in spread]
    alone = torch.stack([u.square().sum(-1).amax(1) for u in spaces]).amax(0).clamp(max=1).numpy()
    rank = sum(u.shape[-1] for u in spaces)
    share = (int(outputs.sum()) + rank * layer.n // (positions * groups)) / (records * layer.n)
    largest = alone.max(initial=0.0) if layer.layer.kind.dense else _largest_joint(layers, alive, spaces)
    return Joint(share, float(largest), alone, rank)


def _largest_joint(maps: list[LayerMap], alive: Mask, spaces: list[Tensor]) -> float:
    """Return the largest leverage of any coordinate of any record in all equations of a convolution together.

    The gradients' equations, made orthonormal, are the same ``spaces[g]`` ``(records, positions, r)`` for every input
    channel of group g. What they add to a record's leverages is their part outside the span of its activations' rows.
    """
    records, positions, _ = spaces[0].shape
    channels = maps[0].n // (positions * len(spaces))
    sizes = [channels * u.shape[-1] for u in spaces]

    def activations() -> Iterator[tuple[Tensor, Tensor]]:  # a basis (k, n), and the equations' parts along it
        for i in range(records):
            basis = bases_of(gather(maps, alive[i : i + 1]))[1][0]
            parts = basis.reshape(len(basis), len(spaces), channels, positions)
            yield basis, torch.cat([(parts[:, g] @ u[i]).flatten(1) for g, u in enumerate(spaces)], dim=1)

    gram = torch.eye(sum(sizes), dtype=torch.float64)
    for _, along in activations():
        gram -= along.T @ along
    # singular as a rule: a gradient of kept outputs, times their weights, is a combination of these outputs
    values, vectors = torch.linalg.eigh(gram)
    root = vectors[:, values > _SMALL] / values[values > _SMALL].sqrt()  # root root' = gram^+
    largest = 0.0
    for i, (basis, along) in enumerate(activations()):
        pieces = zip(spaces, torch.split(root, sizes), strict=True)
        parts = [u[i] @ piece.reshape(channels, u.shape[-1], root.shape[1]) for u, piece in pieces]
        added = torch.cat(parts).flatten(0, 1) - basis.T @ (along @ root)
        largest = max(largest, float((basis.square().sum(0) + added.square().sum(1)).max()))
    return min(largest, 1.0)


def _column_space(rows: Tensor, *, scale: bool = True) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors ``(N, r)`` and singular values ``(r,)`` of ``(N, m)``, columns of norm 1."""
    norms = torch.linalg.vector_norm(rows, dim=0)
    u, s, _ = torch.linalg.svd(rows / norms.where(norms > 0, 1) if scale else rows, full_matrices=False)
    rank = rank_of(s, *rows.shape)
    return u[:, :rank], s[:rank]
