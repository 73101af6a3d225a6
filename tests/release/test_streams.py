"""What depends on a stream: masks and noise, against a slow plain reference."""

import math
import struct
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_streams import OTHER, SECRET, mask, outputs, reference_keystream

from fedsplit.common.errors import ConfigError
from fedsplit.release.chosen import built_in
from fedsplit.release.noise import Noisy
from fedsplit.release.policies import BUILT_IN, All, AtMost, Random
from fedsplit.release.policy import Policy
from fedsplit.release.streams import keystream, record_order, simulation_secret

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
