"""What the exact criterion costs, against the matrix product it cannot do without.

    python -m simulations leverage

Leverage of every number in 256 rows of 784, beside one float32 Gram matrix of such rows and its Cholesky factor, and
the criterion over 3,000 windows of a convolution, all in one run.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import nn

from fedsplit.guard.criterion import LayerMap, coordinates, leverage
from fedsplit.model.layer import FirstLayer
from simulations.shared.options import option
from simulations.shared.results import Results
from simulations.shared.tables import markdown, page


@dataclass(frozen=True)
class Options:
    """How often, and how many windows."""

    repeats: int = option(40, quick=5)
    windows: int = option(3000, quick=300)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def study(options: Options) -> Results:
    """Return the seconds of both in pairs, and of the windows."""
    rng = np.random.default_rng(0)
    return {"pairs": _pairs(rng, options.repeats), "windows": _windows(rng, options.windows)}


def _pairs(rng: np.random.Generator, repeats: int) -> list[tuple[float, float]]:
    """Return the seconds of the product and of the criterion, in turns, without the first."""
    rows = rng.normal(size=(256, 784))
    single = torch.from_numpy(rows.astype(np.float32))

    def baseline() -> None:
        torch.linalg.cholesky(single @ single.T)

    return [(_seconds(baseline), _seconds(lambda: leverage(rows))) for _ in range(repeats + 1)][1:]


def _windows(rng: np.random.Generator, count: int) -> float:
    """Return the seconds of the criterion over windows of a convolution, 48 outputs each."""
    layer = FirstLayer(nn.Conv1d(6, 16, 9, 2, 4), nn.ReLU(), (6, 100))
    windows = np.zeros((count, layer.width), dtype=bool)
    for window in windows:
        window[rng.permutation(layer.width)[:48]] = True
    weights = LayerMap(layer, layer.initial_weights())
    return _seconds(lambda: coordinates([(weights, windows)]))


def tables(results: Results) -> str:
    """Return medians, and the median ratio."""
    gram, exact = (1e3 * median(column) for column in zip(*results["pairs"], strict=True))
    ratio = median(own / product for product, own in results["pairs"])
    windows = f"{results['options']['windows']:,} windows of 600 numbers, 48 outputs each"
    rows = [
        ("float32 Gram matrix and Cholesky of 256 x 784", f"{gram:.2f} ms"),
        ("leverage of the same", f"{exact:.2f} ms"),
        (windows, f"{results['windows']:.1f} s"),
    ]
    return page(markdown(("", "time"), rows), f"Ratio of the first two: {ratio:.2f}")
