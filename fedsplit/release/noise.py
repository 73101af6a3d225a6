"""Gaussian noise on what a policy sends."""

import math
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray
from fedsplit.common.errors import ConfigError
from fedsplit.model.layer import FirstLayer
from fedsplit.release.codes import Code
from fedsplit.release.policies import Table, settings_name
from fedsplit.release.policy import Mask, Policy, Silence, Unknown
from fedsplit.release.streams import NOISE, keystream

_LEAST_CLIP = 1e-30  # far above where float32 rounds what is sent, and the noise, to a few levels


@dataclass(frozen=True)
class Noisy(Policy):
    """Gaussian noise on every output that a policy keeps, zeros among them: a missing one would tell that it was zero.

    The choice of ``policy`` must tell nothing of the record, or else it would tell what the noise hides. Kept outputs
    of a record are scaled to a Euclidean norm of at most ``clip``. Noise of standard deviation ``noise * clip`` is
    then added.
    """

    policy: Policy
    clip: float
    noise: float

    code = Code()
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
        """Keep what the policy keeps.

        Parameters
        ----------
        outputs, secret, round_number, records : as in :meth:`Policy.mask`
        """
        return self.policy.mask(outputs, secret, round_number, records)

    def information(self, width: int, dtype: str) -> float:
        """Return the smaller of payload and channel: (k/2) log2(1 + 1 / (k noise^2)) for k outputs at most.

        The channel: k Gaussian ones that share the power ``clip^2``. Float bits below the noise are taken for noise.
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
        """Return one device's noise, float32 ``(records, width)``, of standard deviation ``noise * clip``.

        Parameters
        ----------
        secret, round_number, records : as in :meth:`Policy.mask`
        weights_name : bytes
            Gives the weights a stream of their own: the same noise under two weights could be subtracted.
        width : int
        """
        own = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"fedsplit noise " + weights_name).derive(secret)
        words = np.ascontiguousarray(keystream(own, NOISE, round_number, records, 8 * width)).view("<u4")
        uniform = (words.astype(np.float64) + 0.5) / 2**32  # never 0 or 1
        radius, angle = np.sqrt(-2 * np.log(uniform[:, :width])), 2 * np.pi * uniform[:, width:]  # Box and Muller
        return np.asarray(self.deviation * radius * np.cos(angle), dtype=np.float32)
