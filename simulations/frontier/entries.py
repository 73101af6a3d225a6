"""The rows of the frontier: policies and published defences."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedsplit.plan.settings import Settings, check_settings

PAPER = "random"
PUBLISHED = ("LightSplit", "B-SL")


@dataclass(frozen=True)
class Entry:
    """A policy, or a published defence.

    Attributes
    ----------
    family, name : str
    dropping : dict
        The section ``dropping`` of its settings.
    width : int
        Of the first layer.
    penalty : float
        On outputs, while the first layer learns.
    projection : int
        Numbers that outputs are projected to; 0: they are not.
    binarised : bool
        Whether the first layer is.
    """

    family: str
    name: str
    dropping: dict[str, Any]
    width: int = 256
    penalty: float = 0.0
    projection: int = 0
    binarised: bool = False

    def settings(self, base: Settings, seed: int) -> Settings:
        """Return settings with this policy in place of theirs."""
        raw = base.tables()
        raw["dropping"] = self.dropping
        raw["model"]["width"] = self.width
        raw["run"]["seed"] = seed
        return check_settings(raw)


def entries() -> list[Entry]:
    """Return all rows."""
    everything = {"policy": "none"}
    return [
        *(Entry(PAPER, f"random {k} of 256", {"policy": "random", "keep": k}) for k in (0.5, 0.35, 0.25, 0.15)),
        *_chosen(0.0, ""),
        *_chosen(0.3, " + penalty 0.3"),
        Entry("bits", "2 bits of 32", {"policy": "bits", "bits": 2}, 32),
        Entry("noise", "32 units + noise 0.1", {"policy": "units", "k": 32, "clip": 4.0, "noise": 0.1}, 32),
        *(Entry("LightSplit", f"projection to {k} of 256", everything, projection=k) for k in (32, 16, 8)),
        Entry("B-SL", "binarised layer of 64", {"policy": "bits", "bits": 1}, 64, binarised=True),
    ]


def _chosen(penalty: float, more: str) -> Iterator[Entry]:
    """Yield the families that are measured with a penalty and without."""
    for k in (12, 6, 4):
        yield Entry("top-k", f"top-{k} of 256{more}", {"policy": "top-k", "k": k}, penalty=penalty)
    for width in (32, 16, 8):
        yield Entry("units", f"{width} units{more}", {"policy": "units", "k": width}, width, penalty)
    for width in (128, 64, 32):
        yield Entry("bits", f"1 bit of {width}{more}", {"policy": "bits", "bits": 1}, width, penalty)
