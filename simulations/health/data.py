"""The windows of all people, the first layers, and what is dropped."""

from dataclasses import dataclass

import numpy as np
import torch

from fedsplit.common.seeds import seed_of
from fedsplit.data import Records, wearables
from fedsplit.model.split import SplitModel
from fedsplit.model.tasks import task_of
from fedsplit.model.zoo import build_model
from fedsplit.release.policies import All, Bits, Random, TopK
from fedsplit.release.policy import Policy
from fedsplit.server.warmup import WarmUp, warm_up
from simulations.health.detectors import Rows

KNOWN = len(wearables.CLASSES) - 1  # exercises, and so recordings of a device
DONORS, TRAINING = (1, 2), tuple(range(1, 8))  # people
PRIVATE = "private"
EPOCHS = 40  # of the first layer


@dataclass(frozen=True)
class Cell:
    """What is dropped, what the tables call that, and the first layer's channels, of 50 outputs each."""

    dropping: Policy
    name: str
    width: int = 16


POLICIES = {
    "none": Cell(All(), "none: all of 800"),
    PRIVATE: Cell(Bits(1), "private: 1 bit of 400", width=8),
    "top-48": Cell(TopK(48), "48 largest of 800"),
    "paper": Cell(Random(0.25), "the paper's: a random quarter of 800"),
}
CELLS = {  # of the study: first layer and policy, and whether every seed is attacked or the first alone
    ("donors", "none"): False,
    ("donors", PRIVATE): True,
    ("random", "none"): False,
    ("random", PRIVATE): False,
    ("donors", "top-48"): True,
    ("donors", "paper"): False,
}


class Windows:
    """All windows, by device and within it by recording and time."""

    def __init__(self) -> None:
        pool = wearables.load(overlap=False)
        assert pool.owners is not None
        order = np.argsort(pool.owners, kind="stable")
        self.x, self.y, self.device = pool.x[order], pool.y[order], pool.owners[order]
        self.person = self.device // wearables.SIDES + 1

    def targets(self, novel: int) -> Rows:
        """Return which of its device's recordings a window is of; the novelty's number is the last."""
        return np.where(self.y == novel, KNOWN, self.y - (self.y > novel))


def split_model(windows: Windows, novel: int, layer: str, policy: Cell, seed: int) -> SplitModel:
    """Return a model whose first layer is random or has learned to tell the donors' recordings apart."""
    torch.manual_seed(seed_of(seed, "model"))
    outputs = KNOWN * (int(windows.device.max()) + 1)
    model = build_model("sensor-cnn", windows.x.shape[1:], outputs, policy.width, "relu")
    if layer == "donors":
        rows = np.isin(windows.person, DONORS) & (windows.y != novel)
        records = Records(windows.x[rows], (windows.targets(novel) + KNOWN * windows.device)[rows])
        warm_up(model, records, task_of("novelty"), policy.dropping, WarmUp(EPOCHS, 0.002, 64, 0.0), seed)
    return model
