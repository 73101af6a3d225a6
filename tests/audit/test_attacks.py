"""Attacks on outputs: against closed forms, scipy and slow searches; what they must bring back and must survive."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from attacked import data, equations
from scipy.optimize import nnls
from torch import nn

from fedsplit.audit.attacks import decoder, lmmse, map_qp, wiener
from fedsplit.audit.gradient_attacks import (
    gradient_dense,
)
from fedsplit.audit.prior import Prior
from fedsplit.audit.scores import pooled_psnr, psnr
from fedsplit.data.packaged import mnist as load_mnist

# the prior


def constrained_by_scipy(
    prior: Prior, c: int, rows: np.ndarray, rhs: np.ndarray, noise: float, below: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Lawson and Hanson (1974), chapter 23: least distance programming by NNLS, exact."""
    n = rows.shape[1]
    precision = np.linalg.inv(prior.covariances[c]) + rows.T @ rows / noise**2
    told = np.linalg.solve(prior.covariances[c], prior.means[c]) + rows.T @ rhs / noise**2
    free, root = np.linalg.solve(precision, told), np.linalg.inv(np.linalg.cholesky(precision).T)  # x = free + root z
    g = np.vstack([np.eye(n), -np.eye(n), -below[0]])  # g x >= h
    h = np.concatenate([prior.low, -prior.high, -below[1]]) - g @ free
    stacked, target = np.vstack([(g @ root).T, h]), np.append(np.zeros(n), 1.0)
    r = stacked @ nnls(stacked, target, maxiter=1000)[0] - target
    return free - root @ r[:n] / r[n]


def test_prior_by_hand() -> None:
    x, y = data(count=300)
    prior = Prior.of(x, y, (0.0, 1.0))
    mean = x[y == 1].mean(axis=0)
    own = np.cov(x[y == 1].T, bias=True)
    centred = np.where(y[:, None], x - mean, x - x[y == 0].mean(axis=0))
    pooled = centred.T @ centred / 300
    ridge = 0.02 * np.trace(pooled) / 8 * np.eye(8)
    share = (y == 1).sum() / ((y == 1).sum() + 100)
    assert prior.means[1] == pytest.approx(mean)
    assert prior.mean == pytest.approx(x.mean(axis=0))
    assert prior.pooled == pytest.approx(pooled + ridge)
    assert prior.covariances[1] == pytest.approx(share * own + (1 - share) * pooled + ridge)
    assert prior.low.tolist() == [0.0] * 8 and prior.high.tolist() == [1.0] * 8 and prior.stated


def test_prior_of_a_class_without_public_records_is_that_of_all() -> None:
    x, y = data()
    prior = Prior.of(x, y, classes=4)
    alone = Prior.of(x, None)
    assert prior.means.shape == (4, 8)
    assert prior.means[3] == pytest.approx(x.mean(axis=0))
    spread = np.cov(x.T, bias=True)
    assert prior.covariances[3] - np.diag(np.diag(prior.covariances[3] - spread)) == pytest.approx(spread)
    assert alone.means.shape == (1, 8) and alone.covariances[0] == pytest.approx(alone.pooled)
    few = Prior.of(x, np.where(np.arange(200) < 9, 2, y))
    assert few.means[2] == pytest.approx(x.mean(axis=0))


def test_the_range_is_a_limit_only_where_records_lie_at_its_end() -> None:
    x, _ = data(count=500)
    x[:, 3] = np.random.default_rng(0).normal(size=500)
    x[:, 4] = 7.0
    prior = Prior.of(x, None)
    assert not prior.stated
    assert (prior.low[0], prior.high[4], prior.low[4]) == (0.0, 7.0, 7.0)
    assert (prior.low[3], prior.high[3]) == (-np.inf, np.inf)


