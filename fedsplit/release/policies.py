"""Which activation outputs leave the device: the policies that come with fedsplit.

Dropping (arXiv 1711.07520) sets outputs to zero before they leave. Kept values are not rescaled.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray
from fedsplit.common.errors import ConfigError
from fedsplit.model.layer import FirstLayer
from fedsplit.release.codes import Code
from fedsplit.release.policy import BelowLeast, Mask, Policy, Silence, Unknown, Zero, choices, told
from fedsplit.release.streams import DROPPING, keystream

_FLOATS = Code()
Table = Mapping[str, Any]


@dataclass(frozen=True)
class All(Policy):
    """Everything is kept."""

    code = _FLOATS
    deterministic = True
    blind = True
    zeros_count = False

    def fits(self, layer: FirstLayer) -> None:
        """Fit any first layer."""

    def coded(self, outputs: FloatArray) -> FloatArray:
        """Return the outputs as they are."""
        return outputs

    def mask(self, outputs: FloatArray, secret: bytes, round_number: int, records: NDArray[np.int64]) -> Mask:
        """Keep all.

        Parameters
        ----------
        outputs, secret, round_number, records : as in :meth:`Policy.mask`
        """
        return np.ones(outputs.shape, dtype=bool)

    def information(self, width: int, dtype: str) -> float:
        """Return the bits of all values."""
        return told(width, width, self.code, dtype)

    def most_equations(self, width: int) -> float:
        """Return as many as there are outputs."""
        return float(width)

    def silence(self, layer: FirstLayer) -> Silence:
        """Outputs of zero alone are missing."""
        return Zero()

    def search(self, layer: FirstLayer) -> Table:
        """There is nothing to search."""
        return {}


@dataclass(frozen=True)
class Random(All):
    """Each output is kept with probability ``keep`` in (0, 1], in steps of 2^-16, independently: the paper's policy."""

    keep: float

    deterministic = False

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise ConfigError(f"keep must be in (0, 1], got {self.keep}")

    def mask(self, outputs: FloatArray, secret: bytes, round_number: int, records: NDArray[np.int64]) -> Mask:
        """Draw 16 bits for each output.

        Parameters
        ----------
        outputs, secret, round_number, records : as in :meth:`Policy.mask`
        """
        words = keystream(secret, DROPPING, round_number, records, 2 * outputs.shape[1])
        threshold = max(1, round(self.keep * 65536))
        # compared as 32-bit, since 65536 (keep everything) does not fit the stream's 16 bits
        kept: Mask = np.ascontiguousarray(words).view("<u2") < np.uint32(threshold)
        return kept

    def most_equations(self, width: int) -> float:
        """Return five standard deviations above the mean."""
        return min(self.keep * width + 5 * math.sqrt(self.keep * (1 - self.keep) * width), width)

    def silence(self, layer: FirstLayer) -> Silence:
        """Whatever is missing may have been dropped."""
        return Unknown()

    def search(self, layer: FirstLayer) -> Table:
        """Search from a fiftieth to a half."""
        return {"keep": {"low": 0.02, "high": 0.5, "log": True}}


