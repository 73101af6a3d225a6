"""Learning from public records before any device is asked: a first layer that devices need not teach.

Above trunk and device: it has both halves of the network and records that nobody has to protect. Afterwards the first
layer can stay as it is (mode ``release-once``), so that no gradient of it ever leaves a device.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsplit.common.arrays import FloatArray
from fedsplit.common.errors import RunError
from fedsplit.common.seeds import seed_of
from fedsplit.data import Records
from fedsplit.guard.releaser import Releaser
from fedsplit.model.split import SplitModel
from fedsplit.model.tasks.base import Task
from fedsplit.release.making import Chunk
from fedsplit.release.policy import Policy
from fedsplit.release.streams import KEYED_ROUND, simulation_secret
from fedsplit.server.batches import Batches, minibatches
from fedsplit.server.trunk import Trunk

PUBLIC = -1  # the device id that public records go by
_RIDGE = 1e-3  # of the penalty, in units of the mean public variance


@dataclass(frozen=True)
class WarmUp:
    """How the whole network learns from public records.

    Attributes
    ----------
    epochs : int
    lr : float
        Of Adam, with a cosine schedule.
    batch_size : int
    penalty : float
        Weight of :func:`covariance_penalty`.
    """

    epochs: int
    lr: float
    batch_size: int
    penalty: float


def warm_up(model: SplitModel, public: Records, task: Task, dropping: Policy, options: WarmUp, seed: int) -> None:
    """Train both halves of a model in place on public records, dropping as the devices will.

    Parameters
    ----------
    model : SplitModel
    public : Records
    task : Task
    dropping : Policy
    options : WarmUp
    seed : int
        The run's.

    Raises
    ------
    RunError
        If the weights are no longer finite.
    """
    first, n = model.first_layer, len(public)
    secret = simulation_secret(seed, PUBLIC)
    parameters = [*first.layer.parameters(), *model.trunk.parameters()]
    optimizer = torch.optim.Adam(parameters, options.lr)
    steps = options.epochs * -(-n // options.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    x, y = torch.from_numpy(public.x), torch.from_numpy(public.y)
    factors = principal_factors(public.x) if options.penalty else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "warm-up"))
        model.trunk.train()
        for epoch in range(options.epochs):
            order = np.random.default_rng(seed_of(seed, "warm-up", epoch)).permutation(n)
            for rows in minibatches(order, options.batch_size):
                kept = _dropped(model, x[rows], rows, dropping, secret, epoch + 1)
                loss = task.loss(model.trunk(kept), y[rows]) / len(rows)
                if factors is not None:
                    loss = loss + options.penalty * covariance_penalty(first.unrolled(), factors)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    if not all(p.isfinite().all() for p in parameters):
        raise RunError("the warm-up's weights are not finite: lower public.lr")


def _dropped(
    model: SplitModel, x: Tensor, rows: NDArray[np.int64], dropping: Policy, secret: bytes, mask_round: int
) -> Tensor:
    """Return a batch's outputs ``(batch, *cut_shape)`` as a device would send them.

    The gradient passes straight through codes, and to units up to 1 below zero, too: they could not learn to be active
    otherwise.
    """
    first = model.first_layer
    pre = first.outputs(x).flatten(1)
    outputs = first.activation(pre)
    values = outputs.detach().numpy()
    coded = dropping.coded(values)
    mask = dropping.mask(coded, secret, KEYED_ROUND if dropping.deterministic else mask_round, rows)
    sent = outputs
    if coded is not values:
        near = pre.clamp(-1, float(coded.max(initial=0)) + 1)
        sent = near + (torch.from_numpy(coded) - near).detach()
    if (noisy := dropping.noisy) is not None:
        noise = np.random.default_rng(seed_of(mask_round, int(rows[0]))).normal(size=values.shape)
        scales = torch.from_numpy(noisy.scales(values, mask))
        sent = sent * scales + torch.from_numpy(noise.astype(np.float32)) * noisy.noise * noisy.clip
    kept: Tensor = sent * torch.from_numpy(np.array(mask))
    return kept.reshape(-1, *first.cut_shape)


def covariance_penalty(rows: Tensor, factors: Tensor) -> Tensor:
    """Return how much of the public variance the first layer's rows explain, in 0..1: the server's cost of leaking.

    tr(C W' (W C W' + eI)^-1 W C) / tr C for rows W ``(width, n)`` and covariance C: what a linear attacker who knows
    C would recover if every output were sent. The server computes it alone.

    Parameters
    ----------
    rows : Tensor (width, n)
    factors : Tensor (n, components)
        Eigenvectors of C times the roots of their eigenvalues; see :func:`principal_factors`.
    """
    variances = factors.square().sum(dim=0)
    projected = rows @ factors  # (width, components)
    ridge = _RIDGE * variances.sum() / len(factors)
    # with C = F F' and A = W F the trace is tr(L) - e tr((A'A + eI)^-1 L), L = F'F: the smaller inverse
    left = torch.linalg.inv(projected.T @ projected + ridge * torch.eye(len(variances))).diagonal()
    unexplained: Tensor = ridge * (left * variances).sum() / variances.sum()
    return 1 - unexplained


def principal_factors(x: FloatArray, components: int = 128) -> Tensor:
    """Return the ``(n, components)`` largest principal directions of records, scaled by their standard deviations."""
    flat = torch.from_numpy(x.reshape(len(x), -1))
    centred = flat - flat.mean(dim=0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(flat))
    factors: Tensor = vectors[:, -components:] * values[-components:].clamp(min=0).sqrt()
    return factors


def public_release(model: SplitModel, public: Records, dropping: Policy, dtype: str, seed: int) -> Batches:
    """Return the public records as if a device had released them: the trunk learns from them, too.

    Parameters
    ----------
    model : SplitModel
        Its first layer's initial weights are used.
    public : Records
    dropping : Policy
    dtype : str
        The wire's type of a value.
    seed : int
        The run's. The secret of the public records derives from it.
    """
    secret = simulation_secret(seed, PUBLIC)
    chunk = Chunk.of(PUBLIC, public)
    weights = model.first_layer.flatten(model.first_layer.initial_weights())
    releaser = Releaser(model.first_layer, dropping, dtype, lambda _: secret)
    return Batches.join([releaser.unguarded(chunk, weights, "public")])


class PublicOnly:
    """The model that the public records alone would have given: every run with private records must beat it.

    Parameters
    ----------
    trunk : Trunk
        As the warm-up left it; a copy is kept.
    public : Batches
    rounds : int
        Passes over the public records: as many as the trunk makes over all records.
    """

    def __init__(self, trunk: Trunk, public: Batches, rounds: int) -> None:
        self.public = public
        self._rounds = rounds
        self._trunk = copy.deepcopy(trunk)

    def compare(self, trunk: Trunk, test: Batches) -> dict[str, Any]:
        """Score the public-only model on released test records, next to ``trunk``.

        Returns
        -------
        dict
            ``public_only_accuracy``, or of another task the first of its figures so; for classes also
            ``gain_over_public`` and ``gain_interval``, the 95 % half-width of the paired difference.
        """
        alone = copy.deepcopy(self._trunk)
        if not alone.prepare_comparison(trunk, test):
            return {}
        for round_number in range(1, self._rounds + 1):
            alone.train(self.public, 0, round_number)
        scored = alone.evaluate(test)
        figure = trunk.task.figures[0]
        found = {f"public_only_{figure.removeprefix('test_')}": scored[figure]}
        if scored["test_accuracy"] is None:
            return found
        right = [t.task.correct(t.predict(test), test.targets).astype(np.float64) for t in (trunk, alone)]
        difference = right[0] - right[1]
        return {
            **found,
            "gain_over_public": float(difference.mean()),
            "gain_interval": float(1.96 * difference.std() / np.sqrt(len(difference))),
        }
