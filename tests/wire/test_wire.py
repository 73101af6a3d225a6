"""Messages: they come back as sent, hostile ones are refused by name, and nothing dense can be put in one."""

import dataclasses
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from payloads import PARAMETERS, ints, nothing_but, some_ids, some_kept, some_release

from fedsplit.common.arrays import unpack_bitmap
from fedsplit.common.errors import WireError
from fedsplit.flower.record import from_record, to_record
from fedsplit.model.head import Head
from fedsplit.model.tasks import task_of
from fedsplit.release.admitted import unguarded
from fedsplit.release.kept import Kept
from fedsplit.release.policies import Bits, Random
from fedsplit.release.streams import simulation_secret
from fedsplit.wire.container import pack_arrays
from fedsplit.wire.exchange import CutGradients, Download, Gradients, Registration, Upload, weights_digest
from fedsplit.wire.head import HeadDownload, HeadUpload, Rows
from fedsplit.wire.ledger import Ledger, Reason
from fedsplit.wire.query import Query
from fedsplit.wire.release import Release

KINDS = {"upload": 1, "download": 2, "registration": 3, "head download": 5, "head upload": 6}
HEAD = Head(4, 3, bias=True, task=task_of("classification"))
Arrays = list[np.ndarray]


def some_ledger(rng: np.random.Generator) -> Ledger:
    counts, rest = rng.choice([0.0, 0.25, 3.0, 2.0**60], 5), rng.choice([0.0, 0.25, 3.0, np.inf, np.nan], 3)
    return Ledger(*counts.tolist(), *rest.tolist())


def some_upload(
    rng: np.random.Generator,
    records: list[int],
    width: int,
    dtype: str,
    targets: str,
    groups: int,
    lost: int = 1,
    bits: int = 0,
) -> Upload:
    sums = Gradients(some_ids(rng, groups), rng.integers(1, 99, groups), rng.normal(size=(groups, PARAMETERS)))
    release = some_release(rng, records, width, dtype, targets, bits=bits)
    reasons, numbers = rng.integers(1, len(Reason) + 1, lost), rng.integers(0, 2**31, lost)
    refused = np.stack([some_ids(rng, lost), reasons, numbers], axis=1)
    rounds, failed, ledger = rng.integers(1, 9, lost), some_ids(rng, lost), some_ledger(rng)
    return Upload(release, sums, rounds, failed, refused, ledger, nonce=int(rng.integers(2**62)))


def some_download(rng: np.random.Generator, lengths: list[list[int]], rows: int, dtype: str) -> Download:
    pending = []
    for block in lengths:
        values = (rng.normal(size=sum(block)) * 10.0 ** rng.integers(-20, 9)).astype(np.float32)
        ids, number, digest = some_ids(rng, len(block)), int(rng.integers(1, 2**32)), int(rng.integers(2**62))
        pending.append(CutGradients.pack(number, digest, ids, ints(*block), values, dtype))
    starts = rng.integers(0, 50, rows)
    table = [some_ids(rng, rows), rng.integers(0, 9, rows), starts, starts + rng.integers(0, 9, rows)]
    return Download(
        run=int(rng.integers(2**62)),
        round_number=int(rng.integers(1, 2**32)),
        keep_from=int(rng.integers(2**32)),
        per_device=bool(rng.integers(2)),
        weights=rng.normal(size=PARAMETERS).astype(np.float32),
        schedule=np.stack(table, axis=1).astype(np.int64),
        pending=tuple(pending),
        nonce=int(rng.integers(2**62)),
    )


def some_registration(rng: np.random.Generator, devices: int) -> Registration:
    return Registration(some_ids(rng, devices), *rng.integers(0, 2**31, (2, devices)))


def some_head_download(rng: np.random.Generator, records: list[int], dtype: str) -> HeadDownload:
    features = (rng.normal(size=(sum(records), 4)) * 10.0 ** rng.integers(-9, 9, (sum(records), 1))).astype(np.float32)
    head = rng.normal(size=HEAD.size).astype(np.float32)
    names, number, ids = rng.integers(2**62, size=3).tolist(), int(rng.integers(1, 2**32)), some_ids(rng, len(records))
    return HeadDownload(names[0], number, names[1], names[2], ids, ints(*records), head, Rows.pack(features, dtype))


def some_head_upload(asked: HeadDownload, y: np.ndarray, dtype: str) -> HeadUpload:
    found = HEAD.sums(asked.head, asked.features.values(), y)
    rows = Rows.pack(found.features.astype(np.float32), dtype)
    return HeadUpload(asked.nonce, len(y), found.loss, found.correct, found.head, rows)


ASKED = some_head_download(np.random.default_rng(5), [2, 0, 3], "float32")


