"""The container and the coding of values: nothing is lost that must not be, and a bad table is refused."""

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.common.arrays import sum_groups
from fedsplit.common.errors import WireError
from fedsplit.wire.coding import dequantise, pack_codes, quantise, unpack_codes
from fedsplit.wire.container import VERSION, Reader, check_ids, check_scaled, pack_arrays

KIND = 9


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def there_and_back(values: np.ndarray, lengths: np.ndarray, dtype: str) -> np.ndarray:
    codes, exponents = quantise(values, lengths, dtype)
    assert codes.dtype == dtype
    assert exponents.shape == lengths.shape
    check_scaled(codes, exponents)
    return dequantise(codes, lengths, exponents)


# --- float16 ---------------------------------------------------------------------------------------------------

magnitudes = st.floats(-30, 30).map(lambda e: 10.0**e)
relative = st.lists(st.floats(-24, 0), max_size=12)
groups = st.lists(st.tuples(magnitudes, relative, st.integers(0, 2**20)), max_size=4)


@settings(max_examples=200, deadline=None)
@given(groups)
def test_float16_keeps_what_is_within_2_to_the_20_of_a_devices_largest(drawn: list[Any]) -> None:
    parts = []
    for magnitude, exponents, seed in drawn:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], len(exponents) + 1)
        parts.append((signs * magnitude * 2.0 ** np.array([*exponents, 0.0])).astype(np.float32))
    lengths = ints(*map(len, parts))
    values = np.concatenate([*parts, np.zeros(0, np.float32)])
    found = there_and_back(values, lengths, "float16")
    largest = np.repeat([np.abs(p).max() for p in parts], lengths)
    matters = np.abs(values) > 2.0**-20 * largest
    assert matters.sum() >= len(parts)
    assert (found[matters] != 0).all()
    errors = np.abs(found[matters].astype(float) / values[matters].astype(float) - 1)
    assert errors.max(initial=0) < 2.0**-10


def test_plain_float16_would_flush_what_the_scale_keeps() -> None:
    values = np.array([1e-9, -3e-12], dtype=np.float32)
    assert not values.astype(np.float16).any()
    np.testing.assert_allclose(there_and_back(values, ints(2), "float16"), values, rtol=2**-10)


def test_each_device_has_its_own_scale() -> None:
    values = np.array([1e20, 1e-20, 2e-20, 1.0], dtype=np.float32)
    np.testing.assert_allclose(there_and_back(values, ints(1, 0, 2, 0, 1), "float16"), values, rtol=2**-10)


def test_devices_of_zeros_and_of_nothing_keep_exponent_0() -> None:
    codes, exponents = quantise(np.zeros(3, dtype=np.float32), ints(0, 3, 0), "float16")
    assert exponents.tolist() == [0, 0, 0]
    assert codes.tolist() == [0, 0, 0]
    assert (
        dequantise(*quantise(np.zeros(0, np.float32), ints(), "float16")[:1], ints(), np.zeros(0, np.int32)).size == 0
    )


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20))
def test_float32_passes_unchanged(drawn: list[float]) -> None:
    values = np.array(drawn, dtype=np.float32)
    codes, exponents = quantise(values, ints(len(drawn)), "float32")
    assert codes.tobytes() == values.tobytes()
    assert exponents.tolist() == [0]
    assert dequantise(codes, ints(len(drawn)), exponents).tobytes() == values.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_codes_that_are_not_finite_are_refused(dtype: str, bad: float) -> None:
    with pytest.raises(WireError, match="values must be finite"):
        check_scaled(np.array([1, bad], dtype=dtype), np.zeros(1, np.int32))


@pytest.mark.parametrize(("dtype", "bad"), [("float16", 112), ("float16", -201), ("float32", 1), ("float32", -1)])
def test_exponents_that_could_overflow_are_refused(dtype: str, bad: int) -> None:
    with pytest.raises(WireError, match="exponents must be in"):
        check_scaled(np.ones(1, dtype=dtype), np.array([bad], dtype=np.int32))


def test_the_largest_code_with_the_largest_exponent_is_finite() -> None:
    codes, exponents = np.array([65504], dtype=np.float16), np.array([111], dtype=np.int32)
    check_scaled(codes, exponents)
    assert np.isfinite(dequantise(codes, ints(1), exponents)).all()


