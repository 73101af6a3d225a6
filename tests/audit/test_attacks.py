"""Attacks: against closed forms, scipy and slow searches; what they must bring back; what must not break them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import nn

from fedsplit.audit.attacks import decoder, lmmse, map_qp, wiener
from fedsplit.audit.gradient_attacks import (
    FLOAT32,
    gradient_conv,
    gradient_dense,
    negative_control,
)
from fedsplit.audit.prior import Prior
from fedsplit.audit.scores import pooled_psnr, psnr
from fedsplit.data.packaged import mnist as load_mnist
from fedsplit.model.kinds.base import double
from fedsplit.model.layer import FirstLayer

Known = tuple[list[np.ndarray], list[np.ndarray]]


def data(n: int = 8, count: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two classes of correlated records in 0..1, many values at the ends."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, count)
    mixing = np.random.default_rng(99).normal(size=(n, n)) / n**0.5
    x = rng.normal(size=(count, n)) @ mixing + np.where(y[:, None], 0.5, 0.2)
    return np.clip(x, 0, 1), y


def equations(x: np.ndarray, k: int, seed: int = 0) -> Known:
    rng = np.random.default_rng(seed)
    rows = [rng.normal(size=(k, x.shape[1])) for _ in x]
    return rows, [r @ record for r, record in zip(rows, x, strict=True)]


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


def layer(kind: str, width: int = 6, **geometry: int) -> FirstLayer:
    torch.manual_seed(0)
    if kind == "conv1d":
        return FirstLayer(nn.Conv1d(4, width, 5, **geometry), nn.ReLU(), (4, 17))
    return FirstLayer(nn.Conv2d(2, width, (3, 2), **geometry), nn.ReLU(), (2, 7, 6))


# the prior


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


# gradients of linear layers


def wide(records: int, units: int, seed: int = 0, n: int = 30) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Records, deltas and their gradient in float32."""
    rng = np.random.default_rng(seed)
    x = data(n, records, seed)[0].astype(np.float32)
    delta = (rng.normal(size=(records, units)) * (rng.random((records, units)) < 0.5)).astype(np.float32)
    return x, delta, delta.T @ x


def test_the_negative_control_brings_back_sixteen_records_of_a_dense_layer() -> None:
    torch.manual_seed(0)
    first = FirstLayer(nn.Linear(784, 256), nn.ReLU(), (784,))
    x = np.random.default_rng(0).uniform(size=(16, 784)).astype(np.float32)
    assert negative_control(first, first.initial_weights(), x, seed=1) > 60


def test_the_negative_control_brings_back_two_windows_of_a_convolution() -> None:
    torch.manual_seed(0)
    first = FirstLayer(nn.Conv1d(6, 32, 9, stride=2, padding=4), nn.ReLU(), (6, 100))
    x = np.random.default_rng(0).normal(size=(2, 6, 100)).cumsum(axis=2).astype(np.float32)
    assert negative_control(first, first.initial_weights(), x, seed=1) > 60


def test_the_negative_control_fails_where_the_gradient_does_not_decide() -> None:
    torch.manual_seed(0)
    first = FirstLayer(nn.Linear(20, 8), nn.ReLU(), (20,))
    x = np.random.default_rng(0).uniform(size=(16, 20)).astype(np.float32)
    assert negative_control(first, first.initial_weights(), x, seed=1) < 30


def test_gradients_of_few_records_are_copies_with_and_without_activations() -> None:
    x, delta, dw = wide(16, 64)
    prior = Prior.of(data(30, 300, 9)[0], None)
    rows, rhs = equations(x.astype(np.float64), 5)
    assert psnr(x, gradient_dense(prior, None, [delta], [dw]), 1.0).min() > 60
    assert psnr(x, gradient_dense(prior, None, [delta], [dw], (rows, rhs, 1e-6)), 1.0).min() > 60


def test_gradients_of_many_records_are_the_closed_form() -> None:
    _, delta, dw = wide(40, 10)
    prior = Prior.of(data(30, 300, 9)[0], None)
    told = np.linalg.pinv(delta.T.astype(np.float64)) @ (dw - delta.T @ np.tile(prior.means[0], (40, 1)))
    assert gradient_dense(prior, None, [delta], [dw]) == pytest.approx(prior.means[0] + told, abs=1e-4)


@pytest.mark.parametrize("units", [10, 25])
def test_joint_gradients_and_activations_are_the_dense_conditional_mean(units: int) -> None:
    x, delta, dw = wide(20, units, n=12)
    public, y = data(12, 300, 9)
    prior = Prior.of(public, y)
    own = np.arange(20) % 2
    rows, rhs = equations(x.astype(np.float64), 4)
    guess = gradient_dense(prior, own, [delta], [dw], (rows, rhs, 0.05), precision=1e-4)
    # every equation about all 240 unknowns, record by record
    a = np.vstack([np.kron(delta.T, np.eye(12)), np.zeros((80, 240))])
    for i in range(20):
        a[units * 12 + 4 * i : units * 12 + 4 * i + 4, 12 * i : 12 * i + 12] = rows[i]
    size = np.sqrt(np.square(prior.means).mean() + np.diagonal(prior.pooled).mean())
    noise = np.concatenate([np.repeat(1e-4 * size * np.linalg.norm(delta, axis=0), 12), np.full(80, 0.05)])
    mean, covariance = prior.means[own].ravel(), np.kron(np.eye(20), prior.pooled)
    gain = covariance @ a.T @ np.linalg.inv(a @ covariance @ a.T + np.diag(noise**2))
    expected = mean + gain @ (np.concatenate([dw.ravel(), *rhs]) - a @ mean)
    assert guess.ravel() == pytest.approx(expected, abs=1e-4)


