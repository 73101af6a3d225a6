"""What a trained run knows of what is normal, for devices that calibrate themselves afterwards."""

import math
import sys
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedsplit.common.errors import DataError
from fedsplit.server.novelty.space import Features, Space

DETECTOR = "detector.safetensors"
"""The file of a checkpoint."""
_DAY = 86400.0  # seconds
_TAIL = 0.1  # share of the scores that the tail is fitted to


@dataclass(frozen=True)
class Detector:
    """Where releases are compared, and the scores that normal episodes get.

    Attributes
    ----------
    space : Space
    scores : float64 array (episodes,)
        Of normal episodes of tested devices, each by its device's own calibration: of those that trained nothing, or
        of all if all trained.
    """

    space: Space
    scores: Features

    def threshold(self, false_alarms: float, seconds: float) -> float:
        """Return the score that normal episodes exceed so many times a day on a device.

        Beyond the largest scores, which one of ten exceeds, they are taken to thin out exponentially (peaks over a
        threshold: Pickands, Annals of Statistics 1975, with shape 0). Every record ends an episode, and each that
        exceeds counts, though they come in groups. A rate below one in the episodes seen is an extrapolation.

        Parameters
        ----------
        false_alarms : float
            A day and device.
        seconds : float
            From one record to the next.

        Raises
        ------
        DataError
            If there are too few scores.
        """
        if len(self.scores) * _TAIL < 1:
            raise DataError(f"a threshold needs {1 / _TAIL:g} normal episodes of tested devices: {len(self.scores)}")
        share = max(false_alarms * seconds / _DAY, sys.float_info.min)
        high = float(np.quantile(self.scores, 1 - min(1.0, max(share, _TAIL))))
        beyond = self.scores[self.scores > high] - high
        return high + float(beyond.mean()) * max(0.0, math.log(_TAIL / share)) if len(beyond) else high

    def to_bytes(self) -> bytes:
        """Pack as safetensors."""
        return save({"mean": self.space.mean, "whitening": self.space.whitening, "scores": self.scores})

    @classmethod
    def from_bytes(cls, content: bytes) -> "Detector":
        """Undo :meth:`to_bytes`; raises DataError if it is damaged."""
        try:
            found = load(content)
            mean, whitening, scores = found["mean"], found["whitening"], found["scores"]
            if whitening.shape != (len(mean), len(mean)) or not all(np.isfinite(a).all() for a in found.values()):
                raise ValueError
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise DataError("what is known of normal recordings is damaged") from None
        return cls(Space(mean, whitening), scores)
