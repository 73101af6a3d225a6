"""Records that attacks go for, and equations that they hold of them."""

import numpy as np

Known = tuple[list[np.ndarray], list[np.ndarray]]


def data(n: int = 8, count: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two classes of correlated records in 0..1, many values at the ends."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, count)
    mixing = np.random.default_rng(99).normal(size=(n, n)) / n**0.5
    x = rng.normal(size=(count, n)) @ mixing + np.where(y[:, None], 0.5, 0.2)
    return np.clip(x, 0, 1), y


def equations(x: np.ndarray, k: int, seed: int = 0) -> Known:
    rng = np.random.default_rng(seed)
    rows = [rng.normal(size=(k, x.shape[1])) for _ in x]
    return rows, [r @ record for r, record in zip(rows, x, strict=True)]