# --- codes of a few bits ---------------------------------------------------------------------------------------


def bit_string(codes: list[int], bits: int) -> bytes:
    """The codes less one, lowest bit first, behind one another in the lowest bits of bytes first."""
    digits = [(code - 1) >> place & 1 for code in codes for place in range(bits)]
    return bytes(sum(d << i for i, d in enumerate(digits[at : at + 8])) for at in range(0, len(digits), 8))


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 8), st.data())
def test_codes_come_back_from_a_plain_string_of_bits(bits: int, data: st.DataObject) -> None:
    drawn = data.draw(st.lists(st.integers(1, 2**bits - 1), max_size=30))
    packed = pack_codes(np.array(drawn, dtype=np.uint8), bits)
    assert packed.dtype == np.uint8
    assert packed.tobytes() == bit_string(drawn, bits)
    found = unpack_codes(packed, len(drawn), bits)
    assert found.dtype == np.uint8
    assert found.tolist() == drawn


@pytest.mark.parametrize("count", [0, 1, 9])
def test_codes_of_one_bit_are_all_1_and_need_no_bytes(count: int) -> None:
    packed = pack_codes(np.ones(count, dtype=np.uint8), 1)
    assert (packed.dtype, packed.size) == (np.uint8, 0)
    found = unpack_codes(packed, count, 1)
    assert (found.dtype, found.tolist()) == (np.uint8, [1] * count)


@pytest.mark.parametrize(("bits", "count", "size"), [(1, 3, 0), (2, 4, 1), (2, 5, 2), (3, 8, 3), (7, 1, 1), (8, 5, 5)])
def test_packed_codes_of_another_length_are_refused(bits: int, count: int, size: int) -> None:
    unpack_codes(np.zeros(size, dtype=np.uint8), count, bits)
    for other in {size - 1, size + 1} - {-1}:
        with pytest.raises(WireError, match=f"codes must be {count} of {bits} bits"):
            unpack_codes(np.zeros(other, dtype=np.uint8), count, bits)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_code_beyond_the_highest_level_is_refused(bits: int) -> None:
    """All bits set would be level 2^bits: levels go from 1 to 2^bits - 1."""
    codes = np.array([1, 2**bits - 1, 1], dtype=np.uint8)
    packed = np.unpackbits(pack_codes(codes, bits), bitorder="little")
    assert unpack_codes(np.packbits(packed, bitorder="little"), 3, bits).tolist() == codes.tolist()
    packed[bits : 2 * bits] = 1
    with pytest.raises(WireError, match=f"codes must be below {2**bits - 1}"):
        unpack_codes(np.packbits(packed, bitorder="little"), 3, bits)


# --- groups and ids --------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=5))
def test_sum_groups(drawn: list[list[int]]) -> None:
    counts, lengths = ints(*[c for group in drawn for c in group]), ints(*map(len, drawn))
    assert sum_groups(counts, lengths).tolist() == [sum(group) for group in drawn]


@pytest.mark.parametrize("good", [[], [0], [3, 4, 9_999_999]])
def test_ascending_ids_are_taken(good: list[int]) -> None:
    check_ids("devices", ints(*good))


@pytest.mark.parametrize("bad", [[-1], [1, 1], [2, 1], [0, 10_000_000]])
def test_other_ids_are_refused(bad: list[int]) -> None:
    with pytest.raises(WireError, match="devices must be ascending device ids"):
        check_ids("devices", ints(*bad))


# --- the container ---------------------------------------------------------------------------------------------

ARRAYS = [
    np.array([[1.5, -2.0]], dtype=np.float32),
    np.array([0.25], dtype=np.float16),
    np.array([-7], dtype=np.int32),
    np.array([2**62], dtype=np.int64),
    np.zeros((0, 3), dtype=np.uint8),
    np.array([255], dtype=np.uint8),
    np.array([65535], dtype=np.uint16),
    np.array([2**32 - 1], dtype=np.uint32),
    np.array([[np.pi], [-np.inf]], dtype=np.float64),
    np.array([-200, 32767], dtype=np.int16),
]


def read(payload: bytes, kind: int = KIND) -> list[np.ndarray]:
    take = Reader(payload, kind)
    found = [take.array(str(i), a.dtype.str[1:], a.ndim) for i, a in enumerate(ARRAYS)]
    take.finish()
    return found


