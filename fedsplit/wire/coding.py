"""Numbers as codes: powers of two as scales, floats of half the size, codes of few bits."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray, IntArray
from fedsplit.wire.container import check

_TOP = 15  # the largest value of a chunk is scaled into [2^14, 2^15): float16 ends below 2^16


def quantise(values: FloatArray, lengths: IntArray, dtype: str) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Return the values as wire codes and one power-of-two exponent per group: value = code * 2^exponent.

    Parameters
    ----------
    values : float32 array
        The groups' values behind one another.
    lengths : int array (groups,)
    dtype : str
        ``float16`` or ``float32``; float32 is sent as it is, with exponent 0.
    """
    exponents = np.zeros(len(lengths), dtype=np.int32)
    if dtype == "float32":
        return values.astype("<f4", copy=False), exponents
    filled = np.flatnonzero(lengths)
    if len(filled):
        starts = (np.cumsum(lengths) - lengths)[filled]
        largest = np.maximum.reduceat(np.abs(values), starts)
        exponents[filled] = np.where(largest > 0, np.frexp(largest)[1] - _TOP, 0)
    return np.ldexp(values, -np.repeat(exponents, lengths)).astype("<f2"), exponents


def dequantise(codes: NDArray[Any], lengths: IntArray, exponents: NDArray[np.int32]) -> FloatArray:
    """Undo :func:`quantise`.

    Parameters
    ----------
    codes : float16 or float32 array (values,)
        The groups' codes behind one another.
    lengths : int array (groups,)
        How many codes each group has.
    exponents : int32 array (groups,)

    Returns
    -------
    float32 array (values,)

    Examples
    --------
    >>> lengths = np.array([2, 1])
    >>> codes, exponents = quantise(np.array([0.5, -2.0, 3.0], np.float32), lengths, "float16")
    >>> dequantise(codes, lengths, exponents).tolist()
    [0.5, -2.0, 3.0]
    """
    values = codes.astype(np.float32)
    return np.ldexp(values, np.repeat(exponents, lengths)) if exponents.any() else values


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack codes 1..2^bits-1 into ``bits`` bits each; one-bit codes are all 1, and need none."""
    if bits == 1:
        return np.zeros(0, dtype=np.uint8)
    planes = np.unpackbits((codes - 1)[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(planes, bitorder="little")


def unpack_codes(packed: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.uint8]:
    """Undo :func:`pack_codes`.

    Parameters
    ----------
    packed : uint8 array
    count : int
        How many codes there are.
    bits : int
        Bits of a code, in 1..8.

    Raises
    ------
    WireError
        If the array's length is not that of so many codes, or a code is too large.

    Examples
    --------
    >>> unpack_codes(pack_codes(np.array([3, 1, 2], np.uint8), bits=2), count=3, bits=2).tolist()
    [3, 1, 2]
    """
    check("codes", len(packed) == (-(-count * bits // 8) if bits > 1 else 0), f"must be {count} of {bits} bits")
    if bits == 1:
        return np.ones(count, dtype=np.uint8)
    planes = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    codes = np.packbits(planes, axis=1, bitorder="little").reshape(count)
    check("codes", not (codes == 2**bits - 1).any(), f"must be below {2**bits - 1}")
    return np.asarray(codes + 1, dtype=np.uint8)
