"""Windows of recordings: the records that a network learns from."""

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.data.recordings import Recording
from fedsplit.data.records import IndexArray
from fedsplit.data.resampling import UNLABELLED, Labels


@dataclass(frozen=True)
class Windows:
    """Windows of one recording, in order of time.

    Attributes
    ----------
    x : float32 array (windows, channels, samples)
        In the recording's units.
    y : int64 array (windows,) or None
        None if the recording has no labels.
    segments : int64 array (windows, segments of each) or None
        As in :class:`fedsplit.data.Records`, from 0 on; None if windows do not overlap.
    starts : int64 array (windows,)
        The place of each window's first sample.
    times : float64 array (windows,)
        When each is complete, in seconds after the recording's first sample: what replays a recording waits for it.
    left_out : dict of str to int
        How many windows are not here, by reason: ``gaps``, ``labels``.
    """

    x: NDArray[np.float32]
    y: IndexArray | None
    segments: IndexArray | None
    starts: IndexArray
    times: NDArray[np.float64]
    left_out: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    def take(self, chosen: NDArray[np.bool_]) -> Self:
        """Return the windows where ``chosen`` is true."""
        y, segments = (None if each is None else each[chosen] for each in (self.y, self.segments))
        return type(self)(self.x[chosen], y, segments, self.starts[chosen], self.times[chosen])

    def split(self, border: int) -> tuple[Self, Self]:
        """Return the windows that end before a sample, and those that begin at it or later; others are in neither."""
        return self.take(self.starts + self.x.shape[2] <= border), self.take(self.starts >= border)


def cut(recording: Recording, seconds: float, stride: float, *, events: bool = False) -> Windows:
    """Cut a recording into windows that begin every ``stride`` seconds, from its first sample on.

    Parameters
    ----------
    recording : Recording
    seconds, stride : float
        Whole numbers of samples.
    events : bool
        How a window's label comes from those of its samples. False: the one that more than half of them have. True:
        the highest one that any has, if it is above 0; or 0 if all have it.

    Raises
    ------
    ConfigError
        If a length is not a whole number of samples.
    DataError
        If the recording is shorter than a window.

    Notes
    -----
    Windows with a sample in a gap (NaN) are left out, and so are those without a label, where there are labels.
    """
    length, step = (
        whole_samples(name, value, recording.rate) for name, value in (("seconds", seconds), ("stride", stride))
    )
    if recording.samples < length:
        has = recording.samples / recording.rate
        raise DataError(f"{recording.path}: has {has:.4g} s, which is shorter than a window of {seconds:g} s")
    starts = np.arange(0, recording.samples - length + 1, step)
    whole = _sums(np.isnan(recording.values.sum(axis=0)), starts, length) == 0
    y = None if recording.labels is None else _labels(recording.labels, starts, length, events)
    labelled = np.ones(len(starts), bool) if y is None else y != UNLABELLED
    kept = whole & labelled
    cuts = np.lib.stride_tricks.sliding_window_view(recording.values, length, axis=1)  # (channels, samples, length)
    return Windows(
        x=np.ascontiguousarray(cuts[:, starts[kept]].swapaxes(0, 1)),
        y=None if y is None else y[kept],
        segments=_segments(length, step, np.flatnonzero(kept)) if step < length else None,
        starts=starts[kept],
        times=(starts[kept] + length) / recording.rate,
        left_out={"gaps": int((~whole).sum()), "labels": int((whole & ~labelled).sum())},
    )


def whole_samples(name: str, seconds: float, rate: float) -> int:
    """Return how many samples a time has.

    Parameters
    ----------
    name : str
        What the time is called in the error.
    seconds : float
    rate : float
        In Hz.

    Raises
    ------
    ConfigError
        If that is not a whole number above 0.

    Examples
    --------
    >>> whole_samples("stride", 0.5, 50.0)
    25
    """
    samples = seconds * rate
    if not 1 <= round(samples) < 2**31 or abs(samples - round(samples)) > 1e-6 * samples:
        raise ConfigError(f"{name} must be a whole number of samples, got {seconds:g} s of {rate:g} Hz: {samples:g}")
    return round(samples)


def _segments(length: int, step: int, numbers: IndexArray) -> IndexArray:
    """Number the pieces of windows: the samples between two borders of any windows, which are always used together.

    Each step has one piece, or two if windows end within a step.
    """
    each = 2 if length % step else 1
    pieces = each * (length // step) + (each - 1)
    return each * numbers[:, None] + np.arange(pieces)


def _labels(labels: Labels, starts: IndexArray, length: int, events: bool) -> IndexArray:
    found = np.full(len(starts), UNLABELLED)
    for number in np.unique(labels[labels != UNLABELLED]):  # ascending
        count = _sums(labels == number, starts, length)
        needed = (1 if number else length) if events else length // 2 + 1
        found[count >= needed] = number
    return found


def _sums(each: NDArray[Any], starts: IndexArray, length: int) -> IndexArray:
    """Return how many of each window's samples are true."""
    before = np.concatenate([[0], np.cumsum(each, dtype=np.int64)])
    return np.asarray(before[starts + length] - before[starts], np.int64)
