"""Attacks on sums of first-layer gradients, with the activations of the same records where these left, too."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedsplit.audit.prior import (
    Array,
    Floats,
    Labels,
    Noise,
    Prior,
    Rows,
    classes_of,
    equations_of,
    posterior,
    whiten,
)
from fedsplit.audit.scores import psnr
from fedsplit.common.arrays import FloatArray
from fedsplit.model.kinds.base import double
from fedsplit.model.layer import FirstLayer

FLOAT32 = 2.0**-24  # relative rounding error of a float32 gradient


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
    centre = torch.from_numpy(prior.means[classes_of(labels, len(deltas[0]))])
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
    u, s, vt = torch.linalg.svd(double(delta[:, seen] / norms[seen]), full_matrices=False)
    keep = s > 1e-12 * s.sum()
    return u[:, keep], vt[keep] @ double(sums[seen] / norms[seen, None]) / s[keep, None], error / s[keep]


def _white_rows(activations: tuple[Rows, Rows, Noise], centre: Tensor, colour: Tensor) -> tuple[Tensor, Tensor]:
    """Return each record's whitened equations ``q (N, k, n)`` and right-hand sides ``(N, k)``, padded with zeros.

    ``q q'`` and the noise's covariance add up to 1.
    """
    longest, one = max(len(rhs) for rhs in activations[1]), torch.eye(len(colour), dtype=torch.float64)
    q = torch.zeros(len(centre), longest, len(colour), dtype=torch.float64)
    rest = torch.zeros(q.shape[:2], dtype=torch.float64)
    for i in range(len(centre)):
        rows, rhs, noise = equations_of(activations, i)
        q[i, : len(rhs)], rest[i, : len(rhs)] = whiten(one, rows @ colour, rhs - rows @ centre[i], noise)
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
        Returns G ``(n, p)`` of record i, as a layer's kind does; several releases stand side by side.
    sums : array (p,)
        The sum of ``G' x`` over the records.
    activations, precision
        As for :func:`gradient_dense`.
    """
    classes = classes_of(labels, count)
    given = activations or ([np.zeros((0, prior.means.shape[1]))] * count, [np.zeros(0)] * count, 0.0)
    left, gram, sizes, known = double(sums).clone(), torch.zeros(1), torch.zeros(1), []
    for i, c in enumerate(classes):
        mean, v = posterior(prior, c, *equations_of(given, i))
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
    """Return how well the *worst* of some records comes back from one raw float32 gradient, without a prior.

    The gradient decides the records where there are few of them: far fewer than the units of a linear layer, or two
    windows of a wide convolution. Less than 60 dB there means that the attacks are broken.

    Parameters
    ----------
    first_layer : FirstLayer
    weights : mapping of str to float32 array
        The layer's, by name.
    x : float32 array (records, *input_shape)
    seed : int
        Of the gradients at the cut, which are drawn.
    peak : float
        The range of the records' numbers.

    Returns
    -------
    float
        PSNR in dB, at most 120.
    """
    delta = np.random.default_rng(seed).normal(size=(len(x), *first_layer.cut_shape)).astype(np.float32)
    delta *= first_layer.derivative(first_layer.pre_activations(weights, x).numpy())
    flat = x.reshape(len(x), -1)
    kind, d = first_layer.kind, double(delta)
    sums = kind.of_records(double(first_layer.gradient(x, delta)), d).numpy()
    prior = Prior.blank(flat.shape[1])
    if kind.dense and delta.ndim == 2:
        guess = gradient_dense(prior, None, [delta], [sums.reshape(delta.shape[1], -1)])
    else:
        guess = gradient_conv(prior, None, lambda i: kind.operator(d[i]).numpy(), sums, len(x))
    return float(psnr(flat, guess, peak).min())
