"""Numbers of a record."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import mse_loss

from fedsplit.common.arrays import FloatArray
from fedsplit.model.tasks.base import Task
from fedsplit.model.tasks.targets import Columns


class Regression(Task):
    """Numbers of a record, with an output for each: squared error."""

    figures = ("test_r2", "test_rmse", "test_loss")
    labels_at_home = True

    @property
    def noun(self) -> str:
        """The task with its article."""
        return "a regression"

    def targets(self, outputs: int) -> Columns:
        """Return so many numbers."""
        return Columns(outputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the squared error summed over records and averaged over a record's outputs."""
        return mse_loss(outputs, targets.to(outputs.dtype), reduction="sum") / targets.shape[1]

    def decide(self, outputs: FloatArray) -> FloatArray:
        """Return the numbers themselves."""
        return outputs

    def score(self, outputs: FloatArray, targets: NDArray[Any]) -> dict[str, Any]:
        """Return ``test_rmse`` and ``test_r2`` (1 - MSE / variance); ``test_accuracy`` is None."""
        error = float(np.mean((outputs - targets) ** 2))
        variance = float(np.mean((targets - targets.mean(axis=0)) ** 2))
        return {"test_accuracy": None, "test_rmse": error**0.5, "test_r2": 1 - error / variance if variance else 0.0}

    def score_sums(self, loss: float, accuracy: float | None) -> dict[str, Any]:
        """Add ``test_rmse``."""
        return {**super().score_sums(loss, accuracy), "test_rmse": loss**0.5}
