"""Array types, bitmaps, sums of groups."""

import numpy as np
from numpy.typing import NDArray


def unpack_bitmap(bitmap: NDArray[np.uint8], width: int) -> NDArray[np.bool_]:
    """Return the pattern ``(records, width)`` of a bitmap."""
    return np.unpackbits(bitmap, axis=1, count=width, bitorder="little").view(np.bool_)


IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


def sum_groups(counts: IntArray, lengths: IntArray) -> IntArray:
    """Sum ``counts`` over consecutive groups of the given ``lengths``."""
    ends = np.concatenate([[0], np.cumsum(counts)])
    stops = np.cumsum(lengths)
    return np.asarray(ends[stops] - ends[stops - lengths], dtype=np.int64)
