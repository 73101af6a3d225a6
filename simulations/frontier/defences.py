"""Two published defences: a fixed projection of the outputs, with the attacks on it, and a binarised first layer."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsplit.audit.attacks import decoder, lmmse, map_qp
from fedsplit.audit.evidence import released
from fedsplit.audit.prior import Prior
from fedsplit.audit.scores import summarise
from fedsplit.audit.transcript import Subjects
from fedsplit.common.seeds import seed_of
from fedsplit.data import Records
from fedsplit.model.layer import FirstLayer
from fedsplit.model.split import SplitModel
from fedsplit.model.tasks.base import Task
from fedsplit.release.policy import Policy
from fedsplit.server.warmup import WarmUp

Float = NDArray[Any]


class Projection(nn.Module):
    """LightSplit (Cihangiroglu et al. 2026, arXiv 2605.13265): outputs pass through a fixed orthonormal projection.

    What is sent are ``components`` numbers; the server lifts them back to the width of the layer.
    """

    def __init__(self, width: int, components: int, seed: int) -> None:
        super().__init__()
        random = torch.randn(width, components, generator=torch.Generator().manual_seed(seed))
        self.basis: Tensor
        self.register_buffer("basis", torch.linalg.qr(random)[0])

    def forward(self, outputs: Tensor) -> Tensor:
        """Return what the trunk sees of ``outputs`` ``(batch, width)``."""
        return outputs @ self.basis @ self.basis.T


def attack_projection(
    layer: FirstLayer, policy: Policy, dtype: str, subjects: Subjects, basis: Float, seed: int
) -> dict[str, float | None]:
    """Attack projected outputs, which are no equations in the record: with what learns from public records.

    Returns
    -------
    dict
        The strongest attack's scores.
    """
    weights, public = layer.flatten(layer.initial_weights()), subjects.public
    known, own = (released(layer, policy, dtype, weights, x, seed)[1] @ basis for x in (public.x, subjects.x))
    flat = public.x.reshape(len(public.x), -1)
    prior = Prior.of(flat, public.y, (0.0, 1.0))
    features = (known, flat, public.y)
    guesses = [lmmse(prior, features, own, subjects.y), decoder(prior, features, own, subjects.y, seed=seed)]
    guesses.append(_linearised(prior, subjects.y, layer, basis, own, prior.clip(guesses[0])))
    scores = [_scores(subjects, prior.clip(guess), flat.var(axis=0)) for guess in guesses]
    return max(scores, key=lambda found: found["psnr"] or 0.0)


def _scores(subjects: Subjects, guess: Float, variance: Float) -> dict[str, float | None]:
    return summarise(
        subjects.x.reshape(len(subjects.x), -1),
        guess,
        peak=1.0,
        variance=variance,
        truth_index=subjects.place,
        candidates=subjects.candidates.reshape(len(subjects.candidates), -1),
        image_shape=subjects.x.shape[1:],
    )


def _linearised(prior: Prior, labels: Float, layer: FirstLayer, basis: Float, sent: Float, guess: Float) -> Float:
    """Search for records that give what was sent: constrained least squares on the layer made linear at each guess."""
    matrix = layer.unrolled().detach().numpy()
    bias = layer.outputs(torch.zeros(1, *layer.input_shape)).detach().numpy()[0]
    for _ in range(10):
        pre = guess @ matrix.T + bias  # (targets, width)
        rows = [(basis.T * (z > 0)) @ matrix for z in pre]
        rhs = [s - basis.T @ np.maximum(z, 0) + r @ x for s, z, r, x in zip(sent, pre, rows, guess, strict=True)]
        noise = [np.full(len(r), 0.02 * float(np.std(sent))) for r in rhs]
        guess = (guess + map_qp(prior, labels, rows, rhs, noise)) / 2  # half steps: the active units change on the way
    return guess


class Binarised:
    """A linear first layer whose weights have one size a row, and one-bit outputs (B-SL).

    Source: Pham et al. 2022, arXiv 2206.04864.
    """

    def __init__(self, model: SplitModel) -> None:
        layer = model.first_layer.layer
        assert isinstance(layer, nn.Linear)
        self._layer, self._trunk = layer, model.trunk

    def train(self, records: Records, task: Task, options: WarmUp, seed: int) -> None:
        """Train both halves; the layer keeps its binary weights afterwards."""
        optimizer = torch.optim.Adam([*self._layer.parameters(), *self._trunk.parameters()], options.lr)
        x, y = torch.from_numpy(records.x).flatten(1), torch.from_numpy(records.y)
        for epoch in range(options.epochs):
            order = np.random.default_rng(seed_of(seed, "binarised", epoch)).permutation(len(x))
            for rows in np.array_split(order, max(1, len(x) // options.batch_size)):
                loss = task.loss(self._trunk(self._sent(x[rows])), y[rows]) / len(rows)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        with torch.no_grad():
            self._layer.weight.copy_(self._binary())

    def _binary(self) -> Tensor:
        """Return the binary weights; gradients pass as if they were the layer's own."""
        weight = self._layer.weight
        return weight + (weight.sign() * weight.abs().mean(dim=1, keepdim=True) - weight).detach()

    def _sent(self, x: Tensor) -> Tensor:
        """Return one bit of each output; gradients pass as if it were the output."""
        outputs = torch.relu(nn.functional.linear(x, self._binary(), self._layer.bias))
        return outputs + ((outputs > 0).float() - outputs).detach()