def read(kind: str, payload: bytes) -> Any:
    if kind == "registration":
        return Registration.from_bytes(payload)
    if kind == "head download":
        return HeadDownload.from_bytes(payload, HEAD)
    if kind == "head upload":
        return HeadUpload.from_bytes(payload, HEAD, ASKED, test=False)
    return {"upload": Upload, "download": Download}[kind].from_bytes(payload, parameters=PARAMETERS)


def assert_same(a: Any, b: Any) -> None:
    """Compare messages field by field: types of arrays and every bit of them."""
    assert type(a) is type(b)
    if dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b or (a != a and b != b)


# --- there and back --------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(["float16", "float32"])
sizes = st.lists(st.integers(0, 4), max_size=4)
widths = st.integers(1, 40)


@settings(max_examples=150, deadline=None)
@given(
    seeds,
    sizes,
    widths,
    dtypes,
    st.sampled_from(["classes", "column", "columns"]),
    st.integers(0, 3),
    sizes,
    st.integers(0, 8),
)
def test_uploads_come_back(
    seed: int, records: list[int], width: int, dtype: str, targets: str, groups: int, more: list[int], bits: int
) -> None:
    sent = some_upload(np.random.default_rng(seed), records, width, dtype, targets, groups, len(more), bits)
    found = Upload.from_bytes(sent.to_bytes(), parameters=PARAMETERS)
    assert_same(found, sent)
    assert found.release.values().tobytes() == sent.release.values().tobytes()
    assert found.release.bits == bits
    assert found.to_bytes() == sent.to_bytes()


@settings(max_examples=100, deadline=None)
@given(seeds, st.lists(sizes, max_size=3), st.integers(0, 4), dtypes)
def test_downloads_come_back(seed: int, lengths: list[list[int]], rows: int, dtype: str) -> None:
    sent = some_download(np.random.default_rng(seed), lengths, rows, dtype)
    found = Download.from_bytes(sent.to_bytes(), parameters=PARAMETERS)
    assert_same(found, sent)
    for a, b in zip(found.pending, sent.pending, strict=True):
        assert a.values().tobytes() == b.values().tobytes()


@settings(max_examples=100, deadline=None)
@given(seeds, sizes, dtypes, st.booleans())
def test_features_and_what_answers_them_come_back(seed: int, records: list[int], dtype: str, test: bool) -> None:
    rng = np.random.default_rng(seed)
    asked = some_head_download(rng, records, dtype)
    assert_same(HeadDownload.from_bytes(asked.to_bytes(), HEAD), asked)
    upload = some_head_upload(asked, rng.integers(0, 3, sum(records)), dtype)
    if test or not sum(records):
        nothing = Rows.pack(np.zeros((0, 4), np.float32), dtype)
        upload = dataclasses.replace(upload, head=np.zeros(0), features=nothing)
    assert_same(HeadUpload.from_bytes(upload.to_bytes(), HEAD, asked, test=test), upload)


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(0, 9))
def test_registrations_come_back(seed: int, devices: int) -> None:
    sent = some_registration(np.random.default_rng(seed), devices)
    assert_same(Registration.from_bytes(sent.to_bytes()), sent)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 0), ("float32", 0), ("float32", 1), ("float32", 7)])
@pytest.mark.parametrize("width", [65_535, 65_536, 70_003])
def test_counts_beyond_16_bits_come_back(width: int, dtype: str, bits: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.random((2, width)).astype(np.float32) + 0.25
    kept = Kept.of(Bits(bits).coded(x) if bits else x, np.ones(x.shape, bool), zeros_count=not bits)
    release = Release.pack(unguarded(kept, "test"), ints(3, 5, 6), ints(1, 0, 1), ints(0, 1), dtype, bits)
    assert release.counts.tolist() == [width, width]
    sent = nothing_but(release)
    assert_same(Upload.from_bytes(sent.to_bytes(), parameters=PARAMETERS), sent)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2**-10), ("float32", 0)])
