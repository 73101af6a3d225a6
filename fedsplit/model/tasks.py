"""What a model is trained for: loss, score, decision."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsplit.common.arrays import FloatArray

LOSSES = {
    "classification": nn.CrossEntropyLoss(reduction="sum"),
    "binary": nn.BCEWithLogitsLoss(reduction="sum"),
    "regression": nn.MSELoss(reduction="sum"),
    "novelty": nn.CrossEntropyLoss(reduction="sum"),
}


def summed_loss(task: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss summed over records (and averaged over a regression's outputs), of ``(records, outputs)``."""
    if task in ("binary", "regression"):
        targets = targets.to(outputs.dtype)
    if task == "binary":
        outputs = outputs.squeeze(1)
    loss: Tensor = LOSSES[task](outputs, targets)
    return loss / targets.shape[1] if task == "regression" else loss


def score(task: str, outputs: FloatArray, targets: NDArray[Any]) -> dict[str, Any]:
    """Score a model's outputs ``(records, outputs)``.

    Returns
    -------
    dict
        For classes: ``test_accuracy`` and ``test_f1``, one per class (0 where a class has neither records nor
        predictions). For regression: ``test_accuracy`` None, ``test_rmse`` and ``test_r2`` (1 - MSE / variance).
    """
    if task == "regression":
        error = float(np.mean((outputs - targets) ** 2))
        variance = float(np.mean((targets - targets.mean(axis=0)) ** 2))
        return {"test_accuracy": None, "test_rmse": error**0.5, "test_r2": 1 - error / variance if variance else 0.0}
    classes = outputs.argmax(axis=1) if task == "classification" else (outputs[:, 0] > 0).astype(np.int64)
    number = max(outputs.shape[1], 2)
    return {
        "test_accuracy": float(np.mean(classes == targets)),
        "test_f1": [_f1(classes == c, targets == c) for c in range(number)],
    }


def correct(task: str, outputs: FloatArray, targets: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which records are classified right."""
    classes = outputs.argmax(axis=1) if task == "classification" else (outputs[:, 0] > 0).astype(np.int64)
    return np.asarray(classes == targets)


def _f1(predicted: NDArray[np.bool_], actual: NDArray[np.bool_]) -> float:
    both = int((predicted & actual).sum())
    total = int(predicted.sum()) + int(actual.sum())
    return 2 * both / total if total else 0.0
