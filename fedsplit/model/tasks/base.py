"""What every task is asked: a subclass answers for itself, and no other file asks for its name."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray
from fedsplit.common.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from fedsplit.model.tasks.targets import Targets


@dataclass(frozen=True)
class Task(ABC):
    """What a model is trained for; a subclass says at least :meth:`targets`, :meth:`loss` and :meth:`decide`.

    ``outputs`` is always the number that settings give with the data, which means what the task makes of it.

    Parameters
    ----------
    name : str
        What settings call it.

    Attributes
    ----------
    figures : tuple of str
        Names of numbers that a model is judged by, ``test_loss`` among them if it has a meaning: what :meth:`score`
        gives. The first one is compared with that of the model which public records alone give.
    classifies : bool
        Whether a record is either right or wrong: then there are accuracies.
    watches : bool
        Whether a trained model watches devices for something new, instead of making predictions.
    labels_at_home : bool
        Whether :meth:`loss` is never negative: labels may stay at home, where nodes add it up.
    """

    name: str
    figures: ClassVar[tuple[str, ...]] = ("test_loss",)
    classifies: ClassVar[bool] = False
    watches: ClassVar[bool] = False
    labels_at_home: ClassVar[bool] = False

    @property
    def noun(self) -> str:
        """The task with its article, for errors."""
        return f"a {self.name} task"

    # ------------------------------------------------------------------------------------------------- the data

    @abstractmethod
    def targets(self, outputs: int) -> "Targets":
        """Return what a record's target is: on its device, and over the wire."""

    def check_outputs(self, outputs: int | None) -> int:
        """Return the number of outputs, which settings may leave out; raises ConfigError if it has no meaning."""
        outputs = 1 if outputs is None else outputs
        if outputs < 1:
            raise ConfigError(f"outputs must be at least 1, got {outputs}")
        return outputs

    def check_targets(self, y: NDArray[Any], outputs: int, where: str) -> NDArray[Any]:
        """Return a user's targets as the task has them.

        Parameters
        ----------
        y : array (records, ...)
        outputs : int
            Of the model.
        where : str
            Begins the text of an error: whose targets they are.

        Raises
        ------
        DataError
            If the targets do not fit the task. The text never holds a record's values.
        """
        return self.targets(outputs).read(y, where, f"{self.noun} with {outputs} outputs")

    def check_training(self, y: NDArray[Any], outputs: int, where: str) -> None:  # noqa: B027  # most refuse nothing
        """Refuse targets that only test records can have.

        Parameters
        ----------
        y : array (records, ...)
            Targets from :meth:`check_targets`.
        outputs : int
            Of the model.
        where : str
            Begins the text of an error.

        Raises
        ------
        DataError
            If there are such targets.
        """

    # ------------------------------------------------------------------------------------------------ the trunk

    def trunk_outputs(self, outputs: int, devices: int) -> int:
        """Return how many outputs the trunk has, with so many devices."""
        return outputs

    def to_trunk(self, targets: NDArray[Any], outputs: int, device: int) -> NDArray[Any]:
        """Return a device's targets as the trunk's outputs number them.

        Parameters
        ----------
        targets : array (records, ...)
        outputs : int
            Of one device.
        device : int
            The device's id.
        """
        return targets

    def from_trunk(self, targets: NDArray[Any], outputs: int) -> NDArray[Any]:
        """Undo :meth:`to_trunk`."""
        return targets

    @abstractmethod
    def loss(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        """Return the loss summed over records, of ``(records, outputs)`` in float32 or float64."""

    def steepest(self, outputs: int) -> tuple[float, float] | None:
        """Return the most that a record's loss can change with one of its outputs, and with all of them (L1).

        None: it has no bound, and nodes' gradients are checked against none.
        """
        return None

    # ------------------------------------------------------------------------------------------------ decisions

    @abstractmethod
    def decide(self, outputs: FloatArray) -> NDArray[Any]:
        """Return what the model says of each record, of outputs ``(records, outputs)``."""

    def correct(self, outputs: FloatArray, targets: NDArray[Any]) -> NDArray[np.bool_]:
        """Return which records are right in all that is said of them; for tasks that classify."""
        same = np.asarray(self.decide(outputs) == targets)
        return np.asarray(same.all(axis=tuple(range(1, same.ndim))))

    def score(self, outputs: FloatArray, targets: NDArray[Any]) -> dict[str, Any]:
        """Return figures of outputs ``(records, outputs)``, by names that begin with ``test_``."""
        return {"test_accuracy": float(self.correct(outputs, targets).mean()) if self.classifies else None}

    def score_sums(self, loss: float, accuracy: float | None) -> dict[str, Any]:
        """Return figures of a mean loss and, if the task classifies, an accuracy: all there is of labels at home."""
        return {"test_loss": loss, "test_accuracy": accuracy}
