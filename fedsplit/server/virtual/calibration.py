"""How long one core of this machine needs for a record's part of the first layer's work."""

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from fedsplit.common.arrays import unpack_bitmap
from fedsplit.guard.releaser import Releaser
from fedsplit.model.layer import FirstLayer
from fedsplit.release.making import Chunk
from fedsplit.release.policy import Policy

_RECORDS, _REPEATS = 256, 7


def record_seconds(layer: FirstLayer, dropping: Policy, dtype: str) -> tuple[float, float]:
    """Time a device's real work on random records, on one core.

    Parameters
    ----------
    layer : FirstLayer
    dropping : Policy
    dtype : str
        The wire's type of a value.

    Returns
    -------
    tuple of float
        Seconds of a record, to three digits: to release it (outputs, dropping, packing), and for its gradient.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((_RECORDS, *layer.input_shape), dtype=np.float32)
    index = np.arange(_RECORDS)
    chunk = Chunk(np.array([0]), np.array([_RECORDS]), index, index[:, None], x, np.zeros(_RECORDS, np.int64))
    weights = layer.flatten(layer.initial_weights())

    releaser = Releaser(layer, dropping, dtype, lambda _: bytes(32))
    kept = releaser.make(chunk, weights, 1, "calibration", want_slopes=True).outputs.kept

    def release() -> None:
        made = releaser.make(chunk, weights, 1, "calibration", want_slopes=True)
        releaser.pack_unguarded(made, "calibration")

    def gradient() -> None:
        dense = np.zeros(_RECORDS * layer.width, dtype=np.float32)
        dense[np.flatnonzero(unpack_bitmap(kept.bitmap, layer.width))] = kept.values
        layer.gradient(x, dense.reshape(-1, *layer.cut_shape))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _seconds(release), _seconds(gradient)
    finally:
        torch.set_num_threads(threads)


def _seconds(work: Callable[[], None]) -> float:
    work()
    found = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return float(f"{median(found) / _RECORDS:.3g}")
