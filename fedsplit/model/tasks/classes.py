"""Which class a record is of: one of several, or one of two."""

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from fedsplit.common.arrays import FloatArray
from fedsplit.common.errors import ConfigError
from fedsplit.model.tasks.base import Task
from fedsplit.model.tasks.targets import Classes


class _OneClass(Task):
    figures: ClassVar[tuple[str, ...]] = ("test_accuracy", "test_f1", "test_loss")
    classifies = True
    labels_at_home = True

    def score(self, outputs: FloatArray, targets: NDArray[Any]) -> dict[str, Any]:
        """Return ``test_accuracy`` and ``test_f1``, one per class: 0 where it has neither records nor predictions."""
        said = self.decide(outputs)
        return {
            "test_accuracy": float(np.mean(said == targets)),
            "test_f1": [_f1(said == c, targets == c) for c in range(max(outputs.shape[1], 2))],
        }

    def steepest(self, outputs: int) -> tuple[float, float]:
        """Return 1 and 2: the gradient is that of softmax, p - y."""
        return 1.0, 2.0


class Classification(_OneClass):
    """One of several classes, with an output for each: cross-entropy."""

    def targets(self, outputs: int) -> Classes:
        """Return 0..outputs-1."""
        return Classes(outputs)

    def check_outputs(self, outputs: int | None) -> int:
        """Return the number of classes; raises ConfigError if it is missing or below 2."""
        if outputs is None or outputs < 2:
            raise ConfigError(f"outputs must be the number of classes, at least 2, got {outputs}")
        return outputs

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy summed over records."""
        return cross_entropy(outputs, targets, reduction="sum")

    def decide(self, outputs: FloatArray) -> NDArray[np.int64]:
        """Return the class with the largest output, the first of several."""
        return np.asarray(outputs.argmax(axis=1))


class Binary(_OneClass):
    """0 or 1, with one output, the logit of 1: binary cross-entropy."""

    def targets(self, outputs: int) -> Classes:
        """Return 0 and 1."""
        return Classes(2)

    def check_outputs(self, outputs: int | None) -> int:
        """Return 1; raises ConfigError if there is another number."""
        if outputs not in (None, 1):
            raise ConfigError(f"outputs must be 1 or left out for a binary task, got {outputs}")
        return 1

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the binary cross-entropy summed over records."""
        return binary_cross_entropy_with_logits(outputs.squeeze(1), targets.to(outputs.dtype), reduction="sum")

    def decide(self, outputs: FloatArray) -> NDArray[np.int64]:
        """Return 1 where the logit is positive."""
        return (outputs[:, 0] > 0).astype(np.int64)


def _f1(predicted: NDArray[np.bool_], actual: NDArray[np.bool_]) -> float:
    both = int((predicted & actual).sum())
    total = int(predicted.sum()) + int(actual.sum())
    return 2 * both / total if total else 0.0