def test_what_was_kept_arrives_where_it_was(dtype: str, tolerance: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 13)).astype(np.float32)
    mask = rng.random(x.shape) < 0.5
    release = Release.pack(
        unguarded(Kept.of(x, mask, zeros_count=True), "test"), ints(3, 8), ints(4, 3), np.zeros(7, np.int64), dtype
    )
    found = Upload.from_bytes(nothing_but(release).to_bytes(), parameters=PARAMETERS).release
    pattern = unpack_bitmap(found.bitmap, 13)
    assert np.array_equal(pattern, mask)
    np.testing.assert_allclose(found.values(), x[mask], rtol=tolerance, atol=0)


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_arrive_exactly_where_they_were(bits: int) -> None:
    x = np.maximum(np.random.default_rng(0).normal(size=(7, 13)), 0).astype(np.float32)
    levels = Bits(bits).coded(x)
    kept = Kept.of(levels, np.ones(x.shape, dtype=bool), zeros_count=False)
    release = Release.pack(unguarded(kept, "test"), ints(3, 8), ints(4, 3), np.zeros(7, np.int64), "float16", bits)
    found = Upload.from_bytes(nothing_but(release).to_bytes(), parameters=PARAMETERS).release
    dense = np.zeros_like(x)
    dense[unpack_bitmap(found.bitmap, 13)] = found.values()
    assert np.array_equal(dense, levels)
    assert np.array_equal(dense > 0, x > 0)
    assert np.isin(levels, np.arange(2**bits) * 2.0 ** (1 - bits)).all()


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(1, 6), widths, dtypes, st.integers(0, 8))
def test_a_records_bytes_do_not_depend_on_what_it_is_sent_with(
    seed: int, records: int, width: int, dtype: str, bits: int
) -> None:
    kept = some_kept(np.random.default_rng(seed), records, width, bits=bits)
    together = Release.pack(unguarded(kept, "test"), ints(4), ints(records), np.zeros(records, np.int64), dtype, bits)
    assert together.exponents.shape == (records,)
    stops = np.cumsum(together.counts)
    for i, (start, stop) in enumerate(zip(stops - together.counts, stops, strict=True)):
        row = kept.take(np.arange(records) == i)
        alone = Release.pack(unguarded(row, "test"), ints(4), ints(1), ints(0), dtype, bits)
        assert alone.codes.dtype == together.codes.dtype
        assert alone.codes.tobytes() == together.codes[start:stop].tobytes()
        assert alone.exponents.tolist() == [together.exponents[i]]
        assert alone.bitmap.tobytes() == together.bitmap[i].tobytes()
        assert alone.values().tobytes() == together.values()[start:stop].tobytes()


