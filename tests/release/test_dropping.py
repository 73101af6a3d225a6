"""Dropping: every policy by hand, in distribution and refused."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from plain_streams import OTHER, SECRET, mask, outputs, reference_keystream
from torch import nn

from fedsplit.common.errors import ConfigError
from fedsplit.model.layer import FirstLayer
from fedsplit.release.chosen import built_in
from fedsplit.release.kept import Kept
from fedsplit.release.policies import BUILT_IN, All, AtMost, Bits, Random, TopK, Units

# --- none ------------------------------------------------------------------------------------------------------


BY_HAND = np.array([[3.0, -4.0, 1.0]], dtype=np.float32)


def layer_of(width: int, relu: bool) -> FirstLayer:
    return FirstLayer(nn.Linear(4, width), nn.ReLU() if relu else nn.Tanh(), (4,))


def reference_top_k(row: np.ndarray, k: int) -> list[bool]:
    best = sorted(range(len(row)), key=lambda i: -abs(row[i]))[:k]  # sorted() is stable: ties keep the lower index
    return [i in best for i in range(len(row))]


@pytest.mark.parametrize("records", [0, 1, 5])
def test_none_keeps_everything(records: int) -> None:
    assert mask(All(), outputs(records, 9)).all()


def test_none_by_hand_sends_every_value() -> None:
    kept = Kept.of(BY_HAND, mask(All(), BY_HAND), zeros_count=True)
    assert kept.values.tolist() == [3.0, -4.0, 1.0]


def test_none_depends_on_no_stream() -> None:
    assert np.array_equal(mask(All(), BY_HAND), mask(All(), BY_HAND, OTHER, 7))


@pytest.mark.parametrize("policy", ["", "None", "topk", "random ", "at_most"])
def test_an_unknown_policy_is_refused(policy: str) -> None:
    with pytest.raises(ConfigError, match="policy must be one of none, random, at-most, top-k, units, bits, got"):
        built_in(policy, keep=0.5, k=2)


# --- random ----------------------------------------------------------------------------------------------------


def test_random_with_keep_1_keeps_everything() -> None:
    # 65536 draws of 16 bits: a threshold of 65535 instead of 65536 would lose one
    assert mask(Random(1.0), outputs(300, 1600)).all()


def test_random_by_hand_compares_16_bits_of_the_stream_with_keep() -> None:
    found = mask(Random(0.3), outputs(4, 37), round_number=5)
    for record in range(4):
        words = struct.unpack("<37H", reference_keystream(SECRET, 0, 5, record, 74))
        assert found[record].tolist() == [word < round(0.3 * 65536) for word in words]


@pytest.mark.parametrize("keep", [0.05, 0.2, 0.5, 0.9])
def test_random_keeps_the_asked_fraction(keep: float) -> None:
    found = mask(Random(keep), outputs(400, 250))
    error = (keep * (1 - keep) / found.size) ** 0.5
    assert abs(found.mean() - keep) < 4 * error
    assert abs(found[:, :125].mean() - keep) < 4 * error * 2**0.5
    spread = found.sum(axis=1).var() / (250 * keep * (1 - keep))  # 1 for independent outputs
    assert abs(spread - 1) < 4 * (2 / 399) ** 0.5


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5, float("nan"), float("inf")])
def test_random_refuses_keep_outside_0_1(keep: float) -> None:
    with pytest.raises(ConfigError, match=r"keep must be in \(0, 1\]"):
        Random(keep)


def test_random_with_the_smallest_keep_can_still_keep() -> None:
    assert 0 < mask(Random(1e-9), outputs(300, 1600)).sum() < 40


# --- at-most ---------------------------------------------------------------------------------------------------


def test_at_most_the_width_keeps_everything() -> None:
    assert mask(AtMost(9), outputs(5, 9)).all()


def test_at_most_by_hand_takes_the_smallest_words_of_the_stream() -> None:
    found = mask(AtMost(3), outputs(4, 11), round_number=2)
    for record in range(4):
        words = struct.unpack("<11I", reference_keystream(SECRET, 0, 2, record, 44))
        assert np.flatnonzero(found[record]).tolist() == sorted(sorted(range(11), key=words.__getitem__)[:3])


def test_at_most_keeps_exactly_k_uniformly_over_positions() -> None:
    n, width, k = 4000, 20, 5
    found = mask(AtMost(k), outputs(n, width))
    assert (found.sum(axis=1) == k).all()
    share = k / width
    assert np.abs(found.mean(axis=0) - share).max() < 4 * (share * (1 - share) / n) ** 0.5
    both = (found[:, 0] & found[:, 1]).mean()  # without replacement
    expected = share * (k - 1) / (width - 1)
    assert abs(both - expected) < 4 * (expected * (1 - expected) / n) ** 0.5


@pytest.mark.parametrize("policy", ["at-most", "top-k"])
def test_k_below_1_or_beyond_the_width_is_refused(policy: str) -> None:
    for k in (0, -1):
        with pytest.raises(ConfigError, match=f"k must be at least 1, got {k}"):
            built_in(policy, k=k)
    for relu in (True, False):
        built_in(policy, k=8).fits(layer_of(8, relu))
        with pytest.raises(ConfigError, match=r"k must be at most 8 \(the first layer's outputs\), got 9"):
            built_in(policy, k=9).fits(layer_of(8, relu))


@pytest.mark.parametrize("relu", [True, False])
def test_the_layer_limits_no_policy_without_k_or_bits(relu: bool) -> None:
    built_in("none", k=9).fits(layer_of(8, relu))
    built_in("random", keep=0.5, k=9).fits(layer_of(8, relu))


def test_at_most_does_not_look_at_the_outputs() -> None:
    dropping = AtMost(2)
    assert np.array_equal(mask(dropping, outputs(6, 9, seed=0)), mask(dropping, outputs(6, 9, seed=1)))


# --- top-k -----------------------------------------------------------------------------------------------------


def test_top_k_the_width_keeps_everything() -> None:
    assert mask(TopK(9), np.zeros((5, 9), dtype=np.float32)).all()


def test_top_k_by_hand() -> None:
    assert mask(TopK(2), BY_HAND).tolist() == [[True, True, False]]
    assert mask(TopK(1), BY_HAND).tolist() == [[False, True, False]]


def test_top_k_depends_on_no_stream() -> None:
    dropping, x = TopK(3), outputs(6, 9)
    assert np.array_equal(mask(dropping, x), mask(dropping, x, OTHER, 7))


few_values = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0])
rows = st.tuples(st.integers(0, 4), st.integers(1, 12)).flatmap(lambda s: arrays(np.float32, s, elements=few_values))


@settings(max_examples=200, deadline=None)
@given(rows, st.data())
def test_top_k_ties_keep_the_lower_index(x: np.ndarray, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, x.shape[1]) | st.just(x.shape[1]))
    assert mask(TopK(k), x).tolist() == [reference_top_k(row, k) for row in x]


# --- units -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("records", [0, 1, 5])
def test_units_keeps_everything(records: int) -> None:
    assert mask(Units(9), outputs(records, 9)).all()


@pytest.mark.parametrize("k", [7, 9, 100])
def test_units_sends_all_of_a_layer_of_just_so_many(k: int) -> None:
    for relu in (True, False):
        Units(8).fits(layer_of(8, relu))
        with pytest.raises(ConfigError, match=rf"policy 'units' sends all outputs: k must be 8 .*, got {k}"):
            Units(k).fits(layer_of(8, relu))


@pytest.mark.parametrize("k", [0, -1])
def test_units_needs_an_output(k: int) -> None:
    with pytest.raises(ConfigError, match=f"k must be at least 1, got {k}"):
        Units(k)


# --- bits ------------------------------------------------------------------------------------------------------


relu_outputs = arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(1, 12)), elements=st.floats(0, 8, width=32))


def reference_level(value: float, bits: int) -> float:
    """The lowest level that is not below the value; the highest one if there is none."""
    levels = [code / 2 ** (bits - 1) for code in range(2**bits)]
    return min((level for level in levels if level >= value), default=levels[-1])


@settings(max_examples=200, deadline=None)
@given(relu_outputs, st.integers(1, 8))
def test_bits_rounds_up_to_levels(x: np.ndarray, bits: int) -> None:
    dropping = Bits(bits)
    before = x.copy()
    found = dropping.coded(x)
    assert found.dtype == np.float32
    assert found.tolist() == [[reference_level(float(v), bits) for v in row] for row in x]
    assert np.array_equal(x, before)
    assert np.array_equal(dropping.coded(found), found)
    assert mask(dropping, found).all()


def test_one_bit_tells_zero_from_above_zero() -> None:
    x = np.array([[0.0, 1e-45, 0.3, 1.0, 7.0, 1e30]], dtype=np.float32)
    assert Bits(1).coded(x).tolist() == [[0, 1, 1, 1, 1, 1]]


def test_bits_by_hand() -> None:
    x = np.array([[0.0, 0.01, 0.5, 0.51, 1.2, 1.5, 1.6, 40.0]], dtype=np.float32)
    assert Bits(2).coded(x).tolist() == [[0, 0.5, 0.5, 1, 1.5, 1.5, 1.5, 1.5]]


@pytest.mark.parametrize("policy", [p for p in BUILT_IN if p != "bits"])
def test_other_policies_code_nothing(policy: str) -> None:
    x = outputs(3, 4)
    assert np.array_equal(built_in(policy, keep=0.5, k=2, bits=3).coded(x), x)


@pytest.mark.parametrize("bits", [0, -1, 9])
def test_bits_outside_1_to_8_are_refused(bits: int) -> None:
    with pytest.raises(ConfigError, match=rf"bits must be in 1\.\.8, got {bits}"):
        Bits(bits)


def test_bits_needs_relu() -> None:
    Bits(2).fits(layer_of(8, True))
    with pytest.raises(ConfigError, match="policy 'bits' needs the activation relu"):
        Bits(2).fits(layer_of(8, False))
