"""Scores of reconstructions: by hand, at their ends, and against slow plain loops."""

import math

import numpy as np
import pytest

from fedsplit.audit.scores import identification, nmse, pooled_psnr, psnr, ssim, summarise


def images(side: int, seed: int = 0, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=(count, side, side + 3))
    return x, np.clip(x + 0.2 * rng.normal(size=x.shape), 0, 1)


def slow_ssim(a: np.ndarray, b: np.ndarray, peak: float, size: int) -> float:
    """Equations 13 to 16 of Wang et al. (2004), one window at a time."""
    middle = (size - 1) / 2
    weights = np.array(
        [[math.exp(-((i - middle) ** 2 + (j - middle) ** 2) / 4.5) for j in range(size)] for i in range(size)]
    )
    weights /= weights.sum()
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    found = []
    for i in range(a.shape[0] - size + 1):
        for j in range(a.shape[1] - size + 1):
            u, v = a[i : i + size, j : j + size], b[i : i + size, j : j + size]
            mu, mv = (weights * u).sum(), (weights * v).sum()
            su, sv = (weights * (u - mu) ** 2).sum(), (weights * (v - mv) ** 2).sum()
            suv = (weights * (u - mu) * (v - mv)).sum()
            found.append((2 * mu * mv + c1) * (2 * suv + c2) / ((mu**2 + mv**2 + c1) * (su + sv + c2)))
    return float(np.mean(found))


def test_psnr_by_hand() -> None:
    x, guess = np.zeros((2, 4), np.float32), np.array([[0.1] * 4, [0, 0, 0, 2.0]])
    assert psnr(x, guess, 1.0) == pytest.approx([20.0, 0.0])  # mean squared errors 0.01 and 1
    assert psnr(x, guess, 10.0) == pytest.approx([40.0, 20.0])


def test_psnr_of_a_copy_stops_at_the_cap() -> None:
    x = np.ones((2, 3))
    assert psnr(x, x + np.array([[0.0], [1e-9]]), 1.0).tolist() == [120.0, 120.0]
    assert pooled_psnr(x, x, 5.0) == 120.0


def test_pooled_psnr_averages_errors_not_decibels() -> None:
    x, guess = np.zeros((2, 1)), np.array([[0.0], [0.2]])
    assert pooled_psnr(x, guess, 1.0) == pytest.approx(-10 * math.log10(0.02))


def test_nmse_is_one_at_the_mean_and_zero_at_a_copy() -> None:
    x = np.random.default_rng(0).normal(size=(50, 6)) * [1, 2, 3, 4, 5, 6] + 7
    errors = nmse(x, np.broadcast_to(x.mean(axis=0), x.shape), x.var(axis=0))
    assert errors.shape == (50,)
    assert errors.mean() == pytest.approx(1.0)
    assert nmse(x, x, x.var(axis=0)).max() == 0.0
    assert nmse(np.array([[1.0, 5.0]]), np.array([[2.0, 8.0]]), np.array([1.0, 3.0])) == pytest.approx([2.5])


def test_nmse_of_constant_records_is_finite() -> None:
    x = np.ones((2, 3))
    assert nmse(x, x, x.var(axis=0)).tolist() == [0.0, 0.0]
    assert np.isfinite(nmse(x, x + 1, x.var(axis=0))).all()


@pytest.mark.parametrize(("side", "size"), [(28, 11), (11, 11), (10, 7), (8, 7), (5, 5)])
@pytest.mark.parametrize("peak", [1.0, 255.0])
def test_ssim_equals_the_slow_version(side: int, size: int, peak: float) -> None:
    x, guess = images(side)
    expected = [slow_ssim(a * peak, b * peak, peak, size) for a, b in zip(x, guess, strict=True)]
    assert 0.1 < expected[0] < 0.99
    assert ssim(x * peak, guess * peak, peak) == pytest.approx(expected, abs=1e-10)


def test_ssim_of_equal_images_is_one() -> None:
    x, _ = images(14)
    assert ssim(x.astype(np.float32), x.astype(np.float32), 1.0) == pytest.approx([1.0, 1.0])
    blank = np.zeros((1, 12, 12))
    assert ssim(blank, blank, 1.0) == pytest.approx([1.0])
    assert ssim(blank, blank + 1, 1.0)[0] == pytest.approx(1e-4 / 1.0001)  # C1 / (1 + C1): nothing in common


def test_identification_finds_permuted_candidates() -> None:
    rng = np.random.default_rng(1)
    candidates = rng.normal(size=(40, 5)).astype(np.float32)
    truth = rng.permutation(40)[:10]
    near = candidates[truth] + 1e-3
    assert identification(near, truth, candidates) == 1.0
    assert identification(near, (truth + 1) % 40, candidates) == 0.0
    half = np.concatenate([near[:5], candidates[(truth[5:] + 1) % 40]])
    assert identification(half, truth, candidates) == 0.5


def test_identification_is_chance_for_a_guess_that_ignores_the_record() -> None:
    candidates = np.random.default_rng(2).normal(size=(20, 3))
    guess = np.broadcast_to(candidates.mean(axis=0), candidates.shape)
    assert identification(guess, np.arange(20), candidates) == pytest.approx(1 / 20)


def test_identification_takes_a_copy_among_the_candidates_for_the_record() -> None:
    candidates = np.array([[1.0, 2.0], [5.0, 5.0], [1.0, 2.0]])
    assert identification(candidates[[2]], np.array([2]), candidates) == 1.0


def test_summarise_holds_every_score() -> None:
    x, guess = images(12, count=8)
    flat, guesses = x.reshape(8, -1), guess.reshape(8, -1)
    found = summarise(
        flat,
        guesses,
        peak=1.0,
        variance=flat.var(axis=0),
        truth_index=np.arange(8),
        candidates=flat,
        image_shape=(1, 12, 15),
    )
    assert found == {
        "psnr": pooled_psnr(flat, guesses, 1.0),
        "psnr_p95": pytest.approx(np.percentile(psnr(flat, guesses, 1.0), 95)),
        "nmse": pytest.approx(nmse(flat, guesses, flat.var(axis=0)).mean()),
        "ssim": pytest.approx(ssim(x, guess, 1.0).mean()),
        "identification": 1.0,
    }


def test_summarise_averages_ssim_over_channels_and_leaves_it_out_for_others() -> None:
    x, guess = images(12, count=6)
    rest = {"peak": 1.0, "variance": np.ones(360), "truth_index": np.arange(3), "candidates": x.reshape(3, -1)}
    found = summarise(x.reshape(3, -1), guess.reshape(3, -1), image_shape=(2, 12, 15), **rest)
    assert found["ssim"] == pytest.approx(ssim(x, guess, 1.0).mean())
    assert summarise(x.reshape(3, -1), guess.reshape(3, -1), **rest)["ssim"] is None