def test_the_other_records_decide_nothing_of_a_float16_records_scale() -> None:
    """By hand: beside a record a million times larger, a shared scale would leave a few bits of the small one."""
    x = np.array([[1e-3, 2e-3, 3e-3], [1e9, 0, 2e9]], dtype=np.float32)
    kept = Kept.of(x, np.ones(x.shape, dtype=bool), zeros_count=True)
    release = Release.pack(unguarded(kept, "test"), ints(0), ints(2), ints(0, 0), "float16")
    np.testing.assert_allclose(release.values(), x.ravel(), rtol=2**-10)
    assert release.exponents[0] != release.exponents[1]


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_take_their_bits_and_no_more(bits: int) -> None:
    release = some_release(np.random.default_rng(0), [50], 64, "float32", bits=bits)
    values = int(release.counts.sum())
    without = [a.nbytes for a in release.arrays()]
    assert without[6] == (0 if bits == 1 else -(-values * bits // 8))
    assert without[7] == 0  # no exponents
    assert release.arrays()[7].dtype == np.int16


def test_with_bits_the_dtype_of_values_does_not_matter() -> None:
    a, b = (some_release(np.random.default_rng(0), [5, 3], 20, d, bits=3) for d in ("float16", "float32"))
    assert_same(a, b)


def test_exponents_are_one_int16_per_record() -> None:
    release = some_release(np.random.default_rng(0), [2, 0, 3], 20, "float16")
    assert (release.arrays()[7].dtype, release.arrays()[7].shape) == (np.int16, (5,))
    assert release.arrays()[0].tolist() == [20, 0]


def test_float16_payloads_take_the_place_of_two_bytes_per_value() -> None:
    small, large = (some_release(np.random.default_rng(0), [50], 64, d) for d in ("float16", "float32"))
    values = int(small.counts.sum())
    size = [sum(a.nbytes for a in r.arrays()) for r in (small, large)]
    assert size[1] - size[0] == 2 * values


# --- only what was dropped can be sent -------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [np.ones((2, 8), dtype=np.float32), [[1.0] * 8] * 2, None, {"values": 1}])
def test_dense_activations_have_no_way_onto_the_wire(dense: Any) -> None:
    with pytest.raises(TypeError, match="a release is packed from Admitted, not from"):
        Release.pack(dense, ints(0), ints(2), ints(0, 1), "float32")


def test_a_look_alike_of_kept_is_not_kept() -> None:
    class Everything:
        counts, bitmap = ints(8), np.full((1, 1), 255, dtype=np.uint8)
        values, width = np.ones(8, dtype=np.float32), 8

    with pytest.raises(TypeError, match="Everything"):
        Release.pack(Everything(), ints(0), ints(1), ints(0), "float32")  # type: ignore[arg-type]


def test_an_upload_is_at_most_an_eighth_of_dense_float32() -> None:
    records, width = 200, 1600
    pre = np.random.default_rng(0).normal(size=(records, width)).astype(np.float32)
    x = np.maximum(pre, 0)
    mask = Random(0.2).mask(x, simulation_secret(0, 0), 1, np.arange(records))
    kept = Kept.of(x, mask, zeros_count=False)
    assert 0.09 < kept.counts.sum() / x.size < 0.11
    release = Release.pack(
        unguarded(kept, "test"), ints(0), ints(records), np.zeros(records, dtype=np.int64), "float16"
    )
    assert len(nothing_but(release).to_bytes()) <= 4 * records * width / 8


@pytest.mark.parametrize(("bits", "share"), [(1, 30), (2, 15), (4, 10)])
def test_an_upload_of_few_bits_is_a_small_share_of_dense_float32(bits: int, share: int) -> None:
    records, width = 200, 1600
    x = np.maximum(np.random.default_rng(0).normal(size=(records, width)), 0).astype(np.float32)
    kept = Kept.of(Bits(bits).coded(x), np.ones(x.shape, dtype=bool), zeros_count=False)
    assert 0.49 < kept.counts.sum() / x.size < 0.51
    release = Release.pack(
        unguarded(kept, "test"), ints(0), ints(records), np.zeros(records, dtype=np.int64), "float32", bits
    )
    assert len(nothing_but(release).to_bytes()) <= 4 * records * width / share


# --- hostile payloads ------------------------------------------------------------------------------------------

DTYPES = ("<f4", "<f2", "<i4", "<i8", "<u1", "<u2", "<u4", "<f8", "<i2")


def message(kind: str, dtype: str = "float16") -> Any:
    """Return a message; ``dtype`` of an upload's values may also be ``1 bits`` to ``8 bits``."""
    rng = np.random.default_rng(7)
    if kind == "upload":
        targets = "columns" if dtype == "float32" else "classes"
        bits = int(dtype.removesuffix(" bits")) if dtype.endswith("bits") else 0
        return some_upload(rng, [2, 0, 3], 13, dtype, targets, groups=2, lost=2, bits=bits)
    if kind == "download":
        return some_download(rng, [[3, 0, 2], [4]], 3, dtype)
    if kind == "head download":
        return some_head_download(rng, [2, 0, 3], dtype)
    if kind == "head upload":
        return some_head_upload(ASKED, ints(0, 2, 1, 0, 1), dtype)
    return some_registration(rng, 4)


def unpack(payload: bytes) -> Arrays:
    """Read a payload's arrays, without any of fedsplit's code."""
    (count,), offset, table, found = struct.unpack_from("<H", payload, 4), 6, [], []
    for _ in range(count):
        code, ndim = payload[offset], payload[offset + 1]
        table.append((np.dtype(DTYPES[code]), struct.unpack_from(f"<{ndim}I", payload, offset + 2)))
        offset += 2 + 4 * ndim
    for dtype, shape in table:
        items = int(np.prod(shape))
        found.append(np.frombuffer(payload, dtype, items, offset).reshape(shape).copy())
        offset += items * dtype.itemsize
    assert offset == len(payload)
    return found


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


UPLOAD_FIELDS = {
    "nonce": 0,
    "ledger": 1,
    "lost": 2,
    "failed": 3,
    "refused": 4,
    "width": 5,
    "devices": 6,
    "records": 7,
    "targets": 8,
    "counts": 9,
    "bitmap": 10,
    "values": 11,
    "exponents": 12,
    "gradient devices": 13,
    "gradient records": 14,
    "gradients": 15,
}
DOWNLOAD_FIELDS = {
    "head": 0,
    "weights": 1,
    "schedule": 2,
    "pending round": 3,
    "pending devices": 4,
    "pending lengths": 5,
    "cut gradients": 6,
    "exponents": 7,
}
REGISTRATION_FIELDS = {"devices": 0, "train": 1, "test": 2}
HEAD_DOWNLOAD_FIELDS = {"numbers": 0, "devices": 1, "records": 2, "head": 3, "features": 4, "exponents": 5}
HEAD_UPLOAD_FIELDS = {"counts": 0, "loss": 1, "head": 2, "features": 3, "exponents": 4}
FIELDS = {
    "upload": UPLOAD_FIELDS,
    "download": DOWNLOAD_FIELDS,
    "registration": REGISTRATION_FIELDS,
    "head download": HEAD_DOWNLOAD_FIELDS,
    "head upload": HEAD_UPLOAD_FIELDS,
}


def put(at: Any, value: Any) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[at] = value

    return change


def flip(at: Any, bit: int) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[at] ^= bit

    return change


def swap_rows(array: np.ndarray) -> None:
    array[[0, 1]] = array[[1, 0]]


REFUSALS: list[tuple[str, str, str, Callable[[np.ndarray], Any], str]] = [
    ("upload", "float16", "nonce", lambda a: a[:0], "nonce must have 1 rows, got 0"),
    ("upload", "float16", "nonce", lambda a: np.append(a, a), "nonce must have 1 rows, got 2"),
    ("upload", "float16", "nonce", lambda a: a[None], "nonce must have 1 axes, got 2"),
    ("upload", "float16", "nonce", lambda a: a.astype(np.int32), "nonce must be of dtype i8, got i4"),
    ("upload", "float16", "ledger", put(0, -1), "ledger must not be negative"),
    ("upload", "float16", "ledger", put(7, -1e-300), "ledger must not be negative"),
    ("upload", "float16", "ledger", put(3, -np.inf), "ledger must not be negative"),
    ("upload", "float16", "ledger", put(1, np.inf), "ledger must have finite counts"),
    ("upload", "float16", "ledger", put(4, np.nan), "ledger must have finite counts"),
    ("upload", "float16", "ledger", lambda a: a[:7], "ledger must have 8 rows, got 7"),
    ("upload", "float16", "ledger", lambda a: np.zeros(8, np.int64), "ledger must be of dtype f8, got i8"),
    ("upload", "float16", "lost", lambda a: a.astype(np.int32), "lost must be of dtype i8, got i4"),
    ("upload", "float16", "failed", lambda a: a[None], "failed must have 1 axes, got 2"),
    ("upload", "float16", "refused", put((1, 2), -1), "refused must not be negative"),
    ("upload", "float16", "refused", put((0, 0), -5), "refused must not be negative"),
    ("upload", "float16", "refused", lambda a: a[:, :2], "refused must have 3 columns"),
    ("upload", "float16", "refused", lambda a: a.ravel(), "refused must have 2 axes, got 1"),
    ("upload", "float16", "refused", lambda a: a.astype(np.int64), "refused must be of dtype i4, got i8"),
    ("upload", "float16", "width", put(0, 21), "bitmap must have 3 bytes per record"),
    ("upload", "float16", "width", put(0, 9), "bitmap has bits beyond width 9"),
    ("upload", "float16", "width", lambda a: a[:1], "width must have 2 rows, got 1"),
    ("upload", "float16", "width", put(1, 9), "bits must be in 0..8"),
    ("upload", "3 bits", "width", put(1, 2**32 - 1), "bits must be in 0..8"),
    ("upload", "float16", "width", put(1, 3), "codes must be of dtype u1, got f2"),
    ("upload", "3 bits", "width", put(1, 0), "values must be of dtype f2 or f4, got u1"),
    ("upload", "3 bits", "width", put(1, 4), "codes must be [0-9]+ of 4 bits"),
    ("upload", "3 bits", "width", put(1, 1), "codes must be [0-9]+ of 1 bits"),
    ("upload", "float16", "devices", swap_rows, "devices must be ascending device ids"),
    ("upload", "float16", "devices", put(0, -1), "devices must be ascending device ids"),
    ("upload", "float16", "devices", put(2, 10_000_000), "devices must be ascending device ids"),
    ("upload", "float16", "devices", lambda a: a[:2], "records must have 2 rows, got 3"),
    ("upload", "float16", "records", put(0, -1), "records must not be negative"),
    ("upload", "float16", "records", put(0, 3), "targets must have 6 rows, got 5"),
    ("upload", "float16", "targets", lambda a: a.astype(np.int64), "targets must be of dtype f4 or i4, got i8"),
    ("upload", "float32", "targets", put((1, 1), np.nan), "targets must be finite"),
    ("upload", "float16", "counts", lambda a: a[:4], "counts must have 5 rows, got 4"),
    ("upload", "float16", "counts", lambda a: a.astype(np.int32), "counts must be of dtype u2 or u4, got i4"),
    ("upload", "float16", "counts", lambda a: a[::-1], "counts must equal the bitmap's set bits"),
    ("upload", "float16", "bitmap", flip((0, 0), 1), "counts must equal the bitmap's set bits"),
    ("upload", "float16", "bitmap", flip((4, 1), 0x20), "bitmap has bits beyond width 13"),
    ("upload", "float16", "bitmap", lambda a: a[:, :1], "bitmap must have 2 bytes per record"),
    ("upload", "float16", "values", lambda a: a[1:], "values must have"),
    ("upload", "float16", "values", put(0, np.nan), "values must be finite"),
    ("upload", "float32", "values", put(-1, np.inf), "values must be finite"),
    ("upload", "float16", "exponents", put(0, 112), "exponents must be in -200..111"),
    ("upload", "float32", "exponents", put(2, 1), "exponents must be in 0..0"),
    ("upload", "float16", "exponents", put(-1, -201), "exponents must be in -200..111"),
    ("upload", "float16", "exponents", lambda a: a[1:], "exponents must have 5 rows, got 4"),
    ("upload", "float16", "exponents", lambda a: a.astype(np.int32), "exponents must be of dtype i2, got i4"),
    ("upload", "1 bits", "values", lambda a: np.zeros(1, np.uint8), "codes must be [0-9]+ of 1 bits"),
    ("upload", "3 bits", "values", lambda a: a[1:], "codes must be [0-9]+ of 3 bits"),
    ("upload", "8 bits", "values", lambda a: np.append(a, a[:1]), "codes must be [0-9]+ of 8 bits"),
    ("upload", "3 bits", "values", put(0, 0x07), "codes must be below 7"),
    ("upload", "8 bits", "values", put(-1, 255), "codes must be below 255"),
    ("upload", "3 bits", "values", lambda a: a.astype(np.float16), "codes must be of dtype u1, got f2"),
    ("upload", "3 bits", "exponents", lambda a: np.zeros(5, np.int16), "exponents must have 0 rows, got 5"),
    ("upload", "float16", "gradient devices", swap_rows, "gradient devices must be ascending"),
    ("upload", "float16", "gradient records", put(1, 0), "gradient records must be positive"),
    ("upload", "float16", "gradient records", put(0, -5), "gradient records must be positive"),
    ("upload", "float16", "gradients", put((0, 0), np.nan), "gradients must be finite"),
    ("upload", "float16", "gradients", lambda a: a[:, 1:], "gradients must have 5 parameters"),
    ("upload", "float16", "gradients", lambda a: a[:1], "gradients must have 2 rows, got 1"),
    ("download", "float16", "head", lambda a: a[:5], "head must have 6 rows, got 5"),
    ("download", "float16", "head", lambda a: np.append(a, a[:1]), "head must have 6 rows, got 7"),
    ("download", "float16", "head", put(0, -1), "run must not be negative"),
    ("download", "float16", "head", put(1, 0), "round must be in"),
    ("download", "float16", "head", put(1, 2**32), "round must be in"),
    ("download", "float16", "head", put(3, 2), "per device must be 0 or 1"),
    ("download", "float16", "head", put(4, -1), "pending must be a count"),
    ("download", "float16", "head", put(4, 2**62), "pending must be a count"),
    ("download", "float16", "head", put(4, 3), "pending round is missing"),
    ("download", "float16", "head", put(4, 1), "arrays must be 8, got 13"),
    ("download", "float16", "weights", put(0, np.nan), "weights must be finite"),
    ("download", "float16", "weights", put(4, -np.inf), "weights must be finite"),
    ("download", "float16", "weights", lambda a: a[:4], "weights must have 5 rows, got 4"),
    ("download", "float16", "weights", lambda a: a.astype(np.float16), "weights must be of dtype f4, got f2"),
    ("download", "float16", "schedule", lambda a: a[:, :3], "schedule must have 4 columns"),
    ("download", "float16", "schedule", swap_rows, "schedule must be ascending device ids"),
    ("download", "float16", "schedule", put((0, 1), -1), "schedule must have pass >= 0"),
    ("download", "float16", "schedule", put((0, 2), -1), "schedule must have pass >= 0 and 0 <= start"),
    ("download", "float16", "schedule", put((0, slice(2, 4)), [5, 4]), "0 <= start <= stop"),
    ("download", "float16", "pending round", put(0, 0), "pending round must be positive"),
    ("download", "float16", "pending devices", swap_rows, "pending devices must be ascending"),
    ("download", "float16", "pending lengths", put(0, -1), "pending lengths must be counts"),
    ("download", "float16", "pending lengths", put(0, 2**40), "pending lengths must be counts"),
    ("download", "float16", "pending lengths", put(0, 4), "cut gradients must have 6 rows, got 5"),
    ("download", "float16", "cut gradients", put(0, np.inf), "values must be finite"),
    ("download", "float16", "exponents", put(0, -201), "exponents must be in -200..111"),
    ("download", "float32", "exponents", put(0, -1), "exponents must be in 0..0"),
    ("registration", "float16", "devices", swap_rows, "devices must be ascending device ids"),
    ("registration", "float16", "train", put(0, -1), "records must be in 0..2\\^31-1"),
    ("registration", "float16", "test", put(0, 2**31), "records must be in 0..2\\^31-1"),
    ("registration", "float16", "test", lambda a: a[1:], "test records must have 4 rows, got 3"),
    ("registration", "float16", "train", lambda a: a.astype(np.int32), "train records must be of dtype i8, got i4"),
    ("head download", "float16", "numbers", put(0, -1), "run must not be negative"),
    ("head download", "float16", "numbers", put(1, 0), "round must be in 1"),
    ("head download", "float16", "devices", swap_rows, "devices must be ascending device ids"),
    ("head download", "float16", "records", put(0, -1), "records must be counts of the records sent"),
    ("head download", "float16", "records", put(0, 2**62), "records must be counts of the records sent"),
    ("head download", "float16", "records", put(0, 1), "features must have 4 rows, got 5"),
    ("head download", "float16", "head", put(3, np.nan), "head must be finite"),
    ("head download", "float16", "head", lambda a: a[1:], "head must have 15 rows, got 14"),
    ("head download", "float32", "features", put((1, 2), np.inf), "values must be finite"),
    ("head download", "float32", "features", lambda a: a[:, 1:], "features must have 4 columns"),
    ("head download", "float32", "exponents", put(1, 1), "exponents must be in 0..0"),
    ("head download", "float16", "exponents", put(1, 112), "exponents must be in -200..111"),
    ("head upload", "float16", "counts", flip(0, 1), "nonce must be that of the message"),
    ("head upload", "float16", "counts", put(1, 4), "records must be 5, those that were asked about, or 0"),
    ("head upload", "float16", "counts", put(1, 0), "correct must be in 0..0"),
    ("head upload", "float16", "counts", put(2, 6), "correct must be in 0..5"),
    ("head upload", "float16", "counts", put(2, -1), "correct must be in 0..5"),
    ("head upload", "float16", "loss", put(0, np.nan), "loss must be in 0"),
    ("head upload", "float16", "loss", put(0, -1e-9), "loss must be in 0"),
    ("head upload", "float16", "head", put(0, np.inf), "head must be finite"),
    ("head upload", "float16", "head", lambda a: a[1:], "head must have 15 rows, got 14"),
    ("head upload", "float16", "head", put(14, 5.1), "head must be a gradient that labels can give"),
    ("head upload", "float32", "features", put((0, 0), -1e3), "features must be gradients that labels can give"),
    ("head upload", "float32", "features", lambda a: a[:, 1:], "features must have 4 columns"),
    ("head upload", "float32", "features", put((0, 0), np.nan), "values must be finite"),
    ("head upload", "float32", "exponents", lambda a: a[1:], "features exponents must have 5 rows, got 4"),
]


@pytest.mark.parametrize(("kind", "dtype", "field", "change", "refusal"), REFUSALS)
def test_refusals_name_the_field(
    kind: str, dtype: str, field: str, change: Callable[[np.ndarray], Any], refusal: str
) -> None:
    arrays = unpack(message(kind, dtype).to_bytes())
    read(kind, pack_arrays(KINDS[kind], arrays))  # good until changed
    at = FIELDS[kind][field]
    if (changed := change(arrays[at])) is not None:
        arrays[at] = changed
    with pytest.raises(WireError, match=refusal):
        read(kind, pack_arrays(KINDS[kind], arrays))


@pytest.mark.parametrize("kind", KINDS)
def test_other_versions_and_kinds_are_refused(kind: str) -> None:
    payload = bytearray(message(kind).to_bytes())
    for version in (0, 1, 3):
        payload[2] = version
        with pytest.raises(WireError, match=f"version must be 2, got {version}"):
            read(kind, bytes(payload))
    for other in set(KINDS) - {kind}:
        with pytest.raises(WireError, match=f"kind must be {KINDS[kind]}, got {KINDS[other]}"):
            read(kind, message(other).to_bytes())


@pytest.mark.parametrize("kind", KINDS)
def test_an_array_too_many_is_refused(kind: str) -> None:
    arrays = unpack(message(kind).to_bytes())
    with pytest.raises(WireError, match=f"arrays must be {len(arrays)}, got {len(arrays) + 1}"):
        read(kind, pack_arrays(KINDS[kind], [*arrays, np.zeros(1, dtype=np.int32)]))


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(WireError, match="weights must have 6 rows, got 5"):
        Download.from_bytes(message("download").to_bytes(), parameters=6)
    with pytest.raises(WireError, match="gradients must have 6 parameters"):
        Upload.from_bytes(message("upload").to_bytes(), parameters=6)


# --- Flower's records and the digest ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "record"),
    [
        (b"", ConfigRecord),
        (message("download").to_bytes(), ConfigRecord),
        (bytes(2**22 - 1), ConfigRecord),
        (bytes(range(256)) * 2**14, ArrayRecord),
        (np.random.default_rng(0).bytes(5_000_001), ArrayRecord),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else str(len(v)),
)
def test_a_payload_travels_as_one_entry_of_a_flower_record(payload: bytes, record: type) -> None:
    """Only from 4 MiB on as an array, which travels in pieces."""
    content = to_record(payload)
    assert list(content) == ["fedsplit"]
    assert type(content["fedsplit"]) is record
    assert list(content["fedsplit"]) == ["packed"]
    assert from_record(content) == payload


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"other": to_record(b"x")["fedsplit"]}),
        RecordDict({"fedsplit": ArrayRecord()}),
        RecordDict({"other": to_record(bytes(2**22))["fedsplit"]}),
        RecordDict({"fedsplit": ConfigRecord()}),
        RecordDict({"fedsplit": ConfigRecord({"other": b"x"})}),
        RecordDict({"fedsplit": ConfigRecord({"packed": 1})}),
        RecordDict({"fedsplit": ConfigRecord({"packed": "x"})}),
        RecordDict({"fedsplit": ConfigRecord({"packed": [b"x"]})}),
        RecordDict({"fedsplit": MetricRecord({"packed": 1})}),
    ],
)
def test_a_record_without_a_payload_is_refused(content: RecordDict) -> None:
    with pytest.raises(WireError, match="message must hold one packed array under 'fedsplit'"):
        from_record(content)


