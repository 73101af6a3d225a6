"""Devices that lie, and a trunk that leaves out what it learns least."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from flwr.app import Context, Message

from fedsplit.common.arrays import FloatArray, IntArray
from fedsplit.common.seeds import seed_of
from fedsplit.flower.record import from_record, to_record
from fedsplit.server.batches import Batches
from fedsplit.server.trunk import Trunk
from fedsplit.wire.exchange import Upload
from simulations.strategies.rows import CLASSES

FACTOR = 10.0  # of hostile gradients that are larger than honest ones
TRIM = 0.2  # of a mini-batch


class HostileApp:
    """A ClientApp some of whose devices lie: what their own node answers is changed on its way out.

    Parameters
    ----------
    app : callable
        The honest ClientApp.
    attack : str
        One of :data:`simulations.strategies.rows.ATTACKS`.
    hostile : set of int
        Devices that lie, each on a node of its own.
    parameters : int
        Of the first layer.
    seed : int
    """

    def __init__(
        self,
        app: Callable[[Message, Context], Message],
        attack: str,
        hostile: set[int],
        parameters: int,
        seed: int,
    ) -> None:
        self._app = app
        self._attack = attack
        self._hostile = hostile
        self._parameters = parameters
        self._rng = np.random.default_rng(seed_of(seed, "hostile"))

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message, honestly or not."""
        reply = self._app(message, context)
        if context.node_config["partition-id"] in self._hostile and message.metadata.message_type == "train":
            upload = Upload.from_bytes(from_record(reply.content), parameters=self._parameters)
            reply.content = to_record(self._lie(upload).to_bytes())
        return reply

    def _lie(self, upload: Upload) -> Upload:
        if self._attack == "labels":
            wrong = (upload.release.targets + 1) % CLASSES
            return replace(upload, release=replace(upload.release, targets=wrong))
        sums = upload.gradients.sums
        if self._attack == "random":
            noise = self._rng.normal(size=sums.shape)
            sizes = np.linalg.norm(sums, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
            return replace(upload, gradients=replace(upload.gradients, sums=FACTOR * sizes * noise))
        factor = {"flipped": -1.0, "scaled": -FACTOR}[self._attack]
        return replace(upload, gradients=replace(upload.gradients, sums=factor * sums))


class TrimmedTrunk(Trunk):
    """Leaves out of each step the fifth of the records with the largest loss, whose cut gradients are then zero.

    Source: Shen and Sanghavi, "Learning with Bad Training Data via Iterative Trimmed Loss Minimization", ICML 2019.
    """

    def _step(self, batches: Batches, rows: IntArray, gradients: FloatArray) -> tuple[float, int]:
        outputs, cells, positions = batches.dense(rows)
        cut = torch.from_numpy(outputs).reshape(-1, *self.cut_shape).requires_grad_()
        targets = torch.from_numpy(batches.targets[rows])
        predictions = self.module(cut)
        each = torch.nn.functional.cross_entropy(predictions, targets, reduction="none")
        kept = each.topk(len(rows) - int(TRIM * len(rows)), largest=False).values
        self.optimizer.zero_grad()
        kept.mean().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        assert cut.grad is not None
        gradients[positions] = cut.grad.flatten().numpy()[cells] * len(kept)
        return each.sum().item(), int((predictions.argmax(1) == targets).sum())
