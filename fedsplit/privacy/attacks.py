"""Reconstruction attacks by a server that knows the first layer, the labels and public records of the same kind.

Records are flat rows of n values here. The attacker may know more than is assumed: what these attacks fail to bring
back is not thereby safe.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsplit.model import FirstLayer
from fedsplit.packing import FloatArray, IntArray
from fedsplit.privacy.scores import psnr

Array = NDArray[np.float64]
Floats = NDArray[np.floating]
Labels = NDArray[np.integer] | None  # None: no classes, as in regression
Rows = Sequence[Floats]  # one array per record
Noise = float | Sequence[Floats]
Public = tuple[Floats, Floats, Labels]  # of public records: releases (P, f), the records (P, n), labels (P,)

FLOAT32 = 2.0**-24  # relative rounding error of a float32 gradient
_FEW = 10  # public records below which a class has no mean and covariance of its own
_SHRINK = 100.0  # public records at which a class's own covariance weighs as much as the pooled one
_RIDGE = 0.02  # of the mean variance, added to every covariance
_ATOM = 0.01  # share of public records at the end of a feature's range that makes it a limit
_STIFFNESS = 8.0  # of ADMM penalties at first, over the posterior precision
_RELAX = 1.8
_ENOUGH = 1e-5  # of a constraint's unit: when ADMM stops
_BALANCE = 2.0  # ratio of ADMM's residuals at which its penalties change


@dataclass(frozen=True)
class Prior:
    """What public records tell of a private one.

    Attributes
    ----------
    means, covariances : float64 arrays (classes, n) and (classes, n, n)
        Of each class; covariances are shrunk towards the pooled one and positive definite.
    mean, pooled : float64 arrays (n,) and (n, n)
        The mean of all records, the covariance within classes.
    low, high : float64 arrays (n,)
        Where records lie.
    stated : bool
        Whether this box is certain, not guessed from public records.
    """

    means: Array
    covariances: Array
    mean: Array
    pooled: Array
    low: Array
    high: Array
    stated: bool

    @classmethod
    def of(cls, x: Floats, y: Labels, box: tuple[float, float] | None = None, classes: int = 1) -> "Prior":
        """Estimate from public records ``(N, n)`` and their labels ``(N,)``.

        Parameters
        ----------
        box : (low, high) or None
            As stated, such as 0 and 1 for images; None takes a feature's range, open where few records reach its end.
        classes : int
            At least so many: private records can be of classes that no public record has.
        """
        n, own, values = x.shape[1], _classes_of(y, len(x)), np.asarray(x, np.float64)
        counts = np.bincount(own, minlength=classes)
        mean, means = values.mean(axis=0), _class_means(values, own, len(counts))
        within, around = values - means[own], values - mean
        pooled, spread = within.T @ within / len(x), around.T @ around / len(x)
        ridge = np.eye(n) * max(_RIDGE * np.trace(pooled) / n, 1e-8)
        covariances = np.empty((len(counts), n, n))
        for c, count in enumerate(counts):
            shrunk = (within[own == c].T @ within[own == c] + _SHRINK * pooled) / (count + _SHRINK)
            covariances[c] = (shrunk if count >= _FEW else spread) + ridge
        low, high = (_limit(values), -_limit(-values)) if box is None else (np.full(n, box[0]), np.full(n, box[1]))
        return cls(means, covariances, mean, pooled + ridge, low, high, box is not None)

    @classmethod
    def blank(cls, n: int) -> "Prior":
        """Return the prior of an attacker without public records: mean 0, variance 1, no box."""
        zero, one, end = np.zeros(n), np.eye(n), np.full(n, np.inf)
        return cls(zero[None], one[None], zero, one, -end, end, False)

    def clip(self, x: Array) -> Array:
        """Bring records ``(N, n)`` into the box."""
        return np.clip(x, self.low, self.high)

    @property
    def magnitude(self) -> float:
        """The root mean square of a record's values."""
        return float(np.sqrt(np.square(self.means).mean() + np.diagonal(self.pooled).mean()))


def _double(values: Floats) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float64))


def _classes_of(labels: Labels, count: int) -> IntArray:
    return np.zeros(count, np.int64) if labels is None else np.asarray(labels, np.int64)


def _class_means(x: Array, y: IntArray, classes: int) -> Array:
    """Return ``(classes, n)``; a class of few records gets the mean of all."""
    own = [x[y == c] for c in range(classes)]
    return np.stack([(part if len(part) >= _FEW else x).mean(axis=0) for part in own])


def _limit(x: Array) -> Array:
    """Return each feature's least value ``(n,)``, -inf where hardly a record has it: others may well go below."""
    least = x.min(axis=0)
    return np.where((x == least).sum(axis=0) >= max(2.0, _ATOM * len(x)), least, -np.inf)


