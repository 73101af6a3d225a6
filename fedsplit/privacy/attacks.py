"""Reconstruction attacks by a server that knows the first layer, the labels and public records of the same kind.

Records are flat float64 rows ``(records, n)`` here. What a release tells of record i are *equations* ``rows[i] @ x =
rhs[i]`` (outputs sent, ``noise`` their standard deviation), inequalities (outputs known to be small), or, through
the gradient, linear functionals of all records together. The attacker may know more than is assumed here: what these
attacks fail to bring back is not thereby safe.
"""

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
Noise = float | Sequence[NDArray[np.floating]]
Rows = Sequence[NDArray[np.floating]]

FLOAT32 = 2.0**-24  # relative rounding error of a float32 gradient
_FEW = 10  # public records below which a class has no mean of its own
_SHRINK = 100.0  # public records at which a class's own covariance weighs as much as the pooled one
_RIDGE = 0.02  # of the mean variance, added to every covariance
_STIFFNESS = 4.0  # ADMM penalties over the posterior precision; 1 and 16 needed 3 to 5 times the iterations
_RELAX = 1.6


@dataclass(frozen=True)
class Prior:
    """What public records tell of a private one.

    Attributes
    ----------
    means, covariances : float64 arrays (classes, n) and (classes, n, n)
        Of each class. A class's covariance is shrunk towards the pooled one; all are positive definite.
    mean, pooled : float64 arrays (n,) and (n, n)
        Of all records; the covariance within classes.
    low, high : float64 arrays (n,)
        The box that records lie in.
    stated : bool
        Whether the box is known, not the range of public records, which a record can leave.
    """

    means: Array
    covariances: Array
    mean: Array
    pooled: Array
    low: Array
    high: Array
    stated: bool

    @classmethod
    def of(
        cls,
        x: NDArray[np.floating],
        y: NDArray[np.integer] | None,
        box: tuple[float, float] | None = None,
        classes: int = 0,
    ) -> "Prior":
        """Estimate from public records.

        Parameters
        ----------
        x : array (N, n)
        y : int array (N,) or None
            None (regression) makes one class. A class of fewer than 10 records gets the mean and covariance of all.
        box : pair of floats or None
            Stated limits, such as 0 and 1 for images; None takes each feature's range in ``x``.
        classes : int
            How many there are at least: private records can be of classes that ``x`` does not show.
        """
        x = np.asarray(x, np.float64)
        y = np.zeros(len(x), np.int64) if y is None else np.asarray(y)
        counts = np.bincount(y, minlength=max(classes, 1))
        mean, means = x.mean(axis=0), _class_means(x, y, len(counts))
        n, within, total = x.shape[1], x - means[y], x - mean
        pooled, spread = within.T @ within / len(x), total.T @ total / len(x)
        ridge = np.eye(n) * max(_RIDGE * np.trace(pooled) / n, 1e-8)
        covariances = np.empty((len(counts), n, n))
        for c, count in enumerate(counts):
            own = within[y == c].T @ within[y == c] / (count + _SHRINK)
            covariances[c] = (own + _SHRINK / (count + _SHRINK) * pooled if count >= _FEW else spread) + ridge
        low, high = (x.min(axis=0), x.max(axis=0)) if box is None else (np.full(n, box[0]), np.full(n, box[1]))
        return cls(means, covariances, mean, pooled + ridge, low, high, box is not None)

    @classmethod
    def blank(cls, n: int) -> "Prior":
        """Return the prior of an attacker without public records: mean 0, variance 1, no box."""
        zero, one, limit = np.zeros(n), np.eye(n), np.full(n, np.inf)
        return cls(zero[None], one[None], zero, one, -limit, limit, False)

    def clip(self, x: Array) -> Array:
        """Bring records ``(N, n)`` into the box."""
        return np.clip(x, self.low, self.high)


def _class_means(x: Array, y: NDArray[np.integer], classes: int) -> Array:
    """Return ``(classes, n)``; a class of few records gets the mean of all."""
    own = [x[y == c] for c in range(classes)]
    return np.stack([(part if len(part) >= _FEW else x).mean(axis=0) for part in own])


def _classes_of(labels: NDArray[np.integer] | None, count: int) -> IntArray:
    return np.zeros(count, np.int64) if labels is None else np.asarray(labels, np.int64)


