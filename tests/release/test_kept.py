"""What is kept: zeros, the bitmap, joining and taking."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from plain_streams import outputs

from fedsplit.common.arrays import unpack_bitmap
from fedsplit.release.kept import Kept


def test_relu_zeros_send_nothing() -> None:
    x = np.array([[0.0, 2.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]], dtype=np.float32)
    everything = np.array([[True, True, True, False], [True] * 4])
    kept = Kept.of(x, everything, zeros_count=False)
    assert kept.counts.tolist() == [1, 0]
    assert kept.bitmap.tolist() == [[0b0010], [0]]
    assert kept.values.tolist() == [2.0]
    assert kept.width == 4


def test_zeros_of_other_activations_are_sent_as_the_mask_says() -> None:
    x = np.array([[0.0, 2.0, 0.0, 3.0]], dtype=np.float32)
    kept = Kept.of(x, np.array([[True, True, False, False]]), zeros_count=True)
    assert kept.counts.tolist() == [2]
    assert kept.bitmap.tolist() == [[0b0011]]
    assert kept.values.tolist() == [0.0, 2.0]


patterns = st.tuples(st.integers(0, 5), st.integers(1, 40)).flatmap(lambda s: arrays(np.bool_, s))


@settings(deadline=None)
@given(patterns)
def test_the_bitmap_gives_the_pattern_back(pattern: np.ndarray) -> None:
    x = outputs(*pattern.shape)
    kept = Kept.of(x, pattern, zeros_count=True)
    found = unpack_bitmap(kept.bitmap, kept.width)
    assert found.dtype == bool
    assert np.array_equal(found, pattern)
    dense = np.zeros_like(x)
    dense[found] = kept.values
    assert np.array_equal(dense, np.where(pattern, x, 0))


@settings(deadline=None)
@given(patterns, st.integers(0, 5))
def test_parts_join_to_the_whole(pattern: np.ndarray, at: int) -> None:
    x, width = outputs(*pattern.shape), pattern.shape[1]
    whole = Kept.of(x, pattern, zeros_count=True)
    parts = [Kept.of(x[s], pattern[s], zeros_count=True) for s in (slice(0, at), slice(at, None))]
    joined = Kept.join(parts, width)
    for name in ("counts", "bitmap", "values"):
        found, expected = getattr(joined, name), getattr(whole, name)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)


@settings(deadline=None)
@given(patterns, st.data())
def test_taking_some_records_is_keeping_of_these(pattern: np.ndarray, data: st.DataObject) -> None:
    x, n = outputs(*pattern.shape), len(pattern)
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=bool)
    found = Kept.of(x, pattern, zeros_count=True).take(chosen)
    expected = Kept.of(x[chosen], pattern[chosen], zeros_count=True)
    for name in ("counts", "bitmap", "values"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.array_equal(a, b)
    assert found.width == expected.width


def test_no_parts_join_to_no_records() -> None:
    joined = Kept.join([], 13)
    assert (joined.counts.shape, joined.bitmap.shape, joined.values.shape) == ((0,), (0, 2), (0,))
    assert joined.width == 13
