"""What several tests of guard build."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fedsplit.guard.accountant import Cost, ExposureAccountant

OWNER = b"o" * 32
FIELDS = ("releases", "equations", "bits", "gradient", "precision", "fisher", "leverage")


@contextmanager
def new_ledger() -> Iterator[ExposureAccountant]:
    with TemporaryDirectory() as folder:
        yield ExposureAccountant.create(Path(folder) / "ledger.npz", OWNER)


def name_of(number: int) -> bytes:
    return number.to_bytes(32, "little")


def windows(records: int, pieces: int) -> np.ndarray:
    """Records that are made of consecutive pieces, each shared with its neighbours; device 3."""
    return (3 << 32) | (np.arange(records)[:, None] + np.arange(pieces))


def costs(rng: np.random.Generator, count: int) -> Cost:
    """Whole numbers, also in the floats, so that sums do not depend on their order."""
    return Cost(
        equations=rng.integers(0, 9, count),
        bits=rng.integers(0, 99, count),
        gradient=rng.integers(0, 5, count).astype(float),
        precision=rng.choice([0.0, 4.0, 16.0, math.inf], count),
        fisher=rng.choice([0.0, 2.0, math.inf], count),
        leverage=rng.choice([np.nan, 0.25, 0.5, 1.0], count),
    )


def take(cost: Cost, rows: np.ndarray) -> Cost:
    return Cost(**{name: values[rows] for name, values in vars(cost).items()})


Step = tuple[np.ndarray, int, Cost]


@st.composite
def histories(draw: st.DrawFn) -> tuple[np.ndarray, list[Step]]:
    """Segments of some records, and releases of some of them under some names."""
    records, pieces = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps = []
    for _ in range(draw(st.integers(0, 6))):
        rows = np.flatnonzero(rng.random(records) < 0.6)
        steps.append((rows, int(rng.integers(0, 4)), costs(rng, len(rows))))
    return windows(records, pieces), steps


def play(accountant: ExposureAccountant, segments: np.ndarray, steps: list[Step]) -> None:
    for rows, name, cost in steps:
        fresh = accountant.is_new(rows, name_of(name))
        accountant.step(rows[fresh], segments[rows[fresh]], name_of(name), take(cost, fresh))


def ledgers(accountant: ExposureAccountant) -> dict[int, list[Any]]:
    """All ledgers; NaN, which equals nothing, as text."""
    return {
        name: [repr(v) if v != v else v for v in (getattr(spent, field) for field in FIELDS)]
        for name, spent in accountant.rows()
    }
