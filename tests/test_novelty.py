"""Novelty: distances to a device's own recordings, in a trunk that tells recordings apart."""

import numpy as np
import pytest
import torch
from torch import nn

from fedsplit.dropping import Kept
from fedsplit.errors import DataError
from fedsplit.novelty import Normal, Space, Teaching, features, teach, threshold
from fedsplit.trunk import Batches
from fedsplit.wire import Release

CUT = (3, 8)


def _released(outputs: np.ndarray) -> Batches:
    mask = outputs > 0
    kept = Kept.of(outputs, mask, zeros_count=False)
    targets = np.zeros(len(outputs), dtype=np.int64)
    return Batches.join([Release.pack(kept, np.array([0]), np.array([len(outputs)]), targets, "float32", 0)])


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


def test_a_movement_not_taught_is_farther_from_normal() -> None:
    rng = np.random.default_rng(0)
    kinds = np.repeat([0, 1, 3, 4], 60)
    batches, trunk = _released(_movements(kinds, rng)), _trunk(4)
    teach(trunk, CUT, batches, np.repeat([0, 1, 2, 3], 60), Teaching(epochs=15), seed=0)
    space = Space.of(features(trunk, CUT, batches), np.repeat([0, 1, 2, 3], 60))

    def units(kind: int) -> np.ndarray:
        return space.units(features(trunk, CUT, _released(_movements(np.full(40, kind), rng))))

    known = units(0), units(4)
    normal = Normal.of(np.concatenate(known), np.repeat([0, 1], 40))
    assert np.median(normal.scores(units(2))) > 2 * np.median(normal.scores(units(0)))
    assert normal.episode_score(units(2)) > 2 * normal.episode_score(units(0))


def test_teaching_repeats_and_leaves_the_callers_stream_alone() -> None:
    batches = _released(_movements(np.repeat([0, 3], 20), np.random.default_rng(0)))
    trunks = [_trunk(2), _trunk(2)]
    for stream, trunk in enumerate(trunks):
        state = torch.manual_seed(stream).get_state()  # what the caller has drawn before must not matter
        teach(trunk, CUT, batches, np.repeat([0, 1], 20), Teaching(epochs=2), seed=3)
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(*(t.state_dict().values() for t in trunks), strict=True))


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


def test_the_threshold_judges_each_record_by_the_others() -> None:
    units, recordings = np.random.default_rng(0).normal(size=(6, 4)), np.array([5, 5, 5, 7, 7, 7])
    slow = [
        Normal.of(np.delete(units, i, axis=0), np.delete(recordings, i)).scores(units[i : i + 1])[0] for i in range(6)
    ]
    assert threshold(units, recordings, 0.25) == pytest.approx(np.quantile(slow, 0.75))
    alone = np.concatenate([recordings, [8]])  # a record alone has no say in the scores that are counted
    assert len(Normal.of(np.concatenate([units, units[:1]]), alone).centres) == 3


def test_a_threshold_of_single_records_is_refused() -> None:
    with pytest.raises(DataError, match="two records"):
        threshold(np.eye(3), np.arange(3), 0.05)


def test_nothing_to_calibrate_with_is_refused() -> None:
    with pytest.raises(DataError, match="need normal records"):
        Normal.of(np.zeros((0, 4)), np.zeros(0, dtype=np.int64))


def test_one_recording_cannot_be_told_apart() -> None:
    batches = _released(_movements(np.zeros(4), np.random.default_rng(0)))
    with pytest.raises(DataError, match="two recordings"):
        teach(_trunk(1), CUT, batches, np.zeros(4, dtype=np.int64), Teaching(), seed=0)
