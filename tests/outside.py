"""Tasks as a user would write them, each with a function that makes its records."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, arange, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from fedsplit import DeviceData, SplitModel
from fedsplit.model.tasks.base import Task
from fedsplit.model.tasks.targets import Classes, Columns, Targets


class Labels(Task):
    """Any of several labels at once."""

    figures = ("test_accuracy", "test_label_accuracy", "test_loss")
    classifies = True
    labels_at_home = True

    def targets(self, outputs: int) -> Targets:
        return Columns(outputs, low=0, high=1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="sum")

    def decide(self, outputs: NDArray[Any]) -> NDArray[Any]:
        return (outputs > 0).astype(int)

    def score(self, outputs: NDArray[Any], targets: NDArray[Any]) -> dict[str, Any]:
        right = self.decide(outputs) == targets
        return {**super().score(outputs, targets), "test_label_accuracy": float(right.mean())}

    def steepest(self, outputs: int) -> tuple[float, float]:
        return 1.0, float(outputs)


class Survival(Task):
    """When something happens, in as many intervals as there are outputs: the logit of each interval's hazard.

    A target is the last interval that a record was watched in, and whether it happened then.
    """

    figures = ("test_concordance", "test_loss")

    def targets(self, outputs: int) -> Targets:
        return Columns(2, low=0, high=outputs - 1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        last, happened = targets[:, :1], targets[:, 1:]
        intervals = arange(outputs.shape[1])
        through = (intervals < last) + (intervals == last) * (1 - happened)
        return (through * softplus(outputs) + (intervals == last) * happened * softplus(-outputs)).sum()

    def decide(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """Return how many intervals are survived on average."""
        return np.cumprod(1 / (1 + np.exp(outputs.astype(np.float64))), axis=1).sum(axis=1)

    def score(self, outputs: NDArray[Any], targets: NDArray[Any]) -> dict[str, Any]:
        """Return how often of two records that survives longer of which it is said."""
        said, (last, happened) = self.decide(outputs), targets.T
        known = (happened[:, None] == 1) & (last[:, None] < last)
        return {"test_concordance": float((said[:, None] < said)[known].mean())}


class Unfinished(Labels):
    loss = Task.loss


class Raises(Task):
    """Whose own code fails, and would tell of what it fails at."""

    def targets(self, outputs: int) -> Targets:
        return Classes(outputs)

    def check_targets(self, y: NDArray[Any], outputs: int, where: str) -> NDArray[Any]:
        raise ValueError(f"the labels are {y}")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum()

    def decide(self, outputs: NDArray[Any]) -> NDArray[Any]:
        return outputs


def not_a_task(name: str) -> str:
    return name


def _device(x: NDArray[Any], y: NDArray[Any]) -> DeviceData:
    return DeviceData(train=(x[:40], y[:40]), test=(x[40:], y[40:]))


def labelled(device_id: int, num_devices: int) -> DeviceData:
    x = np.random.default_rng(device_id).normal(size=(60, 12)).astype(np.float32)
    return _device(x, (x[:, :3] + 0.5 * x[:, 3:6] > 0).astype(np.float32))


def censored(device_id: int, num_devices: int) -> DeviceData:
    rng = np.random.default_rng(device_id)
    x = rng.normal(size=(60, 12)).astype(np.float32)
    happens = np.floor(np.exp(0.7 * x[:, 0] + 0.2 * rng.normal(size=60))).clip(0, 4)
    watched = rng.integers(2, 5, 60)
    return _device(x, np.stack([np.minimum(happens, watched), happens <= watched], axis=1).astype(np.float32))


def survival_model() -> SplitModel:
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
    return SplitModel.from_sequential(net, input_shape=(12,))
