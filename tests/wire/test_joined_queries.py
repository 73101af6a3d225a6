"""Queries that are alike are joined."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from payloads import ints

from fedsplit.common.errors import WireError
from fedsplit.release.admitted import unguarded
from fedsplit.release.kept import Kept
from fedsplit.wire.query import Query
from fedsplit.wire.release import Release


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
