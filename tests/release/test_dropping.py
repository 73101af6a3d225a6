"""Dropping: every policy by hand, in distribution and refused; the streams against a slow plain reference."""

import math
import struct
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from fedsplit.common.arrays import unpack_bitmap
from fedsplit.common.errors import ConfigError
from fedsplit.model.layer import FirstLayer
from fedsplit.release.chosen import built_in
from fedsplit.release.kept import Kept
from fedsplit.release.policies import BUILT_IN, All, AtMost, Bits, Noisy, Random, TopK, Units
from fedsplit.release.policy import Policy
from fedsplit.release.streams import keystream, record_order, simulation_secret

SECRET, OTHER = simulation_secret(1, 2), simulation_secret(1, 3)
BY_HAND = np.array([[3.0, -4.0, 1.0]], dtype=np.float32)


def outputs(records: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(records, width)).astype(np.float32)


def layer_of(width: int, relu: bool) -> FirstLayer:
    return FirstLayer(nn.Linear(4, width), nn.ReLU() if relu else nn.Tanh(), (4,))


def mask(dropping: Policy, x: np.ndarray, secret: bytes = SECRET, round_number: int = 1) -> np.ndarray:
    found = dropping.mask(x, secret, round_number, np.arange(len(x)))
    assert found.dtype == bool
    assert found.shape == x.shape
    return found


def reference_keystream(secret: bytes, purpose: int, round_number: int, record: int, width: int) -> bytes:
    """One record's bytes, block by block."""
    stream = b""
    for counter in range(-(-width // 16)):
        block = struct.pack("<4I", purpose, round_number, record, counter)
        encryptor = Cipher(algorithms.AES(secret), modes.CTR(block)).encryptor()
        stream += encryptor.update(bytes(16)) + encryptor.finalize()
    return stream[:width]


def reference_top_k(row: np.ndarray, k: int) -> list[bool]:
    best = sorted(range(len(row)), key=lambda i: -abs(row[i]))[:k]  # sorted() is stable: ties keep the lower index
    return [i in best for i in range(len(row))]


# --- none ------------------------------------------------------------------------------------------------------


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


# --- what depends on a stream ----------------------------------------------------------------------------------


def any_policy(policy: str, **more: Any) -> Policy:
    return built_in(policy, keep=0.5, k=4, bits=2, **more)


@pytest.mark.parametrize("policy", BUILT_IN)
def test_deterministic_is_what_no_stream_changes(policy: str) -> None:
    dropping, x = any_policy(policy), np.abs(outputs(30, 9))
    same = np.array_equal(mask(dropping, x), mask(dropping, x, OTHER, 7))
    assert dropping.deterministic == same == (policy not in ("random", "at-most"))


@pytest.mark.parametrize("policy", [p for p in BUILT_IN if p not in ("top-k", "bits")])
def test_nothing_with_noise_is_deterministic(policy: str) -> None:
    assert not any_policy(policy, clip=1.0, noise=0.5).deterministic


# --- noise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["top-k", "bits"])
def test_noise_is_refused_where_the_choice_of_outputs_tells(policy: str) -> None:
    with pytest.raises(ConfigError, match=f"noise is not for policy '{policy}'"):
        any_policy(policy, clip=1.0, noise=0.5)


@pytest.mark.parametrize(
    ("clip", "noise"), [(1.0, 0.0), (0.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0), (0.0, -1.0)]
)
def test_noise_and_clip_need_each_other(clip: float, noise: float) -> None:
    said = f"noise and clip must both be above 0 or both be left out, got {noise}, {clip}"
    with pytest.raises(ConfigError, match=said):
        Noisy(All(), clip=clip, noise=noise)


@pytest.mark.parametrize("clip", [1e-30, 1e-28, 1.0])
@pytest.mark.parametrize("size", [1e-29, 1e-23, 1e15, 3e38])
def test_no_size_of_the_outputs_gets_past_the_clip(clip: float, size: float) -> None:
    """A hostile server chooses both: float32 squares of the outputs would be 0 or infinite."""
    x = np.full((1, 12), size, dtype=np.float32)
    sent = x * Noisy(All(), clip=clip, noise=1.0).scales(x, np.ones(x.shape, bool))
    assert np.sqrt(np.square(sent, dtype=np.float64).sum()) <= clip * (1 + 1e-5)


def test_a_clip_that_float32_cannot_tell_from_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="clip must be at least 1e-30, got 1e-36"):
        Noisy(All(), clip=1e-36, noise=10.0)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.01, 1.0, 30.0]), st.sampled_from([0.3, 1.0]))
def test_scales_bring_the_kept_outputs_to_the_clip_and_no_further(seed: int, clip: float, keep: float) -> None:
    rng = np.random.default_rng(seed)
    x = (outputs(6, 8, seed) * 10.0 ** rng.integers(-3, 4, (6, 1))).astype(np.float32)
    x[0] = 0
    kept = rng.random(x.shape) < keep
    found = Noisy(All(), clip=clip, noise=1.0).scales(x, kept)
    assert (found.shape, found.dtype) == ((6, 1), np.float32)
    for row, pattern, (scale,) in zip(x, kept, found, strict=True):
        norm = math.sqrt(sum(float(v) ** 2 for v, k in zip(row, pattern, strict=True) if k))
        assert scale == pytest.approx(min(1, clip / norm) if norm else 1, rel=1e-5)


NOISY = Noisy(All(), clip=2.0, noise=0.75)  # standard deviation 1.5


