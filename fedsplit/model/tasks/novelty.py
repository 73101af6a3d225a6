"""Whether a record is like what a device has had before."""

from typing import Any

from numpy.typing import NDArray

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.model.tasks.classes import Classification
from fedsplit.model.tasks.targets import Classes


class Novelty(Classification):
    """Which of all devices' recordings a record is of, learned to notice what is of none of them.

    ``outputs`` is the most recordings that a device has. The trunk has an output for every recording of every device:
    those of device d begin at ``d * outputs``. What is made of them is the server's:
    :class:`fedsplit.server.novelty.trunk.NoveltyTrunk`.
    """

    figures = ("test_auc", "test_episode_auc")
    watches = True
    labels_at_home = False

    def targets(self, outputs: int) -> Classes:
        """Return a device's recordings 0..outputs-1, and ``outputs``: something new."""
        return Classes(outputs + 1)

    def check_outputs(self, outputs: int | None) -> int:
        """Return the most recordings that a device has; raises ConfigError if it is missing."""
        if outputs is None:
            raise ConfigError("outputs must be the most recordings that a device has, for a novelty task")
        return super(Classification, self).check_outputs(outputs)

    def check_training(self, y: NDArray[Any], outputs: int, where: str) -> None:
        """Refuse the label that stands for something new.

        Parameters
        ----------
        y, outputs, where : int64 array (records,), int, str
            As in :meth:`Task.check_training`.

        Raises
        ------
        DataError
            If a training record has this label.
        """
        if (y == outputs).any():
            raise DataError(f"{where}: label {outputs} is for something new, which only test records can be")

    def trunk_outputs(self, outputs: int, devices: int) -> int:
        """Return how many recordings all devices have."""
        return devices * outputs

    def to_trunk(self, targets: NDArray[Any], outputs: int, device: int) -> NDArray[Any]:
        """Number a device's recordings through all devices.

        Parameters
        ----------
        targets, outputs, device : int64 array (records,), int, int
            As in :meth:`Task.to_trunk`.
        """
        return targets + device * outputs

    def from_trunk(self, targets: NDArray[Any], outputs: int) -> NDArray[Any]:
        """Return which of its device's recordings it is."""
        return targets % outputs
