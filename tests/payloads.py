"""Releases, uploads and cut gradients for tests, drawn at random or made by hand."""

import numpy as np

from fedsplit.common.arrays import sum_groups
from fedsplit.release.admitted import unguarded
from fedsplit.release.kept import Kept
from fedsplit.release.policies import Bits
from fedsplit.wire.exchange import CutGradients, Download, Gradients, Upload, weights_digest
from fedsplit.wire.ledger import Ledger
from fedsplit.wire.release import Release

PARAMETERS = 5


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def some_ids(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.sort(rng.choice(1000, count, replace=False)).astype(np.int64)


def some_kept(rng: np.random.Generator, records: int, width: int, keep: float = 0.4, bits: int = 0) -> Kept:
    """Outputs of very different sizes; with ``bits`` the levels of a relu's."""
    x = (rng.normal(size=(records, width)) * 10.0 ** rng.integers(-9, 9, (records, 1))).astype(np.float32)
    if bits:
        x = Bits(bits).coded(np.maximum(x, 0))
    return Kept.of(x, rng.random((records, width)) < keep, zeros_count=not bits)


def some_release(
    rng: np.random.Generator,
    records: list[int],
    width: int,
    dtype: str,
    targets: str = "classes",
    keep: float = 0.4,
    bits: int = 0,
) -> Release:
    n = sum(records)
    y = {
        "classes": rng.integers(0, 5, n),
        "column": rng.normal(size=n).astype(np.float32),
        "columns": rng.normal(size=(n, 2)).astype(np.float32),
    }[targets]
    kept = some_kept(rng, n, width, keep, bits)
    return Release.pack(unguarded(kept, "test"), some_ids(rng, len(records)), ints(*records), y, dtype, bits)


def nothing_but(release: Release, parameters: int = PARAMETERS) -> Upload:
    nothing = Gradients(ints(), ints(), np.zeros((0, parameters)))
    return Upload(release, nothing, ints(), ints(), np.zeros((0, 3), np.int64), Ledger(*[0.0] * 8))


def ones_for(upload: Upload, download: Download) -> CutGradients:
    """Cut gradients of 1 for all that was released."""
    released = upload.release
    lengths = sum_groups(released.counts, released.records)
    values = np.ones(int(lengths.sum()), np.float32)
    digest = weights_digest(download.weights)
    return CutGradients.pack(download.round_number, digest, released.devices, lengths, values, "float32")
