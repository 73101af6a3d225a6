"""The losses of the tasks: computed where the labels are, by the trunk or on the devices."""

from torch import Tensor, nn

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
