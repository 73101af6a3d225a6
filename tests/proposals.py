"""Proposals of a small layer's outputs, as the guard judges them, and its ledger."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from fedsplit.guard.accountant import Cost
from fedsplit.guard.gaussian import gaussian_precision
from fedsplit.guard.guard import Guard
from fedsplit.guard.proposal import Proposal, release_name
from fedsplit.model.layer import FirstLayer

N, WIDTH = 16, 10
OWNER = b"o" * 32
LAYER = FirstLayer(nn.Linear(N, WIDTH), nn.ReLU(), (N,))
Guards = Callable[..., Guard]


def flat(rows: np.ndarray, bias: float = 0.0) -> np.ndarray:
    """The parameters of a layer with such rows."""
    return np.concatenate([rows.ravel(), np.full(len(rows), bias)]).astype(np.float32)


def dense(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(WIDTH, N)) / 4


def first(count: int, kept: int, width: int = WIDTH) -> np.ndarray:
    """The first outputs of some records."""
    return np.tile(np.arange(width) < kept, (count, 1))


def outputs(*counts: int) -> np.ndarray:
    """The first so many outputs of each record."""
    return np.concatenate([first(1, count) for count in counts])


def release(
    kept: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    records: Any = None,
    segments: Any = None,
    owners: Any = None,
    active: Any = 0.5,
    round_number: int = 1,
    run: int = 1,
    noise: float = 0.0,
    one_bit: bool = False,
    mask_round: int = 0,
) -> Proposal:
    """Some records of device 0 (unless ``owners`` says otherwise), of which these outputs would leave."""
    count = len(kept)
    weights = flat(dense()) if weights is None else weights
    owners = np.zeros(count, np.int64) if owners is None else np.asarray(owners)
    records = owners << 32 | (np.arange(count) if records is None else np.asarray(records))
    equations = 0 if one_bit else kept.sum(axis=1)
    return Proposal(
        run=run,
        round_number=round_number,
        weights=weights,
        name=release_name(LAYER, weights, "policy", mask_round),
        owners=owners,
        records=records,
        segments=records[:, None] if segments is None else np.asarray(segments),
        bitmap=np.packbits(kept, axis=1, bitorder="little"),
        active=np.broadcast_to(np.asarray(active, float), (count,)),
        cost=Cost.of(count, equations=equations, precision=gaussian_precision(noise), leverage=np.nan),
        exact=not one_bit,
    )


def held(guards: Guards) -> dict[int, tuple[int, int]]:
    """Releases and equations of every ledger, as the file has them."""
    return {name: (spent.releases, spent.equations) for name, spent in guards().accountant.rows()}


def deltas(count: int, width: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
