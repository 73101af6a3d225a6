"""Statistics of repetitions: means, their intervals, medians."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and the half width of its 95 % interval by Student's t (NaN for a single value)."""
    from scipy.stats import t  # takes a second to import

    if len(values) < 2:
        return mean(values), math.nan
    return mean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def between(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Return the mean as text, with the half width of its 95 % interval where values differ.

    >>> between([0.5, 0.7])
    '0.600 ± 1.271'
    >>> between([0.5])
    '0.500'
    """
    middle, half = interval(values)
    return f"{middle:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if half > 1e-6 else "")


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean and the standard deviation as text.

    >>> spread([0.5, 0.7, 0.9])
    '0.700 ± 0.200'
    """
    return f"{mean(values):.{digits}f} ± {stdev(values) if len(values) > 1 else 0.0:.{digits}f}"


def medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median over rows of each of their figures."""
    return {name: median(row[name] for row in rows) for name in rows[0]}


def by(rows: Iterable[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Return rows that share the values of some keys, by these values, in the order in which they first come."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found