@pytest.mark.parametrize("labels", [None, np.zeros(60, np.int64)])
def test_constant_features_and_a_single_class_give_numbers(labels: np.ndarray | None) -> None:
    x, _ = data(count=60)
    x[:, :3] = 0.0
    prior = Prior.of(x, labels)
    rows, rhs = equations(x[:4], 3)
    rows[0][:] = 0.0  # a unit of zero weights
    rhs[0][:] = 0.0
    own = labels[:4] if labels is not None else None
    features = x @ rows[1].T
    features[:, 0] = 1.0
    public = (features, x, labels)
    guesses = [
        wiener(prior, own, rows, rhs, 0.0),
        map_qp(prior, own, rows, rhs, 0.0, [(r, h) for r, h in zip(rows, rhs, strict=True)]),
        lmmse(prior, public, features[:4], own),
        decoder(prior, public, features[:4], own, seed=0, steps=20),
        gradient_dense(prior, own, [np.zeros((4, 5))], [np.zeros((5, 8))]),
    ]
    assert all(g.shape == (4, 8) and np.isfinite(g).all() for g in guesses)
    everywhere = Prior.of(np.ones((30, 8)), None)
    assert map_qp(everywhere, None, rows, rhs, 1e-3) == pytest.approx(np.ones((4, 8)))


# equations


def test_wiener_is_the_closed_form_for_noise_that_differs_by_row() -> None:
    x, y = data()
    prior = Prior.of(x, y)
    rows, rhs = equations(x[:5], 3)
    noise = [np.array([0.1, 0.5, 1e-3])] * 5
    guess = wiener(prior, y[:5], rows, rhs, noise)
    for i in range(5):
        precision = np.linalg.inv(prior.covariances[y[i]])
        told = rows[i].T / noise[i] ** 2
        expected = np.linalg.solve(precision + told @ rows[i], precision @ prior.means[y[i]] + told @ rhs[i])
        assert guess[i] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("attack", [wiener, map_qp])
def test_equations_hold_when_there_is_no_noise(attack: Callable[..., np.ndarray]) -> None:
    x, y = data()
    prior = Prior.of(x, y, (0.0, 1.0))
    rows, rhs = equations(x[:6], 4)
    guess = attack(prior, y[:6], rows, rhs, 0.0)
    assert np.abs(guess - x[:6]).max() > 0.05
    assert np.concatenate([r @ g for r, g in zip(rows, guess, strict=True)]) == pytest.approx(
        np.concatenate(rhs), abs=1e-4
    )


@pytest.mark.parametrize("attack", [wiener, map_qp])
def test_more_and_dependent_equations_than_unknowns_give_the_record(attack: Callable[..., np.ndarray]) -> None:
    x, y = data()
    prior = Prior.of(x, y, (0.0, 1.0))
    rows, rhs = equations(x[:3], 30)
    rows[0][5:] = rows[0][:25]
    rhs[0] = rows[0] @ x[0]
    guess = attack(prior, y[:3], rows, rhs, 0.0)
    assert psnr(x[:3], guess, 1.0).min() > 90


def test_without_equations_the_guess_is_the_mean_of_the_class() -> None:
    x, y = data()
    prior = Prior.of(x, y)
    nothing = [np.zeros((0, 8))] * 3, [np.zeros(0)] * 3
    assert wiener(prior, y[:3], *nothing, 0.0) == pytest.approx(prior.means[y[:3]])
    assert map_qp(prior, y[:3], *nothing, 0.0) == pytest.approx(prior.means[y[:3]], abs=1e-4)


@pytest.mark.parametrize("many", [0, 10])
def test_map_qp_is_what_scipy_finds(many: int) -> None:
    x, y = data(n=20, seed=1)
    prior = Prior.of(x, y, (0.0, 1.0))
    rows, rhs = equations(x[:12], 6)
    rng = np.random.default_rng(5)
    below = [(g := rng.normal(size=(many, 20)), g @ record + 0.02 * rng.uniform(size=many)) for record in x[:12]]
    expected = np.stack([constrained_by_scipy(prior, y[i], rows[i], rhs[i], 0.01, below[i]) for i in range(12)])
    guess = map_qp(prior, y[:12], rows, rhs, 0.01, below if many else None, iterations=5000)
    assert guess == pytest.approx(expected, abs=2e-4)
    free = wiener(prior, y[:12], rows, rhs, 0.01)  # or nothing was tested
    assert np.median(np.abs(free - expected).max(axis=1)) > 0.01
    assert many == 0 or np.median([(h - g @ v).min() for (g, h), v in zip(below, expected, strict=True)]) < 1e-6