def _equations(equations: tuple[Rows, Rows, Noise], i: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return record i's rows ``(k, n)``, right-hand side and noise ``(k,)``."""
    rows, rhs, noise = _double(equations[0][i]), _double(equations[1][i]), equations[2]
    return rows, rhs, torch.full_like(rhs, noise) if isinstance(noise, int | float) else _double(noise[i])


def _whiten(covariance: Tensor, rows: Tensor, left: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return V ``(k, n)`` and t ``(k,)`` so that N(0, C) given ``rows x = left + noise`` is N(V't, C - V'V)."""
    cross = rows @ covariance  # (k, n)
    gram = cross @ rows.T
    floor = 1e-12 * gram.trace() / max(1, len(rows)) + 1e-30  # rows can depend on each other, or be zero
    factor = torch.linalg.cholesky(gram + torch.diag(noise.square() + floor))
    both = torch.linalg.solve_triangular(factor, torch.hstack([cross, left[:, None]]), upper=False)
    return both[:, :-1], both[:, -1]


def _posterior(prior: Prior, c: int, rows: Tensor, rhs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean ``(n,)`` of a record of class c given its equations, and V: its covariance is C - V'V."""
    mean = torch.from_numpy(prior.means[c])
    v, told = _whiten(torch.from_numpy(prior.covariances[c]), rows, rhs - rows @ mean, noise)
    return mean + v.T @ told, v


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
    classes, known = _classes_of(labels, len(rows)), (rows, rhs, noise)
    return np.stack([_posterior(prior, c, *_equations(known, i))[0].numpy() for i, c in enumerate(classes)])


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
    for i, c in enumerate(_classes_of(labels, len(guess))):
        known = torch.from_numpy(prior.covariances[c]), *_posterior(prior, c, *_equations((rows, rhs, noise), i))
        more = inequalities[i] if inequalities is not None else (np.zeros((0, guess.shape[1])), np.zeros(0))
        guess[i] = _constrained(known, box, (_double(more[0]), _double(more[1])), iterations).numpy()
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
    v, _ = _whiten(step, g, torch.zeros_like(g[:, 0]), torch.ones_like(g[:, 0]))
    return torch.addmm(step, v.T, v, alpha=-1)


def _units(before: Tensor, after: Tensor) -> Tensor:
    """Return ADMM's unit of each constraint ``(q,)``, from its variance before and after the equations."""
    floor = 1e-6 * after.clamp(min=0).sum() + 1e-10 * before.sum()
    return (after.clamp(min=float(floor) / max(1, len(after)) + 1e-30) / _STIFFNESS).sqrt()


def lmmse(prior: Prior, public: Public, features: Floats, labels: Labels) -> Array:
    """Return linear estimates ``(T, n)`` within classes from releases ``(T, f)`` that give no equations.

    The ridge is the best of seven on every tenth public record.
    """
    f, x = (np.asarray(values, np.float64) for values in public[:2])
    y = _classes_of(public[2], len(x))
    centre, means = _class_means(f, y, len(prior.means)), _class_means(x, y, len(prior.means))
    inputs, targets, held = (f - centre[y]) / _scale(f), x - means[y], np.arange(len(x)) % 10 == 0
    trials = [(r, _ridge(inputs[~held], targets[~held], r)) for r in (1e-8, 1e-6, 1e-4, 1e-2, 0.1, 1.0, 10.0)]
    errors = [np.square(inputs[held] @ weights - targets[held]).mean() for _, weights in trials]
    weights, c = _ridge(inputs, targets, trials[int(np.argmin(errors))][0]), _classes_of(labels, len(features))
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
    """Return a small network's estimates ``(T, n)`` from releases ``(T, f)`` and labels.

    It learns from public records' own releases, in ``steps`` of Adam, to tell how a record differs from the mean of
    its class; of every twentieth step the best on every tenth public record is used.
    """
    f, y = np.asarray(public[0], np.float64), _classes_of(public[2], len(public[1]))

    def inputs(values: Floats, c: IntArray) -> Tensor:  # (., f + classes)
        scaled = (values - f.mean(axis=0)) / _scale(f)
        return torch.from_numpy(np.hstack([scaled, np.eye(len(prior.means))[c]]).astype(np.float32))

    target, c = torch.from_numpy((public[1] - prior.means[y]).astype(np.float32)), _classes_of(labels, len(features))
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


def gradient_dense(
    prior: Prior,
    labels: Labels,
    deltas: Sequence[Floats],
    sums: Sequence[Floats],
    activations: tuple[Rows, Rows, Noise] | None = None,
    *,
    precision: float = FLOAT32,
    iterations: int = 200,
) -> Array:
    """Return the most likely records ``(N, n)`` given a linear layer's gradients and the activations, if any.

    Records are whitened by the pooled covariance. The gradients' equations, made orthonormal by an SVD of all deltas
    side by side, are solved exactly; what they leave open is found from the activations' by conjugate gradients. On
    equations that are not orthonormal these stall far from the solution: a false "safe".

    Parameters
    ----------
    deltas, sums : sequences of arrays (N, m) and (m, n)
        One of each per gradient release of these records: dW = delta' x, summed, without the bias.
    activations : (rows, rhs, noise) or None
        As for :func:`wiener`.
    precision : float
        Relative rounding error of ``sums``: 2^-24 for float32, 2^-11 for float16.
    """
    centre = torch.from_numpy(prior.means[_classes_of(labels, len(deltas[0]))])
    values, axes = torch.linalg.eigh(torch.from_numpy(prior.pooled))
    colour = axes * values.sqrt()  # x = centre + colour w, w white
    u, told, noise = _orthonormal(np.hstack(deltas), np.vstack(sums), precision * prior.magnitude)
    trust = 1 / (1 + noise.square()[:, None] / values)  # (r, n)

    def tell(w: Tensor) -> Tensor:  # (N, n): the part of w that the gradients show, as far as they can be trusted
        return torch.mm(u, trust * torch.mm(u.T, w))

    w = u @ (trust * ((told - u.T @ centre) @ axes / values.sqrt()))
    if activations is not None:
        q, rest = _white_rows(activations, centre, colour)
        pull = _pull(tell, q, rest - torch.einsum("ikn,in->ik", q, w), iterations)
        w += pull - tell(pull)
    guess: Array = (centre + w @ colour.T).numpy()
    return prior.clip(guess) if prior.stated else guess


def _orthonormal(delta: Array, sums: Array, error: float) -> tuple[Tensor, Tensor, Tensor]:
    """Turn ``delta' x = sums`` into ``u' x = told`` with orthonormal u ``(N, r)``.

    The third is the deviation ``(r,)`` of ``told``, that of ``sums`` being ``error`` times the norm of a unit's deltas.
    """
    norms = np.linalg.norm(delta.astype(np.float64), axis=0)
    seen = norms > 0
    u, s, vt = torch.linalg.svd(_double(delta[:, seen] / norms[seen]), full_matrices=False)
    keep = s > 1e-12 * s.sum()
    return u[:, keep], vt[keep] @ _double(sums[seen] / norms[seen, None]) / s[keep, None], error / s[keep]


def _white_rows(activations: tuple[Rows, Rows, Noise], centre: Tensor, colour: Tensor) -> tuple[Tensor, Tensor]:
    """Return each record's whitened equations ``q (N, k, n)`` and right-hand sides ``(N, k)``, padded with zeros.

    ``q q'`` and the noise's covariance add up to 1.
    """
    longest, one = max(len(rhs) for rhs in activations[1]), torch.eye(len(colour), dtype=torch.float64)
    q = torch.zeros(len(centre), longest, len(colour), dtype=torch.float64)
    rest = torch.zeros(q.shape[:2], dtype=torch.float64)
    for i in range(len(centre)):
        rows, rhs, noise = _equations(activations, i)
        q[i, : len(rhs)], rest[i, : len(rhs)] = _whiten(one, rows @ colour, rhs - rows @ centre[i], noise)
    return q, rest


def _pull(tell: Callable[[Tensor], Tensor], q: Tensor, rest: Tensor, iterations: int) -> Tensor:
    """Return ``q' v (N, n)`` for the v ``(N, k)`` that solves ``v - q tell(q' v) = rest``, by conjugate gradients."""
    v, residual, direction = torch.zeros_like(rest), rest.clone(), rest.clone()
    size = float(rest.square().sum())
    enough = 1e-16 * size
    for _ in range(iterations):
        if size <= enough:
            break
        image = direction - torch.einsum("ikn,in->ik", q, tell(torch.einsum("ikn,ik->in", q, direction)))
        bend = float((direction * image).sum())
        if bend <= 0:  # what is left is rounding
            break
        step = size / bend
        v += step * direction
        residual -= step * image
        size, before = float(residual.square().sum()), size
        direction = residual + size / before * direction
    return torch.einsum("ikn,ik->in", q, v)


def conv_operator(first_layer: FirstLayer, delta: Floats) -> Array:
    """Return G ``(n, p)`` of a record: its part in the gradient of the convolution's weights is ``G' x``.

    Parameters
    ----------
    delta : array (*cut_shape)
    """
    c, shape = first_layer.layer, first_layer.input_shape
    assert isinstance(c, nn.Conv1d | nn.Conv2d)
    kernel, dilation, stride = ((1, *v)[-2:] for v in (c.kernel_size, c.dilation, c.stride))
    # which values each position sees, numbered from 1; 0 is padding
    numbers = torch.arange(1.0, math.prod(shape) + 1, dtype=torch.float64).reshape(1, shape[0], -1, shape[-1])
    seen = nn.functional.unfold(numbers, kernel, dilation, (0, *c.padding)[-2:], stride)[0].long()
    seen = seen.reshape(c.groups, -1, seen.shape[1])  # (groups, channels x kernel, positions)
    d = _double(delta).reshape(c.groups, -1, seen.shape[2])  # (groups, filters, positions)
    g = torch.zeros(numbers.numel() + 1, *d.shape[:2], seen.shape[1], dtype=torch.float64)
    for group in range(c.groups):
        for weight, places in enumerate(seen[group]):
            g[places, group, :, weight] = d[group].T
    return g[1:].flatten(1).numpy()


def gradient_conv(
    prior: Prior,
    labels: Labels,
    operator: Callable[[int], Array],
    sums: Floats,
    count: int,
    activations: tuple[Rows, Rows, Noise] | None = None,
    *,
    precision: float = FLOAT32,
) -> Array:
    """Return the most likely records ``(count, n)`` given linear sums over them and the activations, if any.

    Conditions exactly, first on the activations, then on the sums by way of their covariance ``(p, p)``.

    Parameters
    ----------
    operator : function of i
        Returns G ``(n, p)`` of record i, as :func:`conv_operator` does; several releases stand side by side.
    sums : array (p,)
        The sum of ``G' x`` over the records.
    activations, precision
        As for :func:`gradient_dense`.
    """
    classes = _classes_of(labels, count)
    given = activations or ([np.zeros((0, prior.means.shape[1]))] * count, [np.zeros(0)] * count, 0.0)
    left, gram, sizes, known = _double(sums), torch.zeros(1), torch.zeros(1), []
    for i, c in enumerate(classes):
        mean, v = _posterior(prior, c, *_equations(given, i))
        known.append((mean, torch.from_numpy(prior.covariances[c]), v))
        g = torch.from_numpy(operator(i))
        left -= g.T @ mean
        gram, sizes = gram + g.T @ _spread(known[i], g), sizes + g.square().sum(dim=0)
    told = _solve(gram, left, precision * prior.magnitude * sizes.sqrt())
    pulls = [_spread(known[i], torch.from_numpy(operator(i)) @ told) for i in range(count)]
    guess = np.stack([(mean + pull).numpy() for (mean, _, _), pull in zip(known, pulls, strict=True)])
    return prior.clip(guess) if prior.stated else guess


def _spread(known: tuple[Tensor, Tensor, Tensor], g: Tensor) -> Tensor:
    """Multiply by the posterior covariance C - V'V."""
    _, covariance, v = known
    return covariance @ g - v.T @ (v @ g)


def _solve(gram: Tensor, left: Tensor, noise: Tensor) -> Tensor:
    """Return ``(gram + noise^2)^-1 left`` with as much more noise as rounding asks for."""
    noise = torch.where(noise > 0, noise, noise.max())
    gram = gram / noise[:, None] / noise
    more, failed = max(1.0, 2.0**-52 * float(torch.linalg.matrix_norm(gram, torch.inf))), 1
    while failed:
        factor, info = torch.linalg.cholesky_ex(gram + more * torch.eye(len(gram), dtype=torch.float64))
        failed, more = int(info), 4 * more
    return torch.cholesky_solve((left / noise)[:, None], factor)[:, 0] / noise


def negative_control(
    first_layer: FirstLayer, weights: Mapping[str, FloatArray], x: FloatArray, seed: int, peak: float = 1.0
) -> float:
    """Return the PSNR in dB of the *worst* of the records that one raw float32 gradient brings back, without a prior.

    Where that gradient decides the records ``x (N, *input_shape)``, as for N far below the units of a linear layer or
    two windows of a wide convolution, less than 60 dB means that the attacks are broken.
    """
    delta = np.random.default_rng(seed).normal(size=(len(x), *first_layer.cut_shape)).astype(np.float32)
    delta *= first_layer.derivative(first_layer.pre_activations(weights, x).numpy())
    flat = x.reshape(len(x), -1)
    sums = first_layer.gradient(x, delta)[: math.prod(first_layer.shapes["weight"])]
    prior = Prior.blank(flat.shape[1])
    if isinstance(first_layer.layer, nn.Linear):
        guess = gradient_dense(prior, None, [delta], [sums.reshape(delta.shape[1], -1)])
    else:
        guess = gradient_conv(prior, None, lambda i: conv_operator(first_layer, delta[i]), sums, len(x))
    return float(psnr(flat, guess, peak).min())
