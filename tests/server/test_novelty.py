"""Novelty: distances to a device's own recordings, in a trunk that tells recordings apart."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.model.tasks import task_of
from fedsplit.release.admitted import unguarded
from fedsplit.release.kept import Kept
from fedsplit.release.policies import Bits
from fedsplit.server.batches import Batches
from fedsplit.server.novelty.detector import Detector
from fedsplit.server.novelty.space import Normal, Space, features
from fedsplit.server.novelty.trunk import NoveltyTrunk, auc, judge, self_calibrated
from fedsplit.server.trunk import TrunkOptions, thinned
from fedsplit.wire.query import EPISODE
from fedsplit.wire.release import Release

CUT = (3, 8)


def _released(outputs: np.ndarray) -> Batches:
    mask = outputs > 0
    kept = Kept.of(outputs, mask, zeros_count=False)
    targets = np.zeros(len(outputs), dtype=np.int64)
    return Batches.join(
        [Release.pack(unguarded(kept, "test"), np.array([0]), np.array([len(outputs)]), targets, "float32", 0)]
    )


def _movements(kinds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Waves of one frequency per kind at any phase, as relu outputs ``(records, 24)``."""
    time = np.arange(8)[None, None] + rng.uniform(0, 8, size=(len(kinds), 1, 1))
    waves = np.sin(time * (0.4 + 0.5 * kinds[:, None, None]) + np.arange(3)[None, :, None])
    return np.maximum(waves, 0).reshape(len(kinds), -1).astype(np.float32)


def _trunk(recordings: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, recordings)
    )


def _options(thinning: float = 0.5) -> TrunkOptions:
    return TrunkOptions("adam", 0.002, 0.0, 0.0, "cosine", batch_size=32, epochs=1, thinning=thinning)


def _novelty_trunk(recordings: int, rounds: int, seed: int = 0) -> NoveltyTrunk:
    return NoveltyTrunk(_trunk(2 * recordings), CUT, task_of("novelty"), recordings, _options(), rounds, seed)


