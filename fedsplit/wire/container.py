"""The container that messages travel in, and the coding of values in it.

A payload is ``b"fs"``, a version byte, a kind byte, a count of arrays, a table of (dtype, axes, sizes) and the raw
little-endian arrays behind one another: no pickle, no names, no second copy.

float16 values carry one power-of-two scale per device and chunk: without it most cut gradients would become
subnormal and some flush to zero.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import IntArray
from fedsplit.common.errors import WireError

LARGEST = 1e30  # of anything that a node sends: the trunk's and the strategies' numbers are float32
VERSION = 2
MAX_DEVICES = 10_000_000
VALUE_DTYPES = ("float16", "float32")
_MAGIC = b"fs"
_DTYPES = [np.dtype(f"<{c}") for c in ("f4", "f2", "i4", "i8", "u1", "u2", "u4", "f8", "i2")]
_NAMES, _SIZES = [d.str[1:] for d in _DTYPES], [d.itemsize for d in _DTYPES]
_HEAD, _ENTRY = struct.Struct("<2sBBH"), struct.Struct("<BB")  # of a payload, and of an array in the table
_SHAPES = {1: struct.Struct("<I"), 2: struct.Struct("<2I")}


def pack_arrays(kind: int, arrays: Sequence[NDArray[Any]]) -> bytes:
    """Put some arrays of one or two axes into a payload of the given kind."""
    table = [_HEAD.pack(_MAGIC, VERSION, kind, len(arrays))]
    for array in arrays:
        code = _DTYPES.index(array.dtype.newbyteorder("<"))
        table.append(struct.pack(f"<BB{array.ndim}I", code, array.ndim, *array.shape))
    return b"".join(table + [np.ascontiguousarray(a).data.cast("B") if a.size else b"" for a in arrays])


def stack_rows(payloads: Sequence[bytes], kind: int, same: int) -> bytes:
    """Return one payload with the rows of several.

    Parameters
    ----------
    payloads : sequence of bytes
        At least one. Their tables must be equal.
    kind : int
        The kind of all payloads.
    same : int
        The first so many arrays must be equal in all payloads, and stand once in the result.

    Raises
    ------
    WireError
        If the payloads are not alike.
    """
    first = Reader(payloads[0], kind)
    start = first.offset
    rest = start + sum(_SIZES[code] * math.prod(shape) for code, shape in first.table[:same])
    size, head = len(payloads[0]), payloads[0][:rest]
    if any(len(payload) != size or payload[:rest] != head for payload in payloads):
        raise WireError("payloads are not alike")
    count, arrays = (
        len(payloads),
        [first.array("array", _NAMES[code], len(shape)) for code, shape in first.table[:same]],
    )
    rows = np.frombuffer(b"".join(payloads), dtype=np.uint8).reshape(count, size)
    for code, shape in first.table[same:]:
        stop = rest + _SIZES[code] * math.prod(shape)
        part = np.frombuffer(rows[:, rest:stop].tobytes(), _DTYPES[code])
        arrays.append(part.reshape(count * shape[0], *shape[1:]))
        rest = stop
    return pack_arrays(kind, arrays)


def check(field: str, holds: bool, rule: str) -> None:
    """Raise WireError if a rule does not hold.

    Parameters
    ----------
    field : str
        What the rule is about.
    holds : bool
    rule : str
        Follows the field in the error, as "must be positive".
    """
    if not holds:
        raise WireError(f"{field} {rule}")


def check_ids(field: str, ids: IntArray) -> None:
    """Refuse device ids that repeat, are out of order or out of range."""
    ascending = bool((np.diff(ids) > 0).all()) and (not len(ids) or 0 <= ids[0] <= ids[-1] < MAX_DEVICES)
    check(field, ascending, f"must be ascending device ids in 0..{MAX_DEVICES - 1}")


def check_scaled(codes: NDArray[Any], exponents: NDArray[np.int32]) -> None:
    """Refuse codes and exponents that do not give finite float32 values."""
    check("values", bool(np.isfinite(codes).all()), "must be finite")
    # float16 codes stay below 2^16, so 2^111 keeps every value within float32; float32 codes are the values
    low, high = (-200, 111) if codes.dtype.itemsize == 2 else (0, 0)
    check("exponents", bool(((exponents >= low) & (exponents <= high)).all()), f"must be in {low}..{high}")


class Reader:
    """Walks over a payload's arrays, checking each against what must come next.

    ``table`` holds the code and the sizes of each array, ``offset`` is where the next one begins.
    """

    def __init__(self, payload: bytes, kind: int) -> None:
        self.total = len(payload)
        self._payload = payload
        try:
            magic, version, found, count = _HEAD.unpack_from(payload, 0)
            check("magic", magic == _MAGIC, "must be b'fs': not a fedsplit message")
            check("version", version == VERSION, f"must be {VERSION}, got {version}")
            check("kind", found == kind, f"must be {kind}, got {found}")
            self.table = self._read_table(payload, count)
        except struct.error:
            raise WireError(f"length {len(payload)} is too short for the table of arrays") from None
        used = self.offset
        for code, shape in self.table:
            used += _SIZES[code] * math.prod(shape)
        if used != len(payload):
            raise WireError(f"length is {len(payload)}, the table says {used}")
        self._next = 0

    def _read_table(self, payload: bytes, count: int) -> list[tuple[int, tuple[int, ...]]]:
        offset, table = _HEAD.size, []
        for _ in range(count):
            code, ndim = _ENTRY.unpack_from(payload, offset)
            if code >= len(_DTYPES) or not 1 <= ndim <= 2:
                raise WireError("table has an unknown dtype or number of axes")
            table.append((code, _SHAPES[ndim].unpack_from(payload, offset + _ENTRY.size)))
            offset += _ENTRY.size + _SHAPES[ndim].size
        self.offset = offset
        return table

    def array(
        self, field: str, dtypes: str | tuple[str, ...], ndim: int | tuple[int, ...], size: int | None = None
    ) -> NDArray[Any]:
        """Return the next array, a read-only view.

        Parameters
        ----------
        field : str
            What the array is called in an error.
        dtypes : str or tuple of str
            The dtypes that it may have, such as ``i8``.
        ndim : int or tuple of int
            The numbers of axes that it may have.
        size : int, optional
            The rows that it must have.

        Raises
        ------
        WireError
            If it is missing or not as it must be.
        """
        if self._next == len(self.table):
            raise WireError(f"{field} is missing")
        code, shape = self.table[self._next]
        name, width = _NAMES[code], len(shape)
        # messages are put together only if they are needed: a service reads thousands of queries a second
        if name != dtypes and (isinstance(dtypes, str) or name not in dtypes):
            allowed = (dtypes,) if isinstance(dtypes, str) else dtypes
            raise WireError(f"{field} must be of dtype {' or '.join(allowed)}, got {name}")
        if width != ndim and (isinstance(ndim, int) or width not in ndim):
            axes = (ndim,) if isinstance(ndim, int) else ndim
            raise WireError(f"{field} must have {' or '.join(map(str, axes))} axes, got {width}")
        if size is not None and shape[0] != size:
            raise WireError(f"{field} must have {size} rows, got {shape[0]}")
        items = shape[0] if width == 1 else shape[0] * shape[1]
        found = np.frombuffer(self._payload, _DTYPES[code], items, self.offset)
        self.offset += items * _SIZES[code]
        self._next += 1
        return found if width == 1 else found.reshape(shape)

    @property
    def rows(self) -> int:
        """Rows of the next array; 0 if there is none."""
        return self.table[self._next][1][0] if self._next < len(self.table) else 0

    def finish(self) -> None:
        """Refuse arrays that nothing asked for."""
        check("arrays", self._next == len(self.table), f"must be {self._next}, got {len(self.table)}")