def test_inequalities_hold() -> None:
    x, y = data(n=20)
    prior = Prior.of(x, y)
    rows, rhs = equations(x[:5], 4)
    below = [(g, g @ record - 0.1) for g, record in zip(equations(x[:5], 10, seed=3)[0], x, strict=False)]
    guess = map_qp(prior, y[:5], rows, rhs, 1.0, below)
    free = wiener(prior, y[:5], rows, rhs, 1.0)
    over = [(g @ v - h).max() for (g, h), v in zip(below, guess, strict=True)]
    assert max((g @ v - h).max() for (g, h), v in zip(below, free, strict=True)) > 0.3
    assert max(over) < 1e-3


@pytest.mark.slow
def test_digits_in_the_box_are_better_than_wiener_and_both_than_the_mean() -> None:
    mnist = load_mnist()
    order = np.random.default_rng(0).permutation(5000)
    images, labels = mnist.x.reshape(5000, -1)[order].astype(np.float64), mnist.y[order]
    x, y = images[1000:1016], labels[1000:1016]
    prior = Prior.of(images[:1000], labels[:1000], (0.0, 1.0))
    rng = np.random.default_rng(1)
    w, b = _learned_layer(images[1016:], labels[1016:])
    z = x @ w.T + b
    sent = (z > 0) & (rng.random(z.shape) < 0.5)
    rows, rhs = [w[s] for s in sent], [v[s] - b[s] for v, s in zip(z, sent, strict=True)]
    below = [(w[v <= 0], -b[v <= 0]) for v in z]
    scores = [
        pooled_psnr(x, guess, 1.0)
        for guess in (
            prior.means[y],
            wiener(prior, y, rows, rhs, 1e-4),
            map_qp(prior, y, rows, rhs, 1e-4),
            map_qp(prior, y, rows, rhs, 1e-4, below),
        )
    ]
    assert np.diff(scores).min() > 0
    assert scores[1] > scores[0] + 3 and scores[2] > scores[1] + 1


def _learned_layer(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    inputs, targets = torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y)
    for step in range(150):
        rows = slice(step % 30 * 100, step % 30 * 100 + 100)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    weight, bias = (p.detach().numpy().astype(np.float64) for p in net[0].parameters())
    return weight, bias


# learned attacks


@pytest.mark.parametrize("attack", ["lmmse", "decoder"])
def test_learned_attacks_beat_the_mean_of_the_class(attack: str) -> None:
    x, y = data(n=20, count=900)
    rng = np.random.default_rng(2)
    w = rng.normal(size=(16, 20))
    features = np.maximum(x @ w.T, 0) * (rng.random((900, 16)) < 0.7)
    public, own, labels = (features[:600], x[:600], y[:600]), features[600:], y[600:]
    prior = Prior.of(x[:600], y[:600], (0.0, 1.0))
    run = {"lmmse": lambda *a: lmmse(*a), "decoder": lambda *a: decoder(*a, seed=0, steps=300)}[attack]
    guess = run(prior, public, own, labels)
    base = pooled_psnr(x[600:], prior.means[labels], 1.0)
    assert pooled_psnr(x[600:], guess, 1.0) > base + 0.7
    assert guess.min() >= 0 and guess.max() <= 1
    wrong = run(prior, public, own, 1 - labels)
    assert pooled_psnr(x[600:], guess, 1.0) > pooled_psnr(x[600:], wrong, 1.0) + 0.1  # labels are used


def test_lmmse_inverts_a_linear_map_within_classes() -> None:
    x, y = data(n=6, count=400)
    w = np.random.default_rng(3).normal(size=(6, 6))
    prior = Prior.of(x, y)
    guess = lmmse(prior, (x[:300] @ w.T, x[:300], y[:300]), x[300:] @ w.T, y[300:])
    assert psnr(x[300:], guess, 1.0).min() > 40


def test_the_decoder_is_decided_by_its_seed_and_leaves_torch_alone() -> None:
    x, y = data(count=60)
    prior = Prior.of(x, y)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b, c = (decoder(prior, (x, x, y), x[:5], y[:5], seed=s, steps=30) for s in (1, 1, 2))
    assert (a == b).all() and (a != c).any()
    assert torch.equal(state, torch.get_rng_state())