def test_the_digest_names_weights() -> None:
    weights = np.array([1.0, 2.0], dtype=np.float32)
    other = np.array([1.0, np.nextafter(np.float32(2), np.float32(3))], dtype=np.float32)
    assert weights_digest(weights) == weights_digest(weights.copy())
    assert weights_digest(weights) != weights_digest(other)
    assert 0 <= weights_digest(weights) < 2**62


def test_lengths_whose_sum_overflows_are_refused() -> None:
    lengths = np.array([2**62] * 4, dtype=np.int64)
    exponents = np.array([1, 0, 0, 0], dtype=np.int32)
    block = CutGradients(1, 1, np.arange(4), lengths, np.zeros(0, "<f2"), exponents)
    down = Download(1, 1, 0, False, np.zeros(2, np.float32), np.zeros((0, 4), np.int64), [block])
    with pytest.raises(WireError, match="pending lengths"):
        Download.from_bytes(down.to_bytes(), parameters=2)


# ------------------------------------------------------------------------------------------- queries together


def some_query(
    rng: np.random.Generator, records: int, width: int, sent: int, dtype: str, bits: int, layer: int
) -> bytes:
    """``sent`` outputs of each record."""
    x = rng.normal(size=(records, width)).astype(np.float32)
    mask = np.argsort(rng.random(x.shape), axis=1) < sent
    kept = Kept.of(np.ones_like(x) if bits else x, mask, zeros_count=True)
    none, count = np.zeros(records, dtype=np.int64), np.array([records])
    return Query(layer, Release.pack(unguarded(kept, "test"), ints(0), count, none, dtype, bits)).to_bytes()