def _of(devices: list[int], targets: np.ndarray, outputs: np.ndarray, bits: int = 0) -> Batches:
    """Return outputs ``(records, 24)`` as released by some devices, as many by each."""
    kept = Kept.of(outputs, outputs > 0, zeros_count=False)
    counts = np.full(len(devices), len(outputs) // len(devices))
    return Batches.join([Release.pack(unguarded(kept, "test"), np.array(devices), counts, targets, "float32", bits)])


def _trained(rng: np.random.Generator) -> NoveltyTrunk:
    """Return a trunk that has learned two movements of each of two devices."""
    trunk = _novelty_trunk(2, rounds=15)
    batches = _of([0, 1], np.tile(np.repeat([0, 1], 60), 2), _movements(np.repeat([0, 1, 3, 4], 60), rng))
    for round_number in range(1, 16):
        trunk.train(batches, 0, round_number)
    return trunk


def test_a_movement_not_taught_is_noticed_on_a_device_that_was_held_out() -> None:
    rng = np.random.default_rng(0)
    trunk = _trained(rng)
    kinds = np.repeat([0, 4, 2], 30)  # two that are known, and one that nobody has released
    scores = trunk.evaluate(_of([7], np.repeat([0, 1, 2], 30), _movements(kinds, rng)))
    assert scores["test_auc"] > 0.9
    assert scores["test_episode_auc"] > 0.95
    assert scores["test_accuracy"] is None


def test_one_bit_of_every_output_is_enough() -> None:
    rng = np.random.default_rng(0)
    dropping, trunk = Bits(1), _novelty_trunk(2, rounds=15)

    def coded(kinds: np.ndarray) -> np.ndarray:
        return dropping.coded(_movements(kinds, rng))

    batches = _of([0, 1], np.tile(np.repeat([0, 1], 60), 2), coded(np.repeat([0, 1, 3, 4], 60)), bits=1)
    assert set(batches.values.tolist()) == {1.0}
    for round_number in range(1, 16):
        trunk.train(batches, 0, round_number)
    scores = trunk.evaluate(_of([7], np.repeat([0, 1, 2], 30), coded(np.repeat([0, 4, 2], 30)), bits=1))
    assert scores["test_auc"] > 0.9


def test_a_device_that_has_trained_is_judged_by_what_it_trained_with() -> None:
    rng = np.random.default_rng(0)
    trunk = _trained(rng)
    # device 1's own movements are 3 and 4: to it, that of device 0 is new
    scores = trunk.evaluate(_of([1], np.repeat([0, 2], 30), _movements(np.repeat([3, 0], 30), rng)))
    assert scores["test_auc"] > 0.9


def test_thresholds_are_those_of_devices_that_trained_nothing() -> None:
    rng = np.random.default_rng(0)
    trunk = _trained(rng)
    both = _of([1, 7], np.tile(np.repeat([0, 1], 15), 2), _movements(np.tile(np.repeat([3, 4], 15), 2), rng))
    trunk.evaluate(both)
    assert trunk.detector is not None
    together = trunk.detector.scores
    trunk.evaluate(both.without(1))
    np.testing.assert_allclose(together, trunk.detector.scores)
    trunk.evaluate(both.without(7))
    assert len(trunk.detector.scores) == 2 * (15 - EPISODE + 1)


def test_a_device_whose_records_are_too_large_spoils_no_threshold() -> None:
    rng = np.random.default_rng(0)
    trunk = _trained(rng)
    outputs = _movements(np.zeros(60, dtype=int), rng)
    outputs[:30] *= 1e38
    with np.errstate(over="ignore", invalid="ignore"):
        trunk.evaluate(_of([6, 7], np.zeros(60, dtype=np.int64), outputs))
    assert trunk.detector is not None
    assert np.isfinite(trunk.detector.scores).all()
    assert len(trunk.detector.scores) == 20 - EPISODE + 1


def test_what_is_normal_can_be_told_apart_from_what_was_learned() -> None:
    rng = np.random.default_rng(0)
    trunk = _trained(rng)
    test = _of([7], np.repeat([0, 2], 30), _movements(np.repeat([2, 0], 30), rng))  # to it, a known one is new
    trunk.normal = _of([7], np.repeat([0], 30), _movements(np.repeat([2], 30), rng))
    assert trunk.evaluate(test)["test_auc"] > 0.9


def test_something_new_is_never_learned_from() -> None:
    rng = np.random.default_rng(0)
    outputs = _movements(np.repeat([0, 1, 3], 20), rng)
    with_new, without = _novelty_trunk(2, 2), _novelty_trunk(2, 2)
    with_new.train(_of([0], np.repeat([0, 1, 2], 20), outputs), 0, 1)  # a hostile device's, or a careless one's
    without.train(_of([0], np.repeat([0, 1], 20), outputs[:40]), 0, 1)
    states = with_new.module.state_dict(), without.module.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_devices_whose_records_say_nothing_are_left_out() -> None:
    rng = np.random.default_rng(0)
    trunk = _trained(rng)
    only_new = trunk.evaluate(_of([7], np.full(20, 2), _movements(np.full(20, 2), rng)))
    assert only_new["test_auc"] is None
    assert trunk.detector is not None
    assert not len(trunk.detector.scores)
    nothing_new = trunk.evaluate(_of([7], np.zeros(30, dtype=np.int64), _movements(np.zeros(30, dtype=int), rng)))
    assert nothing_new["test_auc"] is None
    assert len(trunk.detector.scores) == 20 - EPISODE + 1  # all that can be said is what normal scores are


def test_thinning_drops_a_share_of_a_records_outputs() -> None:
    torch.manual_seed(0)
    thin = thinned(torch.ones(400, 3, 50), 0.5).mean(dim=(1, 2))
    assert thin.min() > 0.35
    assert thin.max() <= 1
    assert abs(float(thin.mean()) - 0.75) < 0.02
    assert torch.equal(thinned(torch.ones(2, 3), 0.0), torch.ones(2, 3))


def test_features_are_means_and_largest_values_over_time_after_each_relu() -> None:
    outputs = _movements(np.array([0, 1, 2]), np.random.default_rng(0))
    trunk = _trunk(2)
    hidden = [trunk[:2](torch.from_numpy(row).reshape(1, *CUT))[0].detach().numpy() for row in outputs]
    slow = np.stack([np.concatenate([h.mean(axis=1), h.max(axis=1)]) for h in hidden])
    np.testing.assert_allclose(features(trunk, CUT, _released(outputs)), slow, rtol=1e-5)


def test_a_space_whitens_what_varies_within_recordings() -> None:
    rng = np.random.default_rng(0)
    recordings = np.repeat(np.arange(20), 5)
    found = rng.normal(size=(20, 3))[recordings] + rng.normal(size=(100, 3)) @ rng.normal(size=(3, 3))
    space = Space.of(found, recordings)
    standard = found / found.std(axis=0)
    within = np.concatenate([p - p.mean(axis=0) for p in np.split(standard, 20)])
    covariance = within.T @ within / 100
    shrunk = 0.7 * covariance + 0.3 * np.trace(covariance) / 3 * np.eye(3)
    metric = np.linalg.inv(shrunk) / np.outer(found.std(axis=0), found.std(axis=0))
    np.testing.assert_allclose(space.whitening @ space.whitening.T, metric, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(space.units(found), axis=1), 1)


def test_scores_count_in_spreads_of_the_nearest_recording() -> None:
    rng = np.random.default_rng(0)
    units, recordings, tested = rng.normal(size=(9, 4)), np.array([5, 5, 5, 7, 7, 7, 7, 9, 9]), rng.normal(size=(3, 4))
    parts = [units[recordings == r] for r in (5, 7, 9)]
    own = [np.square(p - p.mean(axis=0)).sum() / (len(p) - 1) for p in parts]
    spreads = [0.75 * s + 0.25 * np.mean(own) for s in own]
    slow = [min(np.square(u - p.mean(axis=0)).sum() / s for p, s in zip(parts, spreads, strict=True)) for u in tested]
    np.testing.assert_allclose(Normal.of(units, recordings).scores(tested), slow)


def test_episodes_are_every_few_consecutive_records_of_one_target() -> None:
    rng = np.random.default_rng(0)
    units, targets = rng.normal(size=(25, 4)), np.repeat([0, 3, 1], [10, 12, 3])
    normal = Normal.of(rng.normal(size=(9, 4)), np.repeat([0, 1], [4, 5]))
    found = judge(normal, units, targets, outputs=3)
    parts = [range(i, i + 8) for i in range(3)] + [range(i, i + 8) for i in range(10, 15)] + [range(22, 25)]
    slow = [normal.scores(units[list(p)].mean(axis=0, keepdims=True))[0] for p in parts]
    np.testing.assert_allclose(found.episodes, slow)
    assert found.new_episodes.tolist() == [False] * 3 + [True] * 5 + [False]
    assert found.new.tolist() == (targets == 3).tolist()


def test_a_device_calibrates_with_the_first_third_of_its_normal_recordings() -> None:
    rng = np.random.default_rng(0)
    units, targets = rng.normal(size=(21, 4)), np.repeat([1, 3, 0], [9, 6, 6])
    first = np.r_[0:3, 15:17]
    rest = np.setdiff1d(np.arange(21), first)
    slow = Normal.of(units[first], targets[first]).scores(units[rest])
    np.testing.assert_allclose(self_calibrated(units, targets, outputs=3).scores, slow)


def test_auc_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    new, scores = rng.random(40) < 0.4, rng.integers(0, 6, size=40).astype(float)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[new] for b in scores[~new]]
    assert auc(new, scores) == pytest.approx(np.mean(pairs))


