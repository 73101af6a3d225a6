"""The windows of all pigs, with what follows each."""

import numpy as np
from numpy.typing import NDArray

from fedsplit.data import Records
from fedsplit.data import pigs as pigs_data
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from simulations.shared.settings import joined

Float = NDArray[np.float64]
Whose = NDArray[np.int64]


class Pigs:
    """All windows, flat, with what follows, in mmHg.

    Attributes
    ----------
    train, test : Records
    trained, tested : int64 arrays
        Whose they are.
    """

    def __init__(self, settings: Settings) -> None:
        source = Experiment(settings).source
        devices = [source.device(d) for d in range(source.count)]
        self.train, self.trained = _joined([d.train for d in devices])
        self.test, self.tested = _joined([d.test for d in devices])

    @property
    def change(self) -> Float:
        """What is to be forecast of the pigs held out."""
        return self.test.y[:, 0].astype(np.float64)


def _joined(parts: list[Records]) -> tuple[Records, Whose]:
    return joined(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])


def overlapping(devices: Whose | tuple[int, ...]) -> tuple[Records, Whose]:
    """Return the windows of some devices, one every 0.1 s, and whose they are."""
    pieces, owners = pigs_data.pieces(step=5)
    own = np.isin(owners - 1, devices)
    return Records(*pigs_data.relative(pieces[own])), owners[own] - 1