def _double(values: NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float64))


def _deviation(noise: Noise, i: int, rows: int) -> Tensor:
    return torch.full((rows,), noise, dtype=torch.float64) if isinstance(noise, int | float) else _double(noise[i])


def _posterior(mean: Tensor, covariance: Tensor, rows: Tensor, rhs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean ``(n,)`` and ``V (k, n)`` of N(mean, C) given ``rows x = rhs + noise``: covariance C - V'V."""
    cross = rows @ covariance  # (k, n)
    gram = cross @ rows.T
    floor = 1e-12 * gram.diagonal().mean() if len(rows) else 0.0  # rows can depend on each other
    factor = torch.linalg.cholesky(gram + torch.diag(noise.square() + floor))
    v = torch.linalg.solve_triangular(factor, cross, upper=False)
    told = torch.linalg.solve_triangular(factor, (rhs - rows @ mean)[:, None], upper=False)[:, 0]
    return mean + v.T @ told, v


def wiener(prior: Prior, labels: NDArray[np.integer] | None, rows: Rows, rhs: Rows, noise: Noise) -> Array:
    """Return the most likely records ``(T, n)`` under the class's Gaussian, without box and inequalities.

    Parameters
    ----------
    labels : int array (T,) or None
    rows, rhs : sequences of T arrays (k_i, n) and (k_i,)
    noise : float or sequence of T arrays (k_i,)
        Standard deviation of ``rhs``; 0 is allowed.
    """
    guess = np.empty((len(rows), prior.means.shape[1]))
    for i, c in enumerate(_classes_of(labels, len(rows))):
        own = _double(rows[i])
        mean, covariance = torch.from_numpy(prior.means[c]), torch.from_numpy(prior.covariances[c])
        guess[i] = _posterior(mean, covariance, own, _double(rhs[i]), _deviation(noise, i, len(own)))[0].numpy()
    return guess


def map_qp(
    prior: Prior,
    labels: NDArray[np.integer] | None,
    rows: Rows,
    rhs: Rows,
    noise: Noise,
    inequalities: Sequence[tuple[NDArray[np.floating], NDArray[np.floating]]] | None = None,
    iterations: int = 400,
) -> Array:
    """Return the most likely records ``(T, n)`` under the class's Gaussian within box and inequalities.

    Minimises ``(x - mu)' C^-1 (x - mu) / 2 + |(A x - c) / noise|^2 / 2`` by over-relaxed ADMM (Boyd et al. 2011,
    section 3.4.3). Penalties in proportion to each constraint's *posterior* precision make it converge in 50 to 100
    iterations.

    Parameters
    ----------
    labels, rows, rhs, noise
        As for :func:`wiener`.
    inequalities : sequence of T pairs (array (q_i, n), array (q_i,)) or None
        ``G x <= h``: relu outputs known to be zero, or below the least one sent.
    iterations : int
        At most so many; a record stops when nothing moves by more than 1e-5 of its posterior deviation.
    """
    guess = np.empty((len(rows), prior.means.shape[1]))
    low, high = torch.from_numpy(prior.low), torch.from_numpy(prior.high)
    for i, c in enumerate(_classes_of(labels, len(rows))):
        own = _double(rows[i])
        covariance = torch.from_numpy(prior.covariances[c])
        deviation = _deviation(noise, i, len(own))
        mean, v = _posterior(torch.from_numpy(prior.means[c]), covariance, own, _double(rhs[i]), deviation)
        covariance = torch.addmm(covariance, v.T, v, alpha=-1)
        if inequalities is None:
            more, limits = own[:0], own.new_zeros(0)
        else:
            more, limits = _double(inequalities[i][0]), _double(inequalities[i][1])
        guess[i] = _constrained(mean, covariance, (low, high), more, limits, iterations).numpy()
    return prior.clip(guess)


def _constrained(
    mean: Tensor, covariance: Tensor, box: tuple[Tensor, Tensor], more: Tensor, limits: Tensor, iterations: int
) -> Tensor:
    """Return the most likely x ``(n,)`` of N(mean, covariance) in ``box`` with ``more @ x <= limits``."""
    # in units of every constraint's own deviation, x = mean + unit * e, all penalties are 1
    variance = covariance.diagonal()
    unit = (variance.clamp(min=1e-6 * float(variance.mean())) / _STIFFNESS).sqrt()
    own = torch.einsum("qi,ij,qj->q", more, covariance, more)
    units = (own.clamp(min=1e-6 * float(own.mean())) / _STIFFNESS).sqrt() if len(more) else limits
    g = more * unit / units[:, None]  # (q, n)
    low = torch.cat([(box[0] - mean) / unit, torch.full_like(limits, -torch.inf)])
    high = torch.cat([(box[1] - mean) / unit, (limits - more @ mean) / units])
    # step = (covariance^-1 + 1 + g'g)^-1, without inverting a covariance that is almost singular
    one = torch.eye(len(mean), dtype=torch.float64)
    step = one - torch.cholesky_inverse(torch.linalg.cholesky(covariance / unit[:, None] / unit + one))
    if len(more):
        across = g @ step
        factor = torch.linalg.cholesky(across @ g.T + torch.eye(len(g), dtype=g.dtype))
        told = torch.linalg.solve_triangular(factor, across, upper=False)
        step = torch.addmm(step, told.T, told, alpha=-1)
    e, z, dual = torch.zeros_like(mean), torch.zeros_like(low).clamp(low, high), torch.zeros_like(low)
    n = len(mean)
    for _ in range(iterations):
        pull = z - dual
        e = step @ (pull[:n] + pull[n:] @ g)
        there, before = torch.cat([e, g @ e]), z
        ahead = torch.lerp(z, there, _RELAX) + dual
        z = ahead.clamp(low, high)
        dual = ahead - z
        if max(float((z - before).abs().max()), float((there - z).abs().max())) < 1e-5:
            break
    return mean + unit * e


def lmmse(
    prior: Prior,
    public: tuple[NDArray[np.floating], NDArray[np.floating], NDArray[np.integer] | None],
    features: NDArray[np.floating],
    labels: NDArray[np.integer] | None,
) -> Array:
    """Return linear estimates ``(T, n)`` from releases of any kind, within classes; for when there are no equations.

    Parameters
    ----------
    public : (array (P, f), array (P, n), int array (P,) or None)
        Public records' own releases, the records, their labels. The ridge is the best of six on every tenth record.
    features, labels : array (T, f), int array (T,) or None
        The releases under attack.
    """
    f, x, y = (
        np.asarray(public[0], np.float64),
        np.asarray(public[1], np.float64),
        _classes_of(public[2], len(public[1])),
    )
    classes = len(prior.means)
    centre, means, scale = _class_means(f, y, classes), _class_means(x, y, classes), _scale(f)
    inputs, targets = (f - centre[y]) / scale, x - means[y]
    held = np.arange(len(x)) % 10 == 0
    ridges = 10.0 ** np.arange(-4, 2)
    errors = [np.square(inputs[held] @ w - targets[held]).mean() for w in _ridge(inputs[~held], targets[~held], ridges)]
    (weights,) = _ridge(inputs, targets, ridges[[int(np.argmin(errors))]])
    c = _classes_of(labels, len(features))
    return prior.clip(means[c] + (features - centre[c]) / scale @ weights)


def _scale(features: Array) -> Array:
    """Return each feature's deviation ``(f,)``, 1 where it is constant."""
    deviation = features.std(axis=0)
    return np.where(deviation > 0, deviation, 1.0)


def _ridge(inputs: Array, targets: Array, ridges: Array) -> list[Array]:
    """Return weights ``(f, n)`` for each ridge, a multiple of the inputs' number."""
    values, vectors = np.linalg.eigh(inputs.T @ inputs)
    told = vectors.T @ (inputs.T @ targets)
    return [vectors @ (told / (values.clip(0) + r * len(inputs))[:, None]) for r in ridges]


def decoder(
    prior: Prior,
    public: tuple[NDArray[np.floating], NDArray[np.floating], NDArray[np.integer] | None],
    features: NDArray[np.floating],
    labels: NDArray[np.integer] | None,
    *,
    seed: int,
    steps: int = 600,
) -> Array:
    """Return a small network's estimates ``(T, n)``: trained on public records' releases, early stopping.

    Parameters
    ----------
    public, features, labels
        As for :func:`lmmse`; every tenth public record decides when to stop.
    steps : int
        Of Adam, on 128 records each; the best of every 50 is used.
    """
    y, classes = _classes_of(public[2], len(public[1])), len(prior.means)
    f = np.asarray(public[0], np.float64)
    centre, scale = f.mean(axis=0), _scale(f)

    def inputs(values: NDArray[np.floating], c: IntArray) -> Tensor:  # (., f + classes)
        return torch.from_numpy(np.hstack([(values - centre) / scale, np.eye(classes)[c]]).astype(np.float32))

    x, target = inputs(f, y), torch.from_numpy((public[1] - prior.means[y]).astype(np.float32))
    c = _classes_of(labels, len(features))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _fit(x, target, steps)
    with torch.no_grad():
        return prior.clip(prior.means[c] + net(inputs(features, c)).numpy().astype(np.float64))


def _fit(x: Tensor, target: Tensor, steps: int) -> nn.Module:
    """Train ``(P, f) -> (P, n)`` from torch's own random stream."""
    net = nn.Sequential(nn.Linear(x.shape[1], 512), nn.ReLU(), nn.Dropout(0.2), nn.Linear(512, target.shape[1]))
    held = torch.arange(len(x)) % 10 == 0
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    best, state = torch.inf, net.state_dict()
    train = torch.nonzero(~held)[:, 0]
    for step in range(1, steps + 1):
        rows = train[torch.randint(len(train), (128,))]
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x[rows]), target[rows]).backward()
        optimizer.step()
        if step % 50 == 0:
            net.eval()
            with torch.no_grad():
                error = float(nn.functional.mse_loss(net(x[held]), target[held]))
            if error < best:
                best, state = error, {k: v.clone() for k, v in net.state_dict().items()}
            net.train()
    net.load_state_dict(state)
    return net.eval()


