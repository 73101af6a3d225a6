"""Which activation outputs leave the device: the policies that come with fedsplit.

Dropping (arXiv 1711.07520) sets outputs to zero before they leave; kept values are not rescaled. What is drawn comes
from a *device secret* that the server does not have; see :mod:`fedsplit.release.streams`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray
from fedsplit.common.errors import ConfigError
from fedsplit.model.layer import FirstLayer
from fedsplit.release.codes import Code
from fedsplit.release.policy import BelowLeast, Mask, Policy, Silence, Unknown, Zero, choices, told
from fedsplit.release.streams import DROPPING, NOISE, keystream

_FLOATS = Code()
_LEAST_CLIP = 1e-30  # far above where float32 rounds what is sent, and the noise, to a few levels
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
        """Keep all."""
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
    """Each output is kept with probability ``keep``, independently: the paper's policy.

    Attributes
    ----------
    keep : float
        In (0, 1], in steps of 2^-16.
    """

    keep: float

    deterministic = False

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise ConfigError(f"keep must be in (0, 1], got {self.keep}")

    def mask(self, outputs: FloatArray, secret: bytes, round_number: int, records: NDArray[np.int64]) -> Mask:
        """Draw 16 bits for each output."""
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
        """Draw 32 bits for each output and keep the ``k`` smallest."""
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
        """Keep the largest."""
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
    """All outputs of a relu layer as ``bits``-bit codes, rounded up to the levels of :class:`Code`.

    The gradient passes straight through at what is above zero.
    """

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
        """Round up to the levels."""
        return self.code.rounded(outputs)

    def most_equations(self, width: int) -> float:
        """Return as many as there are outputs, or none if each is a bit."""
        return float(width) if self.code.exact else 0.0

    def search(self, layer: FirstLayer) -> Table:
        """Try these bits where they fit."""
        return {"bits": self.bits} if layer.positive_only else {}


@dataclass(frozen=True)
class Noisy(Policy):
    """Gaussian noise on every output that a policy keeps, zeros among them: a missing one would tell that it was zero.

    Attributes
    ----------
    policy : Policy
        One whose choice of outputs tells nothing of the record; else it would tell what the noise hides.
    clip, noise : float
        Noise of standard deviation ``noise * clip``, after the kept outputs of a record are scaled to a Euclidean norm
        of at most ``clip``.
    """

    policy: Policy
    clip: float
    noise: float

    code = _FLOATS
    deterministic = False
    blind = True
    zeros_count = True

    def __post_init__(self) -> None:
        if min(self.noise, self.clip) <= 0:
            said = f"got {self.noise}, {self.clip}"
            raise ConfigError(f"noise and clip must both be above 0 or both be left out, {said}")
        if self.clip < _LEAST_CLIP:
            raise ConfigError(f"clip must be at least {_LEAST_CLIP:g}, got {self.clip}")
        if not (self.policy.blind and self.policy.code.floats) or self.policy.noisy:
            said = "what it sends would tell of the record"
            raise ConfigError(f"noise is not for policy {settings_name(self.policy)!r}: {said}")

    @property
    def noisy(self) -> "Noisy":
        """Itself."""
        return self

    @property
    def deviation(self) -> float:
        """The noise's standard deviation."""
        return self.noise * self.clip

    def fits(self, layer: FirstLayer) -> None:
        """Fit what the policy fits."""
        self.policy.fits(layer)

    def coded(self, outputs: FloatArray) -> FloatArray:
        """Return the outputs as the policy would send them."""
        return self.policy.coded(outputs)

    def mask(self, outputs: FloatArray, secret: bytes, round_number: int, records: NDArray[np.int64]) -> Mask:
        """Keep what the policy keeps."""
        return self.policy.mask(outputs, secret, round_number, records)

    def information(self, width: int, dtype: str) -> float:
        """Return the smaller of payload and channel: (k/2) log2(1 + 1 / (k noise^2)) for k outputs at most.

        The capacity of k Gaussian channels that share the power ``clip^2``, of real numbers: the bits of floating
        point below the noise are taken for noise.
        """
        payload = self.policy.information(width, dtype)
        return min(payload, width / 2 * math.log2(1 + 1 / (width * self.noise**2)))

    def most_equations(self, width: int) -> float:
        """Return the policy's."""
        return self.policy.most_equations(width)

    def silence(self, layer: FirstLayer) -> Silence:
        """Nothing: zeros are sent, too."""
        return Unknown()

    def search(self, layer: FirstLayer) -> Table:
        """Search from a fifth to five times as much noise."""
        return {"noise": {"low": self.noise / 5, "high": self.noise * 5, "log": True}}

    def scales(self, outputs: FloatArray, mask: Mask) -> FloatArray:
        """Return the factor ``(records, 1)`` that brings each record's kept outputs to a norm of at most ``clip``."""
        # in float64: a server chooses weights and clip, and float32 squares of what is small or large are 0 or infinite
        norms = np.sqrt(np.square(np.where(mask, outputs, 0), dtype=np.float64).sum(axis=1, keepdims=True))
        found = np.asarray(self.clip / np.maximum(norms, self.clip), dtype=np.float32)
        return np.where(found < np.finfo(np.float32).tiny, np.float32(0), found)  # subnormal ones may be rounded up

    def gaussian(
        self, secret: bytes, weights_name: bytes, round_number: int, records: NDArray[np.int64], width: int
    ) -> FloatArray:
        """Return one device's noise ``(records, width)``, standard deviation ``noise * clip``.

        Its stream belongs to the weights, too: the same noise on the activations of two weights could be subtracted.
        """
        own = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"fedsplit noise " + weights_name).derive(secret)
        words = np.ascontiguousarray(keystream(own, NOISE, round_number, records, 8 * width)).view("<u4")
        uniform = (words.astype(np.float64) + 0.5) / 2**32  # never 0 or 1
        radius, angle = np.sqrt(-2 * np.log(uniform[:, :width])), 2 * np.pi * uniform[:, width:]  # Box and Muller
        return np.asarray(self.deviation * radius * np.cos(angle), dtype=np.float32)


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
