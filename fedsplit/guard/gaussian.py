"""Epsilon of Gaussian noise: the noise of releases adds up by its precision."""

import math


def epsilon(precision: float, delta: float) -> float:
    """Return the epsilon of Gaussian releases whose precisions add up to ``precision``.

    Releases of noise multipliers s_i compose exactly into one of 1/s^2 = sum 1/s_i^2; infinite if any had no noise.
    """
    if precision == 0 or math.isinf(precision):
        return precision
    from dp_accounting import get_epsilon_gaussian

    return float(get_epsilon_gaussian(precision**-0.5, delta))


def largest_precision(epsilon: float | None, delta: float) -> float:
    """Return the sum of precisions that :func:`epsilon` allows; without a limit anything."""
    if epsilon is None or math.isinf(epsilon):
        return math.inf
    from dp_accounting import get_sigma_gaussian

    return float(get_sigma_gaussian(epsilon, delta) ** -2)


def gaussian_precision(noise: float) -> float:
    """Return the precision of one release with noise of ``noise * clip``: replacing a record moves it by 2 clip."""
    return 4 / noise**2 if noise else math.inf