def test_joint_beats_both_parts_and_more_releases_beat_one() -> None:
    x, delta, dw = wide(60, 30)
    _, more, dw_more = wide(60, 40, seed=0)
    prior = Prior.of(data(30, 300, 9)[0], None)
    rows, rhs = equations(x.astype(np.float64), 10)
    alone = pooled_psnr(x, gradient_dense(prior, None, [delta], [dw]), 1.0)
    activations = pooled_psnr(x, wiener(prior, None, rows, rhs, 1e-6), 1.0)
    joint = pooled_psnr(x, gradient_dense(prior, None, [delta], [dw], (rows, rhs, 1e-6)), 1.0)
    assert joint > max(alone, activations) + 3
    assert pooled_psnr(x, gradient_dense(prior, None, [delta, more], [dw, dw_more]), 1.0) > 60


def test_a_gradient_in_float16_is_believed_only_as_far_as_it_goes() -> None:
    x, delta, _ = wide(60, 60)
    delta *= np.logspace(-3, 0, 60, dtype=np.float32)[:, None]  # records that the gradient shows less and less
    dw = (delta.T.astype(np.float64) @ x).astype(np.float16)
    prior = Prior.of(data(30, 300, 9)[0], None)
    right = pooled_psnr(x, gradient_dense(prior, None, [delta], [dw], precision=2.0**-11), 1.0)
    wrong = pooled_psnr(x, gradient_dense(prior, None, [delta], [dw], precision=FLOAT32), 1.0)
    assert right > wrong + 3
    assert right > pooled_psnr(x, np.tile(prior.mean, (60, 1)), 1.0) + 3


def test_a_gradient_without_deltas_tells_nothing() -> None:
    x, y = data()
    prior = Prior.of(x, y)
    guess = gradient_dense(prior, y[:4], [np.zeros((4, 3))], [np.zeros((3, 8))])
    assert guess == pytest.approx(prior.means[y[:4]])


def test_only_a_stated_box_clips_what_gradients_bring_back() -> None:
    x, delta, _ = wide(8, 30)
    x[0] += 2.0
    dw = delta.T @ x
    public = data(30, 300, 9)[0]
    assert psnr(x, gradient_dense(Prior.of(public, None), None, [delta], [dw]), 1.0).min() > 60
    assert gradient_dense(Prior.of(public, None, (0.0, 1.0)), None, [delta], [dw]).max() == 1.0


# gradients of convolutions


@pytest.mark.parametrize("kind", ["conv1d", "conv2d"])
@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 2}, {"dilation": 2, "groups": 2, "padding": 1}])
def test_the_operator_is_the_layers_own_gradient(kind: str, geometry: dict[str, int]) -> None:
    first = layer(kind, **geometry)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, *first.input_shape)).astype(np.float32)
    delta = rng.normal(size=(3, *first.cut_shape)).astype(np.float32)
    size = int(np.prod(first.shapes["weight"]))
    found = sum(first.kind.operator(double(d)).numpy().T @ record.ravel() for d, record in zip(delta, x, strict=True))
    assert found == pytest.approx(first.gradient(x, delta)[:size], abs=1e-4)


@pytest.mark.parametrize("count", [1, 4])
def test_convolution_gradients_are_the_dense_conditional_mean(count: int) -> None:
    rng = np.random.default_rng(0)
    public, y = data(12, 300, 9)
    prior, own = Prior.of(public, y), np.arange(count) % 2
    x, g = data(12, count)[0], rng.normal(size=(count, 12, 9))
    rows, rhs = equations(x, 2)
    sums = np.einsum("inp,in->p", g, x)
    guess = gradient_conv(prior, own, lambda i: g[i], sums, count, (rows, rhs, 0.05), precision=1e-3)
    size = np.sqrt(np.square(prior.means).mean() + np.diagonal(prior.pooled).mean())
    a = np.vstack([np.hstack([*g.transpose(0, 2, 1)]), np.zeros((2 * count, 12 * count))])
    covariance = np.zeros((12 * count, 12 * count))
    for i in range(count):
        a[9 + 2 * i : 11 + 2 * i, 12 * i : 12 * i + 12] = rows[i]
        covariance[12 * i : 12 * i + 12, 12 * i : 12 * i + 12] = prior.covariances[own[i]]
    noise = np.concatenate([1e-3 * size * np.sqrt(np.square(g).sum(axis=(0, 1))), np.full(2 * count, 0.05)])
    mean = prior.means[own].ravel()
    gain = covariance @ a.T @ np.linalg.inv(a @ covariance @ a.T + np.diag(noise**2))
    expected = mean + gain @ (np.concatenate([sums, *rhs]) - a @ mean)
    assert guess.ravel() == pytest.approx(expected, abs=1e-6)


def test_activations_add_to_the_gradient_of_a_convolution() -> None:
    first = layer("conv1d", width=16, stride=2, padding=2)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6, 4, 17)).astype(np.float32)
    delta = rng.normal(size=(6, *first.cut_shape)).astype(np.float32)
    sums = first.gradient(x, delta)[: 16 * 4 * 5]
    flat, prior = x.reshape(6, -1), Prior.blank(68)
    rows, rhs = equations(flat.astype(np.float64), 20)
    alone = gradient_conv(prior, None, lambda i: first.kind.operator(double(delta[i])).numpy(), sums, 6)
    joint = gradient_conv(
        prior, None, lambda i: first.kind.operator(double(delta[i])).numpy(), sums, 6, (rows, rhs, 1e-6)
    )
    assert pooled_psnr(flat, alone, 4.0) < 30  # 320 equations for 408 unknowns
    assert psnr(flat, joint, 4.0).min() > 60  # and 120 more
