"""Partitions deal every record once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.common.errors import ConfigError
from fedsplit.data import partition as partition_module


def assert_dealt_once(parts: list[np.ndarray], n: int) -> None:
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(n))
    for part in parts:
        assert len(part) and (np.diff(part) > 0).all()


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 80), data=st.data(), seed=st.integers(0, 2**32))
def test_iid_deals_every_record_once_and_evenly(n, data, seed):
    count = data.draw(st.integers(1, n))
    parts = partition_module.iid(n, count, np.random.default_rng(seed))
    assert_dealt_once(parts, n)
    assert len(parts) == count and max(map(len, parts)) - min(map(len, parts)) <= 1


@settings(max_examples=50, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=30, max_size=80),
    count=st.integers(1, 4),
    alpha=st.sampled_from([0.3, 1.0, 1e6]),
    seed=st.integers(0, 2**32),
)
def test_dirichlet_deals_every_record_once(labels, count, alpha, seed):
    try:
        parts = partition_module.dirichlet(np.array(labels), count, alpha, np.random.default_rng(seed))
    except ConfigError as error:  # a small alpha may fail to reach all devices, and then says so
        assert "'dirichlet' leaves device" in str(error) and alpha < 1
    else:
        assert_dealt_once(parts, len(labels))
        assert len(parts) == count


@settings(max_examples=50, deadline=None)
@given(owners=st.lists(st.integers(0, 5), max_size=30))
def test_natural_gives_each_record_to_its_owner(owners):
    owners = np.array([*owners, *range(6)])
    parts = partition_module.natural(owners, 6)
    assert_dealt_once(parts, len(owners))
    for device, part in enumerate(parts):
        assert (owners[part] == device).all()


def test_a_smaller_alpha_means_more_skew():
    labels = np.repeat(np.arange(5), 200)

    def largest_class_share(alpha: float) -> float:
        parts = partition_module.dirichlet(labels, 5, alpha, np.random.default_rng(1))
        return float(np.mean([np.bincount(labels[part]).max() / len(part) for part in parts]))

    assert largest_class_share(1e6) == pytest.approx(0.2, abs=0.02)
    assert largest_class_share(0.1) > 0.5


def test_partitions_follow_the_generator():
    labels = np.arange(100) % 5
    for deal in (
        lambda rng: partition_module.iid(100, 4, rng),
        lambda rng: partition_module.dirichlet(labels, 4, 1.0, rng),
    ):
        first, again, other = (np.concatenate(deal(np.random.default_rng(seed))) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)


def test_partitions_refuse_a_device_without_records():
    with pytest.raises(ConfigError, match="'iid' leaves device 2 of 3 without records: use fewer devices"):
        partition_module.iid(2, 3, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="'natural' leaves device 1 of 3 without records: use fewer devices"):
        partition_module.natural(np.array([0, 2]), 3)
    with pytest.raises(ConfigError, match="'natural' leaves device 0 of 1 without records"):
        partition_module.natural(np.empty(0, int), 1)
    with pytest.raises(ConfigError, match=r"'dirichlet' leaves device \d of 50 .* fewer devices or a larger alpha"):
        partition_module.dirichlet(np.zeros(60, int), 50, 0.01, np.random.default_rng(0))


def test_dirichlet_redraws_before_it_gives_up():
    labels = np.zeros(40, int)

    class Counting:
        """A generator whose first draws leave device 1 without records."""

        draws = 0

        def permutation(self, values):
            return values

        def dirichlet(self, alphas):
            self.draws += 1
            return np.array([1.0, 0.0]) if self.draws <= self.bad else np.array([0.5, 0.5])

    rng = Counting()
    rng.bad = partition_module.REDRAWS
    assert [len(part) for part in partition_module.dirichlet(labels, 2, 1.0, rng)] == [20, 20]
    rng = Counting()
    rng.bad = partition_module.REDRAWS + 1
    with pytest.raises(ConfigError, match="leaves device 1 of 2"):
        partition_module.dirichlet(labels, 2, 1.0, rng)
    assert rng.draws == 11


def test_partitions_refuse_bad_arguments():
    rng = np.random.default_rng(0)
    for targets in (np.ones((9, 1), np.float32), np.ones(9, np.float32), np.ones((9, 1), int)):
        with pytest.raises(ConfigError, match="'dirichlet' needs class labels"):
            partition_module.dirichlet(targets, 2, 1.0, rng)
    for alpha in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ConfigError, match=f"alpha must be a number above 0, got {alpha}"):
            partition_module.dirichlet(np.zeros(9, int), 2, alpha, rng)
    for owners in ([0, 1, 2], [-1, 0, 1]):
        with pytest.raises(ConfigError, match=r"owners must be in 0..1"):
            partition_module.natural(np.array(owners), 2)
