"""The head: a network's last layer, which computes where the labels are."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedsplit.common.arrays import FloatArray
from fedsplit.common.errors import ConfigError
from fedsplit.model.tasks.base import Task


def cut_head(trunk: nn.Module) -> tuple[nn.Sequential, nn.Linear]:
    """Return a trunk's body and head, which share its parameters.

    Raises
    ------
    ConfigError
        If the trunk is not an nn.Sequential of at least two modules that ends with an nn.Linear.
    """
    modules = list(trunk) if isinstance(trunk, nn.Sequential) else []
    if len(modules) < 2 or not isinstance(modules[-1], nn.Linear):
        found = " of ".join([type(trunk).__name__, *map(lambda m: type(m).__name__, modules[-1:])])
        raise ConfigError(
            "protocol.labels 'at-home' needs a trunk that is an nn.Sequential of at least two modules, the last an "
            f"nn.Linear, got {found}"
        )
    return nn.Sequential(*modules[:-1]), modules[-1]


@dataclass(frozen=True)
class Sums:
    """What a head makes of some records and their labels.

    Attributes
    ----------
    loss : float
        Summed over the records.
    correct : int
        Records classified right; 0 if the task has no classes.
    features : float64 array (records, features)
        Gradient of the summed loss at the features.
    head : float64 array (parameters,)
        Gradient of the summed loss at the head's parameters.
    """

    loss: float
    correct: int
    features: NDArray[np.float64]
    head: NDArray[np.float64]


@dataclass(frozen=True)
class Head:
    """The shape of a head; its parameters come with every call, as one vector: weight by rows, then bias.

    Attributes
    ----------
    features, outputs : int
    bias : bool
    task : Task
    """

    features: int
    outputs: int
    bias: bool
    task: Task

    @classmethod
    def of(cls, trunk: nn.Module, task: Task) -> "Head":
        """Return the shape of a trunk's head; raises ConfigError."""
        layer = cut_head(trunk)[1]
        return cls(layer.in_features, layer.out_features, layer.bias is not None, task)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.outputs * (self.features + self.bias)

    def weight(self, parameters: NDArray[Any]) -> NDArray[Any]:
        """Return the weight ``(outputs, features)`` in a vector of parameters."""
        return parameters[: self.outputs * self.features].reshape(self.outputs, self.features)

    def sums(self, parameters: FloatArray, features: FloatArray, targets: NDArray[Any]) -> Sums:
        """Compute the sums of loss and gradients over some records.

        The computation is in float64, so that the result does not show which records a node computes together.

        Parameters
        ----------
        parameters : float32 array (parameters,)
            The head's weights ``(outputs, features)``, flat, and then its bias.
        features : float32 array (records, features)
        targets : array (records, ...)
            As the task has them.
        """
        vector = torch.from_numpy(parameters.astype(np.float64)).requires_grad_()
        inputs = torch.from_numpy(features.astype(np.float64)).requires_grad_()
        split = self.outputs * self.features
        outputs = inputs @ vector[:split].reshape(self.outputs, self.features).T
        if self.bias:
            outputs = outputs + vector[split:]
        loss = self.task.loss(outputs, torch.from_numpy(targets))
        at_features, at_head = torch.autograd.grad(loss, (inputs, vector))
        right = 0
        if self.task.classifies:
            right = int(self.task.correct(outputs.detach().numpy(), targets).sum())
        return Sums(loss.item(), right, at_features.numpy(), at_head.numpy())
