"""Reconstruction attacks by a server that knows the first layer, the labels and public records of the same kind.

Records are flat rows of n values here. The attacker may know more than is assumed: what these attacks fail to bring
back is not thereby safe.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedsplit.audit.prior import (
    Array,
    Floats,
    Labels,
    Noise,
    Prior,
    Rows,
    class_means,
    classes_of,
    equations_of,
    posterior,
    whiten,
)
from fedsplit.common.arrays import IntArray
from fedsplit.model.kinds.base import double

Public = tuple[Floats, Floats, Labels]  # of public records: releases (P, f), the records (P, n), labels (P,)

_STIFFNESS = 8.0  # of ADMM penalties at first, over the posterior precision
_RELAX = 1.8
_ENOUGH = 1e-5  # of a constraint's unit: when ADMM stops
_BALANCE = 2.0  # ratio of ADMM's residuals at which its penalties change


def wiener(prior: Prior, labels: Labels, rows: Rows, rhs: Rows, noise: Noise) -> Array:
    """Return the most likely records ``(T, n)`` under the class's Gaussian, without box and inequalities.

    Parameters
    ----------
    labels : int array (T,) or None
    rows, rhs : sequences of T arrays (k_i, n) and (k_i,)
        What outputs tell: ``rows[i] @ x_i = rhs[i]``.
    noise : float or sequence of T arrays (k_i,)
        Standard deviation of ``rhs``; 0 is allowed.
    """
    classes, known = classes_of(labels, len(rows)), (rows, rhs, noise)
    return np.stack([posterior(prior, c, *equations_of(known, i))[0].numpy() for i, c in enumerate(classes)])


def map_qp(
    prior: Prior,
    labels: Labels,
    rows: Rows,
    rhs: Rows,
    noise: Noise,
    inequalities: Sequence[tuple[Floats, Floats]] | None = None,
    iterations: int = 1000,
) -> Array:
    """Return the most likely records ``(T, n)`` under the class's Gaussian, within box and inequalities.

    Minimises ``(x - mu)' C^-1 (x - mu) + |(A x - c) / noise|^2`` by over-relaxed ADMM (Boyd et al. 2011, 3.4.3).

    Parameters
    ----------
    labels, rows, rhs, noise
        As for :func:`wiener`.
    inequalities : sequence of T pairs of arrays (q_i, n) and (q_i,), or None
        ``G x <= h``: of outputs known to be zero, or below the least one sent.
    iterations : int
        At most so many; a record stops when nothing moves by more than 1e-5 of its posterior deviation.
    """
    guess = np.empty((len(rows), prior.means.shape[1]))
    box = torch.from_numpy(prior.low), torch.from_numpy(prior.high)
    for i, c in enumerate(classes_of(labels, len(guess))):
        known = torch.from_numpy(prior.covariances[c]), *posterior(prior, c, *equations_of((rows, rhs, noise), i))
        more = inequalities[i] if inequalities is not None else (np.zeros((0, guess.shape[1])), np.zeros(0))
        guess[i] = _constrained(known, box, (double(more[0]), double(more[1])), iterations).numpy()
    return prior.clip(guess)


def _constrained(
    known: tuple[Tensor, Tensor, Tensor], box: tuple[Tensor, Tensor], below: tuple[Tensor, Tensor], iterations: int
) -> Tensor:
    """Return the most likely x ``(n,)`` of N(mean, C - V'V) within the box and ``below[0] @ x <= below[1]``."""
    prior, mean, v = known
    covariance = torch.addmm(prior, v.T, v, alpha=-1)
    # x = mean + unit * e: with each constraint in units of its own posterior deviation all penalties are 1
    unit = _units(prior.diagonal(), covariance.diagonal())
    units = _units(*(((below[0] @ c) * below[0]).sum(dim=1) for c in (prior, covariance)))
    g = below[0] * unit / units[:, None]  # (q, n)
    low = torch.cat([(box[0] - mean) / unit, torch.full_like(units, -torch.inf)])
    high = torch.cat([(box[1] - mean) / unit, (below[1] - below[0] @ mean) / units])
    step = _resolvent(covariance / unit[:, None] / unit, g)
    e, dual = torch.zeros_like(mean), torch.zeros_like(low)
    z = dual.clamp(low, high)
    for number in range(1, iterations + 1):
        pull = z - dual
        e = step @ (pull[: len(e)] + pull[len(e) :] @ g)
        there, before = torch.cat([e, g @ e]), z
        ahead = torch.lerp(z, there, _RELAX) + dual
        z = ahead.clamp(low, high)
        dual = ahead - z
        apart, moved = float((there - z).abs().max()), float((z - before).abs().max())
        if max(apart, moved) < _ENOUGH:
            break
        if number % 100 == 0 and max(apart, moved) > _BALANCE * min(apart, moved):
            finer = 2.0 if apart > moved else 0.5  # penalties are squares of it
            unit, low, high, z, e, dual = unit / finer, low * finer, high * finer, z * finer, e * finer, dual / finer
            step = _resolvent(covariance / unit[:, None] / unit, g)
    return mean + unit * e


def _resolvent(covariance: Tensor, g: Tensor) -> Tensor:
    """Return ``(covariance^-1 + 1 + g'g)^-1`` without inverting a covariance that is almost singular."""
    one = torch.eye(len(covariance), dtype=torch.float64)
    step = one - torch.cholesky_inverse(torch.linalg.cholesky(covariance + one))
    v, _ = whiten(step, g, torch.zeros_like(g[:, 0]), torch.ones_like(g[:, 0]))
    return torch.addmm(step, v.T, v, alpha=-1)


def _units(before: Tensor, after: Tensor) -> Tensor:
    """Return ADMM's unit of each constraint ``(q,)``, from its variance before and after the equations."""
    floor = 1e-6 * after.clamp(min=0).sum() + 1e-10 * before.sum()
    return (after.clamp(min=float(floor) / max(1, len(after)) + 1e-30) / _STIFFNESS).sqrt()


def lmmse(prior: Prior, public: Public, features: Floats, labels: Labels) -> Array:
    """Return linear estimates, within classes, from releases that give no equations.

    The ridge is the best of seven on every tenth public record.

    Parameters
    ----------
    prior : Prior
        What is known before any release.
    public : Public
        Public records' releases ``(P, f)``, the records ``(P, n)`` and their labels.
    features : array (T, f)
        The targets' releases.
    labels : int array (T,), optional

    Returns
    -------
    float64 array (T, n)
    """
    f, x = (np.asarray(values, np.float64) for values in public[:2])
    y = classes_of(public[2], len(x))
    centre, means = class_means(f, y, len(prior.means)), class_means(x, y, len(prior.means))
    inputs, targets, held = (f - centre[y]) / _scale(f), x - means[y], np.arange(len(x)) % 10 == 0
    trials = [(r, _ridge(inputs[~held], targets[~held], r)) for r in (1e-8, 1e-6, 1e-4, 1e-2, 0.1, 1.0, 10.0)]
    errors = [np.square(inputs[held] @ weights - targets[held]).mean() for _, weights in trials]
    weights, c = _ridge(inputs, targets, trials[int(np.argmin(errors))][0]), classes_of(labels, len(features))
    return prior.clip(means[c] + (features - centre[c]) / _scale(f) @ weights)


def _scale(features: Array) -> Array:
    """Return each feature's deviation ``(f,)``, 1 where it is constant."""
    deviation = features.std(axis=0)
    return np.where(deviation > 0, deviation, 1.0)


def _ridge(inputs: Array, targets: Array, ridge: float) -> Array:
    """Return the weights ``(f, n)`` of a ridge regression, the ridge per record."""
    gram = inputs.T @ inputs + ridge * len(inputs) * np.eye(inputs.shape[1])
    return np.asarray(np.linalg.solve(gram, inputs.T @ targets))


def decoder(prior: Prior, public: Public, features: Floats, labels: Labels, *, seed: int, steps: int = 600) -> Array:
    """Return a small network's estimates from releases and labels.

    From public records' own releases it learns how a record differs from the mean of its class. Of every twentieth step
    the best on every tenth public record is used.

    Parameters
    ----------
    prior : Prior
        What is known before any release.
    public : Public
        Public records' releases ``(P, f)``, the records ``(P, n)`` and their labels.
    features : array (T, f)
        The targets' releases.
    labels : int array (T,), optional
    seed : int
        Of torch's random stream.
    steps : int
        Of Adam.

    Returns
    -------
    float64 array (T, n)
    """
    f, y = np.asarray(public[0], np.float64), classes_of(public[2], len(public[1]))

    def inputs(values: Floats, c: IntArray) -> Tensor:  # (., f + classes)
        scaled = (values - f.mean(axis=0)) / _scale(f)
        return torch.from_numpy(np.hstack([scaled, np.eye(len(prior.means))[c]]).astype(np.float32))

    target, c = torch.from_numpy((public[1] - prior.means[y]).astype(np.float32)), classes_of(labels, len(features))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _fit(inputs(f, y), target, steps)
    with torch.no_grad():
        return prior.clip(prior.means[c] + net(inputs(features, c)).numpy().astype(np.float64))


def _fit(x: Tensor, target: Tensor, steps: int) -> nn.Module:
    """Train a network ``(P, f) -> (P, n)``, in torch's own random stream."""
    last = nn.Linear(256, target.shape[1])
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    net = nn.Sequential(nn.Dropout(0.2), nn.Linear(x.shape[1], 256), nn.ReLU(), nn.Dropout(0.3), last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1)
    held = torch.arange(len(x)) % 10 == 0
    train, best, state = torch.nonzero(~held)[:, 0], torch.inf, net.state_dict()
    for step in range(steps + 1):
        if step % 20 == 0:
            with torch.no_grad():
                error = float(nn.functional.mse_loss(net.eval()(x[held]), target[held]))
            if error < best:
                best, state = error, {k: v.clone() for k, v in net.state_dict().items()}
            net.train()
        rows = train[torch.randint(len(train), (128,))]
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x[rows]), target[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    net.load_state_dict(state)
    net.eval()
    return net
