"""Attacks on gradients: against closed forms; what they must bring back."""

import numpy as np
import pytest
import torch
from attacked import data, equations
from torch import nn

from fedsplit.audit.attacks import wiener
from fedsplit.audit.gradient_attacks import (
    FLOAT32,
    gradient_conv,
    gradient_dense,
    negative_control,
)
from fedsplit.audit.prior import Prior
from fedsplit.audit.scores import pooled_psnr, psnr
from fedsplit.model.kinds.base import double
from fedsplit.model.layer import FirstLayer

# gradients of linear layers


def layer(kind: str, width: int = 6, **geometry: int) -> FirstLayer:
    torch.manual_seed(0)
    if kind == "conv1d":
        return FirstLayer(nn.Conv1d(4, width, 5, **geometry), nn.ReLU(), (4, 17))
    return FirstLayer(nn.Conv2d(2, width, (3, 2), **geometry), nn.ReLU(), (2, 7, 6))


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