def _detector(scores: np.ndarray) -> Detector:
    return Detector(Space(np.zeros(2), np.eye(2)), scores)


def test_thresholds_within_what_was_seen_are_quantiles() -> None:
    scores = np.random.default_rng(0).normal(size=500)
    alarms_a_day = 0.25 * 86400 / 2  # of a quarter of the episodes that end every 2 s
    assert _detector(scores).threshold(alarms_a_day, 2.0) == pytest.approx(np.quantile(scores, 0.75))


def test_thresholds_beyond_what_was_seen_follow_an_exponential_tail() -> None:
    rng = np.random.default_rng(0)
    detector = _detector(rng.exponential(size=20_000))
    for share in (1e-2, 1e-3, 1e-6):
        assert detector.threshold(share * 86400 / 2, 2.0) == pytest.approx(-np.log(share), rel=0.05)


@given(st.lists(st.floats(0, 100), min_size=10, max_size=50), st.floats(1e-3, 1e3), st.floats(0.1, 3600))
def test_fewer_false_alarms_never_lower_the_threshold(scores: list[float], rate: float, seconds: float) -> None:
    detector = _detector(np.array(scores))
    assert detector.threshold(rate / 2, seconds) >= detector.threshold(rate, seconds)


def test_thresholds_of_next_to_no_alarms_are_finite() -> None:
    scores = np.random.default_rng(0).exponential(size=100)
    assert np.isfinite(_detector(scores).threshold(1e-320, 1e-320))


def test_a_threshold_of_too_few_scores_is_refused() -> None:
    with pytest.raises(DataError, match="needs 10 normal episodes of tested devices: 9"):
        _detector(np.arange(9.0)).threshold(1.0, 2.0)


def test_a_detector_survives_its_file_and_refuses_a_damaged_one() -> None:
    detector = Detector(Space(np.arange(2.0), np.eye(2)), np.arange(3.0))
    again = Detector.from_bytes(detector.to_bytes())
    np.testing.assert_array_equal(again.space.mean, detector.space.mean)
    np.testing.assert_array_equal(again.scores, detector.scores)
    broken = [b"", detector.to_bytes()[:-1], Detector(Space(np.array([np.nan]), np.eye(1)), np.zeros(0)).to_bytes()]
    for content in [*broken, Detector(Space(np.zeros(3), np.eye(2)), np.zeros(0)).to_bytes()]:
        with pytest.raises(DataError, match="damaged"):
            Detector.from_bytes(content)


def test_nothing_to_calibrate_with_is_refused() -> None:
    with pytest.raises(DataError, match="need normal records"):
        Normal.of(np.zeros((0, 4)), np.zeros(0, dtype=np.int64))


def test_a_trunk_without_activations_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a trunk with an activation"):
        features(nn.Sequential(nn.Flatten(), nn.Linear(24, 2)), CUT, _released(np.ones((1, 24), dtype=np.float32)))
