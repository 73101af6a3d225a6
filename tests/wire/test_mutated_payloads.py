"""Payloads that are mutated in many ways are refused, or are still valid."""

import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from some_messages import ASKED, HEAD, KINDS, assert_same, message, read, unpack

from fedsplit.common.arrays import unpack_bitmap
from fedsplit.common.errors import WireError
from fedsplit.wire.container import pack_arrays
from fedsplit.wire.exchange import Download, Upload
from fedsplit.wire.head import HeadDownload, HeadUpload


def flip_bits(payload: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(payload)
    for _ in range(rng.integers(1, 4)):
        changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
    return bytes(changed)


def flip_table_bits(payload: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(payload)
    changed[rng.integers(table_end(payload))] ^= 1 << rng.integers(8)
    return bytes(changed)


def table_end(payload: bytes) -> int:
    offset = 6
    for _ in range(struct.unpack_from("<H", payload, 4)[0]):
        offset += 2 + 4 * payload[offset + 1]
    return offset


def table_entries(payload: bytes) -> list[bytes]:
    offset, entries = 6, []
    while offset < table_end(payload):
        size = 2 + 4 * payload[offset + 1]
        entries.append(payload[offset : offset + size])
        offset += size
    return entries


def truncate(payload: bytes, rng: np.random.Generator) -> bytes:
    return payload[: rng.integers(len(payload))]


def extend(payload: bytes, rng: np.random.Generator) -> bytes:
    return payload + rng.bytes(int(rng.integers(1, 40)))


def swap_entries(payload: bytes, rng: np.random.Generator) -> bytes:
    entries = table_entries(payload)
    i, j = rng.choice(len(entries), 2, replace=False)
    entries[i], entries[j] = entries[j], entries[i]
    return payload[:6] + b"".join(entries) + payload[table_end(payload) :]


def swap_arrays(payload: bytes, rng: np.random.Generator) -> bytes:
    arrays = unpack(payload)
    i, j = rng.choice(len(arrays), 2, replace=False)
    arrays[i], arrays[j] = arrays[j], arrays[i]
    return pack_arrays(payload[3], arrays)


def drop_or_repeat_array(payload: bytes, rng: np.random.Generator) -> bytes:
    arrays, i = unpack(payload), int(rng.integers(struct.unpack_from("<H", payload, 4)[0]))
    arrays[i : i + 1] = [arrays[i]] * int(rng.choice([0, 2]))
    return pack_arrays(payload[3], arrays)


def spoil_numbers(payload: bytes, rng: np.random.Generator) -> bytes:
    """Put NaN, infinity, negative and extreme numbers into one array."""
    arrays = unpack(payload)
    array = arrays[rng.choice([i for i, a in enumerate(arrays) if a.size])].reshape(-1)
    if array.dtype.kind == "f":
        array[rng.integers(array.size)] = rng.choice([np.nan, np.inf, -np.inf, np.finfo(array.dtype).max])
    else:
        limits = np.iinfo(array.dtype)
        array[rng.integers(array.size)] = rng.choice([limits.min, limits.max, limits.max // 2, 0, 1])
    return pack_arrays(payload[3], arrays)


def claim_sizes(payload: bytes, rng: np.random.Generator) -> bytes:
    """Put huge sizes into the table; a zero beside them makes the array empty."""
    entries = table_entries(payload)
    i = rng.integers(len(entries))
    code, ndim = entries[i][0], entries[i][1]
    shape = rng.choice([0, 1, 2**16, 2**31, 2**32 - 1], ndim).tolist()
    entries[i] = struct.pack(f"<BB{ndim}I", code, ndim, *shape)
    return payload[:6] + b"".join(entries) + payload[table_end(payload) :]


def reshape(payload: bytes, rng: np.random.Generator) -> bytes:
    """Give an array another number of axes or dtype, consistent with the payload's length."""
    arrays = unpack(payload)
    i = int(rng.integers(len(arrays)))
    arrays[i] = [
        arrays[i].reshape(1, -1),
        arrays[i].reshape(-1),
        np.zeros((2**32 - 1, 0), dtype=arrays[i].dtype),
        np.zeros((0, 2**32 - 1), dtype=arrays[i].dtype),
        np.zeros(arrays[i].shape, dtype=np.int64 if arrays[i].dtype.kind == "f" else np.float32),
        arrays[i][:0],
    ][rng.integers(6)]
    return pack_arrays(payload[3], arrays)


def change_head(payload: bytes, rng: np.random.Generator) -> bytes:
    """Change magic, version, kind or the number of arrays."""
    changed = bytearray(payload)
    changed[rng.integers(6)] = rng.integers(256)
    return bytes(changed)


MUTATIONS = [
    flip_bits,
    flip_table_bits,
    truncate,
    extend,
    swap_entries,
    swap_arrays,
    drop_or_repeat_array,
    spoil_numbers,
    claim_sizes,
    reshape,
    change_head,
]


def assert_usable(found: Any) -> None:
    """Whatever was let through must hold finite numbers and say the same when sent on."""
    if isinstance(found, Upload):
        assert np.isfinite(found.release.values()).all()
        assert np.isfinite(found.release.targets).all()
        assert np.isfinite(found.gradients.sums).all()
        assert unpack_bitmap(found.release.bitmap, found.release.width).sum() == len(found.release.values())
        assert (np.diff(found.release.devices) > 0).all()
        assert found.release.exponents.shape == found.release.counts.shape
        assert 0 <= found.release.bits <= 8
        if found.release.bits:
            assert found.release.codes.dtype == np.uint8
            assert all(1 <= code < 2**found.release.bits for code in found.release.codes)
        assert found.refused.shape[1:] == (3,)
        assert (found.refused >= 0).all()
        assert not any(spent < 0 for spent in found.ledger)
    elif isinstance(found, Download):
        assert np.isfinite(found.weights).all()
        assert (found.schedule[:, 2] <= found.schedule[:, 3]).all()
        for block in found.pending:
            assert np.isfinite(block.values()).all()
    elif isinstance(found, HeadDownload):
        assert np.isfinite(found.head).all()
        assert np.isfinite(found.features.values()).all()
        assert (np.diff(found.devices) > 0).all()
        assert found.features.codes.shape == (found.records.sum(), HEAD.features)
    elif isinstance(found, HeadUpload):
        assert found.nonce == ASKED.nonce
        assert 0 <= found.correct <= found.records <= 5
        assert 0 <= found.loss < np.inf
        assert np.isfinite(found.head).all()
        assert np.isfinite(found.features.values()).all()
        assert found.features.codes.shape == (found.records, HEAD.features)
    else:
        assert (found.train >= 0).all()
        assert (found.test >= 0).all()


VARIANTS = [
    *(("upload", dtype) for dtype in ("float16", "float32", "1 bits", "3 bits", "8 bits")),
    *((kind, dtype) for kind in KINDS if kind != "upload" for dtype in ("float16", "float32")),
]


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda m: m.__name__)
@pytest.mark.parametrize(("kind", "dtype"), VARIANTS)
def test_mutated_payloads_are_refused_or_still_valid(
    kind: str, mutate: Callable[[bytes, np.random.Generator], bytes], dtype: str
) -> None:
    payload, rng, refused = message(kind, dtype).to_bytes(), np.random.default_rng(11), 0
    mutants = [mutate(payload, rng) for _ in range(60)]
    tracemalloc.start()
    for mutant in mutants:
        try:
            found = read(kind, mutant)
        except WireError as error:
            refused += 1
            assert len(str(error)) < 200
        else:
            assert_usable(found)
            assert_same(read(kind, found.to_bytes()), found)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > 0
    assert peak < 2_000_000
    if mutate in (truncate, extend):
        assert refused == len(mutants)
