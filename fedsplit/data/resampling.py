"""Samples at a steady rate, from samples at any times: gaps, resampling and labels.

Resampling is interpolation with a windowed sinc (Kaiser window), which also keeps out what the lower rate cannot hold.
It takes any ratio of rates. Its limits: frequencies up to 0.42 of the lower of both rates keep their amplitude to 1e-3,
those from 0.5 on are reduced to 1e-3 or less, those between are reduced in part. Within 32 samples (of the lower rate)
of a recording's or gap's end it has to assume how the signal goes on, and is less exact. Source: J. O. Smith,
"Digital Audio Resampling Home Page", https://ccrma.stanford.edu/~jos/resample/.
"""

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.errors import DataError

FloatArray = NDArray[np.float64]
Labels = NDArray[np.int16]

UNLABELLED = -1
MOST_GAP = 86400.0  # seconds: longer ones are clocks that jump, or recordings that should be several files

_LOBES = 32  # zero crossings of the sinc on each side
_BETA = 7.857  # of the Kaiser window: 80 dB
_CUT = 0.4608  # of the lower rate: with this window the transition ends at a half
_STEADY = 0.5  # samples within which times may lie of even ones, from the earliest to the latest
_OUTPUTS = 4096  # resampled at a time


def native_rate(times: FloatArray, where: str) -> float:
    """Return the sampling rate in Hz of ascending times in seconds, which may have gaps and jitter.

    Raises
    ------
    DataError
        Beginning with ``where``, if the times have no steady rate.
    """
    if len(times) < 2:
        raise DataError(f"{where} has fewer than two samples")
    intervals = np.diff(times)
    if intervals.max() > MOST_GAP:
        raise DataError(
            f"{where} has a gap of {intervals.max() / 86400:.3g} days: split the recording, or mend its times"
        )
    usual = np.median(intervals)
    regular = np.abs(intervals - usual) < usual / 2
    if regular.mean() < 0.5:
        raise DataError(f"{where} has no steady sampling rate: its times are too irregular")
    return float(1 / intervals[regular].mean())


def on_grid(
    times: FloatArray, values: FloatArray, *, native: float, start: float, rate: float, count: int, fill: float
) -> NDArray[np.float32]:
    """Return values at ``start + i / rate``, i in 0..count-1; NaN where there are none.

    Parameters
    ----------
    times, values : float64 arrays (samples,)
        Seconds, ascending, and finite numbers.
    native : float
        Their rate, as :func:`native_rate` finds it.
    start, rate, count : float, float, int
        Of the grid.
    fill : float
        The longest time in seconds between two samples that is bridged by a straight line. Missing fewer than half a
        sample is no gap.

    Notes
    -----
    Between gaps, times that deviate from even ones by less than a quarter of a sample are taken as even: recorders
    round and delay times more than they vary their sampling. Where they deviate by more they are believed, and the
    values are first interpolated linearly.
    """
    grid = np.full(count, np.nan, np.float32)
    gaps = np.flatnonzero(np.diff(times) > max(fill, 1.5 / native) * (1 + 1e-9)) + 1
    end = -1  # of the run before
    for first, last in zip([0, *gaps], [*gaps, len(times)], strict=True):
        steady, own = _steady(times[first:last] - times[first], values[first:last], native, rate)
        run = resample(steady, own, rate)
        place = int(np.rint((times[first] - start) * rate))
        run = run[: count - place]
        grid[place : place + len(run)] = run
        if place <= end:  # a gap shorter than a sample of the grid is one still
            grid[place] = np.nan
        end = place + len(run)
    return grid


def labels_on_grid(times: FloatArray, labels: Labels, *, start: float, rate: float, count: int) -> Labels:
    """Return the labels on an even grid of times.

    A time of the grid has the highest label of the samples that fall there. If none does, it has the label of the
    sample before.

    Parameters
    ----------
    times : float64 array (samples,)
        Ascending.
    labels : Labels (samples,)
    start : float
        The grid's first time.
    rate : float
        Times of the grid per second.
    count : int
        Times of the grid.
    """
    before = np.searchsorted(times, start + np.arange(count) / rate + 1e-9, side="right") - 1
    grid = labels[np.maximum(before, 0)]
    places = np.rint((times - start) * rate).astype(np.int64)
    inside = (places >= 0) & (places < count)
    np.maximum.at(grid, places[inside], labels[inside])
    return grid


def resample(values: FloatArray, source: float, rate: float) -> FloatArray:
    """Return evenly spaced values at another rate, from the first one to at most the last.

    Parameters
    ----------
    values : float64 array (samples,)
        Finite.
    source, rate : float
        In Hz; equal ones return the values as they are. The module's text has the limits.
    """
    if source == rate or len(values) < 2:
        return values
    scale = min(rate / source, 1.0)  # the lower rate, in samples of the source
    half = int(np.ceil(_LOBES / scale))
    # beyond its ends the signal goes on as its mirror image, turned by 180 degrees: level and slope do not jump
    padded: FloatArray = np.pad(values, half, mode="reflect", reflect_type="odd")
    taps = np.lib.stride_tricks.sliding_window_view(padded, 2 * half)
    outputs = np.arange(int((len(values) - 1) / source * rate + 1e-9) + 1)
    return np.concatenate(
        [
            _weighted(taps, outputs[i : i + _OUTPUTS].astype(np.float64) * (source / rate), half, scale)
            for i in range(0, len(outputs), _OUTPUTS)
        ]
    )


def _weighted(taps: FloatArray, places: FloatArray, half: int, scale: float) -> FloatArray:
    """Return the values at some places, counted in samples of the source."""
    whole = np.floor(places + 1e-9).astype(np.int64)
    phases, which = np.unique(np.round(places - whole, 9), return_inverse=True)
    away = phases[:, None] - np.arange(1 - half, half + 1)  # (phases, taps): in samples of the source
    inside = np.clip(1 - (away / half) ** 2, 0, None)
    weights = np.sinc(2 * _CUT * scale * away) * np.i0(_BETA * np.sqrt(inside))
    weights /= weights.sum(axis=1, keepdims=True)  # a constant stays one
    return np.asarray(np.einsum("ot,ot->o", taps[whole + 1], weights[which]), np.float64)


def _steady(times: FloatArray, values: FloatArray, native: float, rate: float) -> tuple[FloatArray, float]:
    """Return a run's values at even times, and their rate: the wanted one if they fit it."""
    places = np.concatenate([[0.0], np.cumsum(np.maximum(1, np.rint(np.diff(times) * native)))])
    centred = places - places.mean()
    fitted = float(centred @ centred / (centred @ times)) if len(times) > 1 else native
    for own in (rate, fitted):
        if np.ptp(times * own - places) < _STEADY:
            break
    else:
        own, places = native, times * native
    return np.interp(np.arange(int(places[-1] + 1e-9) + 1), places, values), own