def gradient_dense(
    prior: Prior,
    labels: NDArray[np.integer] | None,
    deltas: Sequence[NDArray[np.floating]],
    sums: Sequence[NDArray[np.floating]],
    activations: tuple[Rows, Rows, Noise] | None = None,
    *,
    precision: float = FLOAT32,
    iterations: int = 500,
) -> Array:
    """Return the most likely records ``(N, n)`` given gradients of a linear layer, and their activations, if any.

    Unknowns are whitened by the pooled covariance, the gradients' equations orthonormal by an SVD of all deltas side
    by side and solved exactly; what they leave open is left to each record's own orthonormal equations, by conjugate
    gradients. On the raw equations conjugate gradients stall far from the solution: a false "safe".

    Parameters
    ----------
    deltas, sums : sequences of arrays (N, m) and (m, n)
        One of each per gradient release of these N records: ``dW = delta.T @ x``, summed, without the bias.
    activations : (rows, rhs, noise) or None
        As for :func:`wiener`.
    precision : float
        Relative rounding error of ``sums``: 2^-24 for float32, 2^-11 for float16.
    """
    mean = prior.means[_classes_of(labels, len(deltas[0]))]
    values, axes = np.linalg.eigh(prior.pooled)
    colour = torch.from_numpy(axes * np.sqrt(values))  # x = mean + colour @ w, w white
    spectrum, centre = torch.from_numpy(values), torch.from_numpy(mean)
    u, told, noise = _orthonormal(np.hstack(deltas), np.vstack(sums), mean, precision * _magnitude(prior))
    white = told @ torch.from_numpy(axes) / spectrum.sqrt()  # (r, n) = u' w + noise
    trust = 1 / (1 + noise.square()[:, None] / spectrum)  # (r, n)
    w = u @ (trust * white)
    if activations is not None:
        q, rest, floor = _white_rows(activations, centre, colour)
        w = _condition(w, lambda v: v - u @ (trust * (u.T @ v)), (q, rest, floor), iterations)
    guess: Array = (centre + w @ colour.T).numpy()
    return prior.clip(guess) if prior.stated else guess


