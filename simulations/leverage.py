"""What the exact criterion costs, against the matrix product it cannot do without.

    python simulations/leverage.py

Leverage of every number in 256 rows of 784, beside one float32 Gram matrix of such rows and its Cholesky factor, and
the criterion over 3,000 windows of a convolution, all in one run. Prints medians and their ratio.
"""

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import nn

from fedsplit.guard.criterion import LayerMap, coordinates, leverage
from fedsplit.model.layer import FirstLayer


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(256, 784))
    single = torch.from_numpy(rows.astype(np.float32))

    def baseline() -> None:
        torch.linalg.cholesky(single @ single.T)

    pairs = [(_seconds(baseline), _seconds(lambda: leverage(rows))) for _ in range(41)][1:]
    gram, exact = (median(column) for column in zip(*pairs, strict=True))
    print(f"float32 Gram matrix and Cholesky of 256 x 784: {1e3 * gram:.2f} ms; leverage: {1e3 * exact:.2f} ms")
    print(f"ratio {median(e / g for g, e in pairs):.2f}")

    layer = FirstLayer(nn.Conv1d(6, 16, 9, 2, 4), nn.ReLU(), (6, 100))
    windows = np.zeros((3000, layer.width), dtype=bool)
    for window in windows:
        window[rng.permutation(layer.width)[:48]] = True
    weights = LayerMap(layer, layer.initial_weights())
    print(f"3,000 windows of 600 numbers, 48 outputs each: {_seconds(lambda: coordinates([(weights, windows)])):.1f} s")


if __name__ == "__main__":
    main()
