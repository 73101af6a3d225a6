"""Forecasts without any network: constants, and linear models of whole windows."""

from collections.abc import Callable

import numpy as np

from simulations.forecast.data import Float, Pigs, Whose, overlapping
from simulations.forecast.report import LINEAR

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FOLDS = 6
Model = Callable[[Float], Float]


def ridge(x: Float, y: Float, whose: Whose) -> Model:
    """Return a linear model whose ridge was chosen by leaving out a sixth of the individuals at a time."""
    left_out = [np.isin(whose, fold) for fold in np.array_split(np.unique(whose), FOLDS)]

    def error(size: float) -> float:
        squares = (np.square(_ridge(x[~out], y[~out], size)(x[out]) - y[out]).sum() for out in left_out)
        return float(sum(squares))

    return _ridge(x, y, min(RIDGES, key=error))


def _ridge(x: Float, y: Float, size: float) -> Model:
    centre, level = x.mean(axis=0), y.mean()
    a = x - centre
    slope = np.linalg.solve(a.T @ a / len(a) + size * np.eye(a.shape[1]), a.T @ (y - level) / len(a))
    return lambda new: (new - centre) @ slope + level


def without_privacy(pigs: Pigs) -> dict[str, Float]:
    """Return forecasts of the pigs held out that no seed changes."""
    count, found = len(pigs.test), {}
    for name, records, whose in (
        (LINEAR, pigs.train, pigs.trained),
        ("ridge, all windows", *overlapping(np.unique(pigs.trained))),
    ):
        x, y, new = (values.astype(np.float64) for values in (records.x[:, 0], records.y[:, 0], pigs.test.x[:, 0]))
        found[name] = ridge(x, y, whose)(new)
    return {"persistence": np.zeros(count), "mean change": np.full(count, pigs.train.y.mean()), **found}
