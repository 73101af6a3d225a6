"""Array types, bitmaps, sums of groups."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.errors import DataError


def unpack_bitmap(bitmap: NDArray[np.uint8], width: int) -> NDArray[np.bool_]:
    """Return the pattern ``(records, width)`` of a bitmap."""
    return np.unpackbits(bitmap, axis=1, count=width, bitorder="little").view(np.bool_)


IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


def finite(array: NDArray[Any], name: str, where: str) -> FloatArray:
    """Return a user's array as float32.

    Parameters
    ----------
    array : array
    name : str
        What the array is called in the error.
    where : str
        What the error begins with, such as a file.

    Raises
    ------
    DataError
        If it holds anything but finite numbers; without one of its values.
    """
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where}: {name} must hold numbers, got dtype {array.dtype.name}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, which is refused below
        converted = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(converted).all():
        raise DataError(f"{where}: {name} holds NaN, infinity or numbers beyond float32")
    return converted


def sum_groups(counts: IntArray, lengths: IntArray) -> IntArray:
    """Sum ``counts`` over consecutive groups of the given ``lengths``."""
    ends = np.concatenate([[0], np.cumsum(counts)])
    stops = np.cumsum(lengths)
    return np.asarray(ends[stops] - ends[stops - lengths], dtype=np.int64)