def noise(
    name: bytes = b"weights", secret: bytes = SECRET, round_number: int = 1, records: int = 10, width: int = 100
) -> np.ndarray:
    found = NOISY.gaussian(secret, name, round_number, np.arange(records), width)
    assert (found.shape, found.dtype) == ((records, width), np.float32)
    return found


def test_noise_is_gaussian_of_the_named_size() -> None:
    found = noise(records=1000, width=101).ravel() / 1.5
    n = found.size
    assert abs(found.mean()) < 4 / n**0.5
    assert abs(found.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((found**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((found**4).mean() - 3) < 4 * (96 / n) ** 0.5
    for bound, within in ((0.5, 0.38292), (1.0, 0.68269), (2.0, 0.95450), (3.0, 0.99730)):
        assert abs((np.abs(found) < bound).mean() - within) < 4 * (within * (1 - within) / n) ** 0.5
    assert abs((found[1:] * found[:-1]).mean()) < 4 / n**0.5  # neighbours
    assert np.abs(found).max() > 3.5  # tails are not cut


def test_noises_of_records_are_independent() -> None:
    correlations = np.corrcoef(noise(records=20, width=2000))[np.triu_indices(20, 1)]
    assert np.abs(correlations).max() < 5 / 2000**0.5


def test_noise_differs_between_weights_secrets_rounds_and_records_and_is_equal_for_equal_names() -> None:
    first = noise()
    assert np.array_equal(noise(), first)
    assert len({row.tobytes() for row in first}) == 10
    for other in (noise(b"other weights"), noise(secret=OTHER), noise(round_number=2)):
        assert (first != other).all()
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 4 / first.size**0.5


def test_a_records_noise_does_not_depend_on_the_other_records_in_the_call() -> None:
    together, some = noise(), np.array([7, 2, 9])
    assert np.array_equal(NOISY.gaussian(SECRET, b"weights", 1, some, 100), together[some])


def test_noise_by_hand_is_box_and_mullers_of_the_named_stream() -> None:
    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"fedsplit noise weights").derive(SECRET)
    found = noise(round_number=5, records=3, width=7)
    for record in range(3):
        words = struct.unpack("<14I", reference_keystream(key, 2, 5, record, 56))
        uniform = [(word + 0.5) / 2**32 for word in words]
        for i in range(7):
            radius, angle = math.sqrt(-2 * math.log(uniform[i])), 2 * math.pi * uniform[7 + i]
            assert found[record, i] == pytest.approx(1.5 * radius * math.cos(angle), rel=1e-5, abs=1e-6)


# --- streams ---------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.binary(min_size=32, max_size=32),
    st.integers(0, 2),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 2**32 - 1), max_size=4),
    st.integers(1, 70),
)
def test_the_keystream_is_aes_on_the_named_blocks(
    secret: bytes, purpose: int, round_number: int, records: list[int], width: int
) -> None:
    found = keystream(secret, purpose, round_number, np.array(records, dtype=np.int64), width)
    assert found.shape == (len(records), width)
    for row, record in zip(found, records, strict=True):
        assert row.tobytes() == reference_keystream(secret, purpose, round_number, record, width)


STREAMED = [Random(0.5), AtMost(40)]


@pytest.mark.parametrize("dropping", STREAMED, ids=repr)
def test_a_records_mask_does_not_depend_on_the_other_records_in_the_call(dropping: Policy) -> None:
    x = outputs(10, 100)
    together = mask(dropping, x)
    some = np.array([7, 2, 9])
    assert np.array_equal(dropping.mask(x[some], SECRET, 1, some), together[some])
    for record in range(10):
        alone = dropping.mask(x[record : record + 1], SECRET, 1, np.array([record]))
        assert np.array_equal(alone[0], together[record])


@pytest.mark.parametrize("dropping", STREAMED, ids=repr)
def test_record_round_and_secret_each_change_the_mask(dropping: Policy) -> None:
    x = outputs(10, 100)
    first = mask(dropping, x)
    assert len({row.tobytes() for row in first}) == 10
    for other in (mask(dropping, x, OTHER), mask(dropping, x, round_number=2)):
        agreement = (first == other).mean()  # of independent masks that keep p: p^2 + (1 - p)^2, about a half
        assert abs(agreement - 0.5) < 0.1
        assert (first != other).any(axis=1).all()


def test_simulation_secrets_are_32_bytes_that_differ_by_seed_and_device() -> None:
    secrets = {simulation_secret(seed, device) for seed in (0, 1, 2**63 - 1) for device in range(20)}
    assert {len(s) for s in secrets} == {32}
    assert len(secrets) == 60
    assert simulation_secret(5, 6) == simulation_secret(5, 6)


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(0, 5))
def test_record_order_is_a_permutation(count: int, pass_number: int) -> None:
    found = record_order(SECRET, pass_number, count)
    assert sorted(found.tolist()) == list(range(count))


def test_record_order_changes_with_the_pass_and_the_secret_and_is_not_a_masks_stream() -> None:
    orders = [record_order(s, p, 50).tolist() for s in (SECRET, OTHER) for p in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert orders[0] == record_order(SECRET, 0, 50).tolist()
    words = [struct.unpack("<Q", reference_keystream(SECRET, 1, 0, i, 8))[0] for i in range(50)]
    assert orders[0] == sorted(range(50), key=words.__getitem__)
    assert orders[0] != np.argsort([reference_keystream(SECRET, 0, 0, i, 8)[::-1] for i in range(50)]).tolist()


# --- what is kept ----------------------------------------------------------------------------------------------


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
