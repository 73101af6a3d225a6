"""Messages: they come back as sent, and nothing dense can be put in one."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from payloads import PARAMETERS, ints, nothing_but, some_kept, some_release
from some_messages import (
    HEAD,
    assert_same,
    some_download,
    some_head_download,
    some_head_upload,
    some_registration,
    some_upload,
)

from fedsplit.common.arrays import unpack_bitmap
from fedsplit.release.admitted import unguarded
from fedsplit.release.kept import Kept
from fedsplit.release.policies import Bits, Random
from fedsplit.release.streams import simulation_secret
from fedsplit.wire.exchange import Download, Registration, Upload
from fedsplit.wire.head import HeadDownload, HeadUpload, Rows
from fedsplit.wire.release import Release

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