@given(
    st.integers(0, 2**32),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 20),
    st.sampled_from(["float16", "float32", ""]),
)
@settings(max_examples=80, deadline=None)
def test_joined_queries_are_those_behind_one_another(
    seed: int, count: int, records: int, width: int, dtype: str
) -> None:
    rng, bits = np.random.default_rng(seed), int(not dtype)
    sent = int(rng.integers(0, width + 1))
    payloads = [some_query(rng, records, width, sent, dtype or "float32", bits, 7) for _ in range(count)]
    joined, parts = Query.from_bytes(Query.join(payloads)), [Query.from_bytes(payload) for payload in payloads]
    assert joined.layer == 7 and joined.release.width == width and joined.release.bits == bits
    for name in ("counts", "bitmap", "codes", "exponents"):
        expected = np.concatenate([getattr(part.release, name) for part in parts])
        assert np.array_equal(getattr(joined.release, name), expected), name


@pytest.mark.parametrize(
    "other",
    [(2, 9, 3, "float32", 0, 7), (1, 9, 4, "float32", 0, 7), (1, 9, 3, "float16", 0, 7), (1, 9, 3, "float32", 0, 8)],
)
def test_queries_that_are_not_alike_are_not_joined(other: tuple[Any, ...]) -> None:
    rng = np.random.default_rng(0)
    payload = some_query(rng, 1, 9, 3, "float32", 0, 7)
    with pytest.raises(WireError, match="payloads are not alike"):
        Query.join([payload, some_query(rng, *other)])
    for damaged in (payload[:-1], payload[:20], b""):
        with pytest.raises(WireError):
            Query.join([payload, damaged])
        with pytest.raises(WireError):
            Query.join([damaged, payload])


def test_codes_that_do_not_end_with_a_byte_are_not_joined() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(WireError, match="bits must be 0 or 1 to be joined"):
        Query.join([some_query(rng, 1, 9, 3, "", 3, 7)] * 2)