def _magnitude(prior: Prior) -> float:
    """Return the root mean square of a record's values."""
    return float(np.sqrt(np.square(prior.means).mean() + np.diagonal(prior.pooled).mean()))


def _orthonormal(delta: Array, dw: Array, mean: Array, error: float) -> tuple[Tensor, Tensor, Tensor]:
    """Turn ``delta.T @ x = dw`` into ``u.T @ (x - mean) = told`` with orthonormal u ``(N, r)``.

    The third is the standard deviation ``(r,)`` of ``told``, when ``dw`` has a rounding error of ``error`` times the
    norm of its unit's deltas.
    """
    norms = np.linalg.norm(delta, axis=0)
    delta, dw = delta[:, norms > 0] / norms[norms > 0], dw[norms > 0] / norms[norms > 0, None]
    u, s, vt = torch.linalg.svd(_double(delta), full_matrices=False)
    keep = s > 1e-12 * s.max() if len(s) else s > 0
    u, s, vt = u[:, keep], s[keep], vt[keep]
    return u, vt @ _double(dw) / s[:, None] - u.T @ torch.from_numpy(mean), error / s


def _white_rows(activations: tuple[Rows, Rows, Noise], centre: Tensor, colour: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn each record's equations into orthonormal ``q (N, k, n)`` with ``q w = rest (N, k) + noise``.

    The third is the noise's variance ``(N, k)``; records with fewer equations are filled up with zero rows.
    """
    rows, rhs, noise = activations
    longest = max(len(r) for r in rows)
    q = torch.zeros(len(rows), longest, centre.shape[1], dtype=torch.float64)
    rest, variance = torch.zeros(q.shape[:2], dtype=torch.float64), torch.ones(q.shape[:2], dtype=torch.float64)
    for i in range(len(rows)):
        own = _double(rows[i])
        white, left = own @ colour, _double(rhs[i]) - own @ centre[i]
        deviation = _deviation(noise, i, len(own)).clamp(min=FLOAT32 * float(white.norm()) / max(1, len(own)) ** 0.5)
        u, s, vt = torch.linalg.svd(white / deviation[:, None], full_matrices=False)
        u, s, vt = u[:, s > 0], s[s > 0], vt[s > 0]
        q[i, : len(s)], rest[i, : len(s)], variance[i, : len(s)] = vt, u.T @ (left / deviation) / s, s**-2
    return q, rest, variance


def _condition(
    w: Tensor, leave: Callable[[Tensor], Tensor], equations: tuple[Tensor, Tensor, Tensor], iterations: int
) -> Tensor:
    """Return the mean ``(N, n)`` of a Gaussian of mean w and covariance ``leave``, given ``q w = rest + noise``."""
    q, rest, variance = equations

    def apply(v: Tensor) -> Tensor:  # (N, k) -> (N, n) -> (N, k)
        return torch.einsum("ikn,in->ik", q, leave(torch.einsum("ikn,ik->in", q, v))) + variance * v

    residual = rest - torch.einsum("ikn,in->ik", q, w)
    found, direction = torch.zeros_like(rest), residual.clone()
    size = start = float(residual.square().sum())
    for _ in range(iterations):
        if size <= 1e-24 * start:
            break
        image = apply(direction)
        step = size / float((direction * image).sum())
        found += step * direction
        residual -= step * image
        size, before = float(residual.square().sum()), size
        direction = residual + size / before * direction
    return w + leave(torch.einsum("ikn,ik->in", q, found))


def conv_operator(first_layer: FirstLayer, delta: FloatArray) -> Array:
    """Return G ``(n, p)`` of one record: its part of the gradient of a convolution's weights is ``G.T @ x``.

    Parameters
    ----------
    delta : float32 array (*cut_shape,)
    """
    layer = first_layer.layer
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    n = int(np.prod(first_layer.input_shape))
    at_kernel = [
        (1,) * (2 - len(layer.kernel_size)) + tuple(s) for s in (layer.kernel_size, layer.dilation, layer.stride)
    ]
    padding = (0,) * (2 - len(layer.kernel_size)) + tuple(int(p) for p in layer.padding)
    # each output's inputs, numbered from 1; 0 is padding
    numbers = torch.arange(1.0, n + 1, dtype=torch.float64).reshape(
        1, first_layer.input_shape[0], -1, first_layer.input_shape[-1]
    )
    seen = nn.functional.unfold(numbers, at_kernel[0], at_kernel[1], padding, at_kernel[2])[
        0
    ].long()  # (c k, positions)
    d = _double(delta).reshape(layer.groups, -1, seen.shape[1])  # (groups, out, positions)
    seen = seen.reshape(layer.groups, -1, seen.shape[1])  # (groups, c k, positions)
    parts = []
    for own, inputs in zip(d, seen, strict=True):
        g = torch.zeros(n + 1, len(own), len(inputs), dtype=torch.float64)
        g[inputs.T, :, torch.arange(len(inputs))] = own.T[:, None, :].expand(-1, len(inputs), -1)
        parts.append(g[1:].reshape(n, -1))
    return torch.cat(parts, dim=1).numpy()


def gradient_conv(
    prior: Prior,
    labels: NDArray[np.integer] | None,
    operator: Callable[[int], Array],
    sums: NDArray[np.floating],
    count: int,
    activations: tuple[Rows, Rows, Noise] | None = None,
    *,
    precision: float = FLOAT32,
) -> Array:
    """Return the most likely records ``(count, n)`` given linear sums over them, and their activations, if any.

    Conditions exactly on the activations, then on the sums through their ``(p, p)`` covariance.

    Parameters
    ----------
    operator : function of i to float64 array (n, p)
        ``sums = sum_i operator(i).T @ x_i``: see :func:`conv_operator`; several releases stand side by side.
    sums : array (p,)
    activations, precision
        As for :func:`gradient_dense`.
    """
    n, classes = prior.means.shape[1], _classes_of(labels, count)
    rows, rhs, noise = activations or ([np.zeros((0, n))] * count, [np.zeros(0)] * count, 0.0)

    def known(i: int) -> tuple[Tensor, Tensor, Tensor]:
        own, covariance = _double(rows[i]), torch.from_numpy(prior.covariances[classes[i]])
        mean = torch.from_numpy(prior.means[classes[i]])
        mean, v = _posterior(mean, covariance, own, _double(rhs[i]), _deviation(noise, i, len(own)))
        return mean, v, covariance

    left = _double(sums)
    gram, sizes = torch.zeros(len(left), len(left), dtype=torch.float64), torch.zeros_like(left)
    for i in range(count):
        mean, v, covariance = known(i)
        g = torch.from_numpy(operator(i))
        left -= g.T @ mean
        gram += g.T @ (covariance @ g - v.T @ (v @ g))
        sizes += g.square().sum(dim=0)
    told = _solve(gram, left, precision * _magnitude(prior) * sizes.sqrt())
    guess = np.empty((count, n))
    for i in range(count):
        mean, v, covariance = known(i)
        pull = torch.from_numpy(operator(i)) @ told
        guess[i] = (mean + covariance @ pull - v.T @ (v @ pull)).numpy()
    return prior.clip(guess) if prior.stated else guess


def _solve(gram: Tensor, left: Tensor, noise: Tensor) -> Tensor:
    """Solve ``(gram + noise^2) told = left`` in units of the noise, more of it where rounding asks for it."""
    noise = torch.where(noise > 0, noise, noise.max())
    gram = gram / noise[:, None] / noise
    one = torch.eye(len(gram), dtype=torch.float64)
    more, failed = max(1.0, 2.0**-52 * float(torch.linalg.matrix_norm(gram, torch.inf))), 1
    while failed:
        factor, info = torch.linalg.cholesky_ex(gram + more * one)
        failed, more = int(info), 4 * more
    return torch.cholesky_solve((left / noise)[:, None], factor)[:, 0] / noise


def negative_control(
    first_layer: FirstLayer, weights: Mapping[str, FloatArray], x: FloatArray, seed: int, peak: float = 1.0
) -> float:
    """Return the PSNR in dB of the *worst* record that a raw float32 gradient brings back, without any prior.

    Where the gradient of ``x (N, *input_shape)`` decides the records (a linear layer of more than N active units, two
    windows of a wide convolution), less than 60 dB means that the attacks are broken.
    """
    delta = np.random.default_rng(seed).normal(size=(len(x), *first_layer.cut_shape)).astype(np.float32)
    delta *= first_layer.derivative(first_layer.pre_activations(weights, x).numpy())
    size = int(np.prod(first_layer.shapes["weight"]))
    dw = first_layer.gradient(x, delta)[:size]
    prior = Prior.blank(int(np.prod(first_layer.input_shape)))
    if isinstance(first_layer.layer, nn.Linear):
        guess = gradient_dense(prior, None, [delta], [dw.reshape(delta.shape[1], -1)])
    else:
        guess = gradient_conv(prior, None, lambda i: conv_operator(first_layer, delta[i]), dw, len(x))
    return float(psnr(x.reshape(guess.shape), guess, peak).min())
