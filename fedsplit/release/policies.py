"""Which activation outputs leave the device: the policies, and the random streams behind them.

Dropping (arXiv 1711.07520) sets outputs to zero before they leave; kept values are not rescaled. Masks come from a
*device secret* that the server does not have, by AES-256 on explicit counter blocks (counter mode, laid out so that
one call serves a whole chunk): block = (purpose, round, record, counter), four little-endian uint32. Any runtime
with AES can reproduce them.
"""

from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray
from fedsplit.common.errors import ConfigError
from fedsplit.release.streams import DROPPING, NOISE, keystream

POLICIES = ("none", "random", "at-most", "top-k", "units", "bits")


@dataclass(frozen=True)
class Dropping:
    """A policy and its budget.

    Attributes
    ----------
    policy : str
        ``none``: everything is kept. ``random``: each output is kept with probability ``keep``, independently (the
        paper's policy). ``at-most``: exactly ``k`` outputs, drawn at random, of which relu zeros send nothing.
        ``top-k``: the ``k`` largest magnitudes; ties keep the lower index. ``units``: all outputs of a layer that has
        just ``k``. ``bits``: all outputs of a relu layer as ``bits``-bit codes; see :meth:`coded`.
    keep : float
        In (0, 1], in steps of 2^-16; only for ``random``.
    k : int
        Outputs per record; for ``at-most``, ``top-k`` and ``units``.
    bits : int
        In 1..8; only for ``bits``.
    clip, noise : float
        Gaussian noise of standard deviation ``noise * clip`` on every output sent, after the outputs of a record are
        scaled to a Euclidean norm of at most ``clip``; 0 adds none. Not for ``top-k`` and ``bits``, whose choice of
        outputs would tell what the noise hides.
    """

    policy: str
    keep: float = 1.0
    k: int = 0
    bits: int = 0
    clip: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        if self.policy == "random" and not 0.0 < self.keep <= 1.0:
            raise ConfigError(f"keep must be in (0, 1], got {self.keep}")
        if self.policy in ("at-most", "top-k", "units") and self.k < 1:
            raise ConfigError(f"k must be at least 1, got {self.k}")
        if self.policy == "bits" and not 1 <= self.bits <= 8:
            raise ConfigError(f"bits must be in 1..8, got {self.bits}")
        if bool(self.noise) != bool(self.clip) or min(self.noise, self.clip) < 0:
            raise ConfigError(f"noise and clip must both be above 0 or both be left out, got {self.noise}, {self.clip}")
        if self.noise and self.policy in ("top-k", "bits"):
            raise ConfigError(f"noise is not for policy {self.policy!r}: what it sends would tell of the record")

    @property
    def deterministic(self) -> bool:
        """Whether the outputs and the weights alone decide what is sent, without any random stream."""
        return self.policy not in ("random", "at-most") and not self.noise

    def check_layer(self, width: int, relu: bool) -> None:
        """Raise ConfigError if the policy does not fit a first layer of ``width`` outputs."""
        if self.policy in ("at-most", "top-k") and self.k > width:
            raise ConfigError(f"k must be at most {width} (the first layer's outputs), got {self.k}")
        if self.policy == "units" and self.k != width:
            raise ConfigError(f"policy 'units' sends all outputs: k must be {width} (the first layer's), got {self.k}")
        if self.policy == "bits" and not relu:
            raise ConfigError("policy 'bits' needs the activation relu")

    def coded(self, outputs: FloatArray) -> FloatArray:
        """Round relu outputs up to the levels of ``bits``-bit codes; other policies leave them as they are.

        A level is ``code * 2^(1 - bits)``, code 0..2^bits - 1: one bit tells zero from above zero. The gradient passes
        straight through at what is above zero.
        """
        if self.policy != "bits":
            return outputs
        step = np.float32(2.0 ** (1 - self.bits))
        return np.asarray(np.minimum(np.ceil(outputs / step), np.float32(2**self.bits - 1)) * step, np.float32)

    def mask(
        self, outputs: FloatArray, secret: bytes, round_number: int, records: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Return which of the ``outputs`` ``(records, width)`` of one device are kept.

        Parameters
        ----------
        records : int array (records,)
            The records' indices on their device; with ``secret`` and ``round_number`` they name the streams.
        """
        n, width = outputs.shape
        if self.policy == "random":
            words = keystream(secret, DROPPING, round_number, records, 2 * width)
            threshold = max(1, round(self.keep * 65536))
            # compared as 32-bit, since 65536 (keep everything) does not fit the stream's 16 bits
            kept: NDArray[np.bool_] = np.ascontiguousarray(words).view("<u2") < np.uint32(threshold)
            return kept
        if self.policy == "at-most":
            words = keystream(secret, DROPPING, round_number, records, 4 * width)
            return _smallest(np.ascontiguousarray(words).view("<u4"), self.k)
        if self.policy == "top-k":
            return _smallest(-np.abs(outputs), self.k)
        return np.ones((n, width), dtype=bool)

    def scales(self, outputs: FloatArray, mask: NDArray[np.bool_]) -> FloatArray:
        """Return the factor ``(records, 1)`` that brings each record's kept outputs to a norm of at most ``clip``."""
        norms = np.sqrt(np.square(np.where(mask, outputs, 0)).sum(axis=1, keepdims=True))
        return np.asarray(self.clip / np.maximum(norms, self.clip), dtype=np.float32)

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
        return np.asarray(self.noise * self.clip * radius * np.cos(angle), dtype=np.float32)


def _smallest(keys: NDArray[np.uint32] | FloatArray, k: int) -> NDArray[np.bool_]:
    """Mark the ``k`` smallest keys of each row; ties take the lower index."""
    if keys.shape[0] == 0:
        return np.zeros(keys.shape, dtype=bool)
    last = np.partition(keys, k - 1, axis=1)[:, k - 1 : k]  # (records, 1): the k-th smallest
    below = keys < last
    tied = keys == last
    room = k - below.sum(axis=1, keepdims=True)
    return np.asarray(below | (tied & (np.cumsum(tied, axis=1) <= room)), dtype=np.bool_)
