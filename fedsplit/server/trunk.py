"""The server's half: released records as mini-batches, trunk steps, cut gradients, evaluation.

The trunk never sees a device, only what devices released.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from fedsplit.common.arrays import FloatArray, IntArray
from fedsplit.common.errors import ConfigError, RunError
from fedsplit.common.plugins import resolve_function
from fedsplit.common.seeds import scheduled, seed_of
from fedsplit.model.tasks.base import Task
from fedsplit.server.batches import Batches, minibatches

TRUNK = "trunk.safetensors"


@dataclass(frozen=True)
class TrunkOptions:
    """How the trunk learns; see the settings of the same names.

    Attributes
    ----------
    optimizer : str
        ``sgd``, ``adam``, ``adamw``, or ``module:Class`` of somebody's own.
    lr, momentum, weight_decay : float
    schedule : str
        Of the learning rate over rounds; see :func:`fedsplit.common.seeds.scheduled`.
    batch_size, epochs : int
        Records per step, and passes over the records in each round.
    thinning : float
        Of each record a share of the outputs, drawn from 0..thinning in every step, counts as dropped, too.
    args : mapping
        Further arguments of the optimizer.
    """

    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    schedule: str
    batch_size: int
    epochs: int
    thinning: float = 0.0
    args: Mapping[str, Any] = field(default_factory=dict)


class Trunk:
    """The layers after the cut with their optimizer.

    Parameters
    ----------
    module : nn.Module
        Takes ``(batch, *cut_shape)``, returns ``(batch, outputs)``.
    cut_shape : tuple[int, ...]
    task : Task
    outputs : int
        Of the task; the module's output has :meth:`fedsplit.model.tasks.base.Task.trunk_outputs` columns.
    options : TrunkOptions
    rounds, seed : int
        Of the run.
    """

    def __init__(
        self,
        module: nn.Module,
        cut_shape: tuple[int, ...],
        task: Task,
        outputs: int,
        options: TrunkOptions,
        rounds: int,
        seed: int,
    ) -> None:
        self.module = module
        self.cut_shape = cut_shape
        self.task = task
        self.outputs = outputs
        self.options = options
        self.rounds = rounds
        self.seed = seed

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Made when it is first needed: torch's first one takes a second, in which devices can be at work.

        Raises
        ------
        ConfigError
            If there is no such optimizer, or it does not take its arguments.
        """
        return _optimizer(self.module, self.options)

    def train(self, batches: Batches, fresh: int, round_number: int) -> tuple[FloatArray, dict[str, float]]:
        """Train on some records and return cut gradients of the newest.

        Parameters
        ----------
        batches : Batches
            Records to learn from; those before ``fresh`` are replayed.
        fresh : int
            First record that cut gradients are wanted of.

        Returns
        -------
        gradients : float32 array (sent outputs of the fresh records,)
            Gradients of the summed loss at the outputs sent, each as of the step in which the last pass used it.
        metrics : dict
            ``train_loss`` and, for classes, ``train_accuracy`` over the last pass, before each step.

        Raises
        ------
        RunError
            If loss, gradients or parameters are no longer finite.
        """
        self._begin(round_number)
        gradients = np.zeros(len(batches.values), dtype=np.float32)
        loss = correct = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, "trunk", round_number))
            for epoch in range(self.options.epochs):
                rng = np.random.default_rng(seed_of(self.seed, "order", round_number, epoch))
                loss = correct = 0.0
                for rows in minibatches(rng.permutation(len(batches)), self.options.batch_size):
                    step_loss, step_correct = self._step(batches, rows, gradients)
                    loss, correct = loss + step_loss, correct + step_correct
        self._check_finite(round_number, loss, gradients)
        metrics = {"train_loss": loss / len(batches)}
        if self.task.classifies:
            metrics["train_accuracy"] = correct / len(batches)
        return gradients[batches.starts[fresh] :], metrics

    def _begin(self, round_number: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = scheduled(self.options.lr, self.options.schedule, round_number, self.rounds)
        self.module.train()

    def _check_finite(self, round_number: int, loss: float, gradients: FloatArray) -> None:
        tensors = self.module.state_dict().values()
        if not (np.isfinite(loss) and np.isfinite(gradients).all() and all(t.isfinite().all() for t in tensors)):
            # raised before a checkpoint could replace the last good one
            raise RunError(f"round {round_number}: the trunk is not finite: lower trunk.lr, or a device sent too much")

    def _step(self, batches: Batches, rows: IntArray, gradients: FloatArray) -> tuple[float, int]:
        outputs, cells, positions = batches.dense(rows)
        cut = torch.from_numpy(outputs).reshape(-1, *self.cut_shape).requires_grad_()
        targets = torch.from_numpy(batches.targets[rows])
        predictions = self.module(thinned(cut, self.options.thinning))
        loss = self.task.loss(predictions, targets)
        self.optimizer.zero_grad()
        (loss / len(rows)).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        assert cut.grad is not None
        gradients[positions] = cut.grad.flatten().numpy()[cells] * len(rows)
        return loss.item(), self._correct(predictions.detach().numpy(), batches.targets[rows])

    def _correct(self, outputs: FloatArray, targets: NDArray[Any]) -> int:
        return int(self.task.correct(outputs, targets).sum()) if self.task.classifies else 0

    def predict(self, batches: Batches) -> FloatArray:
        """Return the outputs ``(records, outputs)`` for released records."""
        return trunk_outputs(self.module.eval(), self.cut_shape, batches)

    def evaluate(self, batches: Batches) -> dict[str, Any]:
        """Return ``test_loss`` and the task's scores over released test records."""
        outputs = self.predict(batches)
        loss = self.task.loss(torch.from_numpy(outputs), torch.from_numpy(batches.targets))
        nothing = {"test_loss": loss.item() / len(batches), "test_accuracy": None}
        return {**nothing, **self.task.score(outputs, batches.targets)}

    def prepare_comparison(self, other: "Trunk", test: Batches) -> bool:
        """Take over what another trunk is told besides its task; return whether test records can tell them apart."""
        return True

    def files(self) -> dict[str, bytes]:
        """Return the contents of a checkpoint's files by name, for use elsewhere: the weights."""
        return {TRUNK: save({k: v.contiguous() for k, v in self.module.state_dict().items()})}

    def state(self) -> dict[str, Any]:
        """Return everything that training changes, besides the module's own tensors."""
        return self.optimizer.state_dict()

    def load_state(self, module: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Restore the module's tensors and :meth:`state`."""
        self.module.load_state_dict(module)
        self.optimizer.load_state_dict(state)


def trunk_outputs(module: nn.Module, cut_shape: tuple[int, ...], batches: Batches) -> FloatArray:
    """Return a trunk's outputs for released records.

    Parameters
    ----------
    module : torch.nn.Module
        In evaluation mode.
    cut_shape : tuple of int
        Shape of a record's outputs at the cut.
    batches : Batches

    Returns
    -------
    float32 array (records, outputs)
    """
    parts = []
    with torch.no_grad():
        for start in range(0, len(batches), 512):
            outputs, _, _ = batches.dense(np.arange(start, min(start + 512, len(batches))))
            parts.append(module(torch.from_numpy(outputs).reshape(-1, *cut_shape)).numpy())
    return np.concatenate(parts)


def _optimizer(module: nn.Module, options: TrunkOptions) -> torch.optim.Optimizer:
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    given: dict[str, Any] = {"weight_decay": options.weight_decay} if options.optimizer in kinds else {}
    if options.optimizer == "sgd":
        given["momentum"] = options.momentum
    kind = kinds.get(options.optimizer) or resolve_function(options.optimizer, "trunk.optimizer", "class")
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ConfigError(f"trunk.optimizer {options.optimizer!r} must be a subclass of torch.optim.Optimizer")
    try:
        return kind(module.parameters(), lr=options.lr, **{**given, **options.args})  # type: ignore[call-arg]
    except Exception as error:  # a user's own code may raise anything
        raise ConfigError(f"trunk.args: {options.optimizer}: {(str(error).splitlines() or [''])[0]}") from None


def thinned(cut: Tensor, most: float) -> Tensor:
    """Drop a random share, 0..``most``, of each record's outputs; if ``most`` is 0, no random number is used."""
    if not most:
        return cut
    share = most * torch.rand((len(cut), *[1] * (cut.ndim - 1)))
    return cut * (torch.rand(cut.shape) >= share)