class _OfK(All):
    """A policy that keeps ``k`` outputs."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"k must be at least 1, got {self.k}")

    def fits(self, layer: FirstLayer) -> None:
        """Raise ConfigError if there are fewer outputs."""
        if self.k > layer.width:
            raise ConfigError(f"k must be at most {layer.width} (the first layer's outputs), got {self.k}")

    def most_equations(self, width: int) -> float:
        """Return ``k``."""
        return float(self.k)


@dataclass(frozen=True)
class AtMost(_OfK):
    """Exactly ``k`` outputs, drawn at random, of which relu zeros send nothing."""

    k: int

    deterministic = False

    def mask(self, outputs: FloatArray, secret: bytes, round_number: int, records: NDArray[np.int64]) -> Mask:
        """Draw 32 bits for each output and keep the ``k`` smallest.

        Parameters
        ----------
        outputs, secret, round_number, records : as in :meth:`Policy.mask`
        """
        words = keystream(secret, DROPPING, round_number, records, 4 * outputs.shape[1])
        return _smallest(np.ascontiguousarray(words).view("<u4"), self.k)

    def information(self, width: int, dtype: str) -> float:
        """Return the bits of ``k`` values: which ones is drawn."""
        return told(width, self.k, self.code, dtype)

    def silence(self, layer: FirstLayer) -> Silence:
        """Whatever is missing may have been dropped."""
        return Unknown()


@dataclass(frozen=True)
class TopK(_OfK):
    """The ``k`` largest magnitudes; ties keep the lower index."""

    k: int

    blind = False

    def mask(self, outputs: FloatArray, secret: bytes, round_number: int, records: NDArray[np.int64]) -> Mask:
        """Keep the largest.

        Parameters
        ----------
        outputs, secret, round_number, records : as in :meth:`Policy.mask`
        """
        return _smallest(-np.abs(outputs), self.k)

    def information(self, width: int, dtype: str) -> float:
        """Return the bits of ``k`` values and of which ones."""
        return told(width, self.k, self.code, dtype, choices(width, self.k))

    def silence(self, layer: FirstLayer) -> Silence:
        """Whatever is missing is not larger than what was sent."""
        return BelowLeast(self.k)

    def search(self, layer: FirstLayer) -> Table:
        """Search from a 64th of the outputs to a quarter."""
        few, many = max(1, layer.width // 64), max(2, layer.width // 4)
        return {"k": {"low": few, "high": many, "log": True} if many <= layer.width else 1}


@dataclass(frozen=True)
class Units(_OfK):
    """All outputs of a layer that has just ``k``."""

    k: int

    def fits(self, layer: FirstLayer) -> None:
        """Raise ConfigError if the layer has another width."""
        if self.k != layer.width:
            needs = f"k must be {layer.width} (the first layer's)"
            raise ConfigError(f"policy 'units' sends all outputs: {needs}, got {self.k}")


@dataclass(frozen=True)
class Bits(All):
    """All outputs of a relu layer as ``bits``-bit codes, rounded up to the levels of :class:`Code`."""

    bits: int

    blind = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ConfigError(f"bits must be in 1..8, got {self.bits}")

    @property
    def code(self) -> Code:  # type: ignore[override]
        """Levels of ``bits`` bits."""
        return Code(self.bits)

    def fits(self, layer: FirstLayer) -> None:
        """Raise ConfigError if outputs could be negative."""
        if not layer.positive_only:
            raise ConfigError("policy 'bits' needs the activation relu")

    def coded(self, outputs: FloatArray) -> FloatArray:
        """Round up to the levels; the gradient passes straight through at what is above zero."""
        return self.code.rounded(outputs)

    def most_equations(self, width: int) -> float:
        """Return as many as there are outputs, or none if each is a bit."""
        return float(width) if self.code.exact else 0.0

    def search(self, layer: FirstLayer) -> Table:
        """Try these bits where they fit."""
        return {"bits": self.bits} if layer.positive_only else {}


def _smallest(keys: NDArray[np.uint32] | FloatArray, k: int) -> Mask:
    """Mark the ``k`` smallest keys of each row; ties take the lower index."""
    if keys.shape[0] == 0:
        return np.zeros(keys.shape, dtype=bool)
    last = np.partition(keys, k - 1, axis=1)[:, k - 1 : k]  # (records, 1): the k-th smallest
    below = keys < last
    tied = keys == last
    room = k - below.sum(axis=1, keepdims=True)
    return np.asarray(below | (tied & (np.cumsum(tied, axis=1) <= room)), dtype=np.bool_)


BUILT_IN: Mapping[str, type[Policy]] = {
    "none": All, "random": Random, "at-most": AtMost, "top-k": TopK, "units": Units, "bits": Bits
}  # fmt: skip
"""By their names in settings and in ``device.json``."""


def settings_name(policy: Policy) -> str:
    """Return a policy's name in settings: of one from outside ``module:Name``."""
    kind = type(policy)
    return next((name for name, known in BUILT_IN.items() if known is kind), f"{kind.__module__}:{kind.__qualname__}")