def test_arrays_of_every_dtype_come_back() -> None:
    for sent, found in zip(ARRAYS, read(pack_arrays(KIND, ARRAYS)), strict=True):
        assert found.dtype == sent.dtype
        np.testing.assert_array_equal(found, sent)


def test_every_dtype_has_its_number() -> None:
    """The numbers are what other versions read: a new dtype goes to the end."""
    kinds = ("f4", "f2", "i4", "i8", "u1", "u2", "u4", "f8", "i2")
    for number, kind in enumerate(kinds):
        assert pack_arrays(KIND, [np.zeros(1, dtype=f"<{kind}")])[6] == number
    assert {a.dtype.str[1:] for a in ARRAYS} == set(kinds)
    with pytest.raises(ValueError):
        pack_arrays(KIND, [np.zeros(1, dtype=np.uint64)])


def test_big_endian_machines_would_find_little_endian_bytes() -> None:
    assert pack_arrays(KIND, [np.array([1], dtype=np.int32)]).endswith(b"\x01\x00\x00\x00")
    assert pack_arrays(KIND, []) == struct.pack("<2sBBH", b"fs", VERSION, KIND, 0)


def test_arrays_that_are_not_contiguous_are_packed_in_order() -> None:
    array = np.arange(12, dtype=np.int64).reshape(3, 4).T[::2]
    np.testing.assert_array_equal(Reader(pack_arrays(KIND, [array]), KIND).array("x", "i8", 2), array)


def header(table: bytes, count: int = 1, magic: bytes = b"fs", version: int = VERSION, kind: int = KIND) -> bytes:
    return struct.pack("<2sBBH", magic, version, kind, count) + table


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        (b"", "length 0 is too short"),
        (b"fs\x01", "length 3 is too short"),
        (header(b"", magic=b"fz"), "magic must be b'fs'"),
        (header(b"", version=1), "version must be 2, got 1"),
        (header(b"", version=3), "version must be 2, got 3"),
        (header(b"", kind=8), "kind must be 9, got 8"),
        (header(b""), "length 6 is too short"),
        (header(b"\x00\x01\x00"), "length 9 is too short"),
        (header(struct.pack("<BBI", 9, 1, 0)), "table has an unknown dtype or number of axes"),
        (header(struct.pack("<BB", 0, 0)), "table has an unknown dtype or number of axes"),
        (header(struct.pack("<BB3I", 0, 3, 0, 0, 0)), "table has an unknown dtype or number of axes"),
        (header(struct.pack("<BBI", 0, 1, 1)), "length is 12, the table says 16"),
        (header(struct.pack("<BB2I", 3, 2, 2**32 - 1, 2**32 - 1)), "length is 16, the table says"),
        (header(struct.pack("<BBI", 0, 1, 0)) + b"x", "length is 13, the table says 12"),
    ],
)
def test_a_bad_header_or_table_is_refused(payload: bytes, field: str) -> None:
    with pytest.raises(WireError, match=field):
        Reader(payload, KIND)


def test_an_array_of_another_dtype_shape_or_size_is_refused() -> None:
    payload = pack_arrays(KIND, [np.zeros((2, 3), dtype=np.int32)])
    with pytest.raises(WireError, match="lot must be of dtype f4 or f2, got i4"):
        Reader(payload, KIND).array("lot", ("f4", "f2"), 2)
    with pytest.raises(WireError, match="lot must have 1 axes, got 2"):
        Reader(payload, KIND).array("lot", "i4", 1)
    with pytest.raises(WireError, match="lot must have 3 rows, got 2"):
        Reader(payload, KIND).array("lot", "i4", (1, 2), size=3)


def test_missing_and_left_over_arrays_are_refused() -> None:
    take = Reader(pack_arrays(KIND, ARRAYS[:2]), KIND)
    take.array("first", "f4", 2)
    with pytest.raises(WireError, match="arrays must be 1, got 2"):
        take.finish()
    take.array("second", "f2", 1)
    take.finish()
    with pytest.raises(WireError, match="third is missing"):
        take.array("third", "f4", 1)


def test_what_is_read_cannot_be_written_to() -> None:
    found = Reader(pack_arrays(KIND, ARRAYS[:1]), KIND).array("x", "f4", 2)
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1
