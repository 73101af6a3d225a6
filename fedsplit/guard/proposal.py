"""What a device is about to let leave, as its guard sees it."""

from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray, IntArray, unpack_bitmap
from fedsplit.guard.accountant import Cost
from fedsplit.guard.criterion import LayerMap
from fedsplit.guard.gaussian import gaussian_precision
from fedsplit.model.layer import FirstLayer
from fedsplit.release.kept import Kept
from fedsplit.release.policy import Policy

Float64 = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Proposal:
    """Releases that are about to leave, all of one exchange.

    Attributes
    ----------
    run, round_number : int
    weights : float32 array (parameters,)
    name : bytes
        Digest of all that decides the bytes besides the record; see :func:`release_name`.
    owners, records : int64 arrays (records,)
        Each record's device, and its number in the ledgers.
    segments : int64 array (records, segments of each)
        The numbers that it is counted under.
    bitmap : uint8 array (records, ceil(width / 8))
        The outputs that would be sent, as in :class:`fedsplit.release.kept.Kept`.
    active : float64 array (records,)
        Share of the outputs that are above zero.
    cost : Cost
        Without leverage.
    exact : bool
        Whether a value sent is an equation in the record's numbers, as opposed to one bit.
    """

    run: int
    round_number: int
    weights: FloatArray
    name: bytes
    owners: IntArray
    records: IntArray
    segments: IntArray
    bitmap: NDArray[np.uint8]
    active: Float64
    cost: Cost
    exact: bool

    def take(self, rows: IntArray) -> "Proposal":
        """Return some of the releases."""
        chosen = {n: getattr(self, n)[rows] for n in ("owners", "records", "segments", "bitmap", "active")}
        return replace(self, **chosen, cost=Cost(**{name: values[rows] for name, values in vars(self.cost).items()}))


@dataclass(frozen=True)
class Summed:
    """A sum of first-layer gradients over some records, about to leave.

    Attributes
    ----------
    weights : float32 array (parameters,)
        Those that released the records.
    records : int64 array (records,)
    segments : int64 array (records, segments of each)
        As in :class:`Proposal`.
    bitmap : uint8 array (records, ceil(width / 8))
        The outputs that were sent of the records.
    values : float32 array (outputs sent,)
        Gradients at their pre-activations.
    """

    weights: FloatArray
    records: IntArray
    segments: IntArray
    bitmap: NDArray[np.uint8]
    values: FloatArray

    @property
    def name(self) -> bytes:
        """A 32-byte digest of all that decides the sum besides the records' content."""
        parts = (self.records, self.bitmap, self.values)
        return sha256(b"".join(sha256(part.tobytes()).digest() for part in parts)).digest()

    def pattern(self, width: int) -> Mask:
        """Return which outputs were sent, ``(records, width)``."""
        return unpack_bitmap(self.bitmap, width)

    def delta(self, width: int) -> FloatArray:
        """Return the gradients at all pre-activations, ``(records, width)``."""
        pattern = self.pattern(width)
        dense = np.zeros(pattern.shape, dtype=np.float32)
        dense[pattern] = self.values
        return dense


def release_name(layer: FirstLayer, weights: FloatArray, policy: str, mask_round: int) -> bytes:
    """Return a 32-byte name under which equal records give equal bytes.

    Parameters
    ----------
    layer : FirstLayer
    weights : float32 array
        The layer's, flat.
    policy : str
        The description of the policy and the wire's dtype.
    mask_round : int
        The round that masks are drawn for.
    """
    text = f"{layer.description}|{policy}|{mask_round}".encode()
    return sha256(sha256(weights.tobytes()).digest() + text).digest()


def release_cost(kept: Kept, layer: FirstLayer, dropping: Policy, dtype: str, weights: FloatArray) -> Cost:
    """Return what releases tell of their records, without leverage.

    Parameters
    ----------
    kept : Kept
    layer : FirstLayer
    dropping : Policy
    dtype : str
        ``float16`` or ``float32``, of the values on the wire.
    weights : float32 array
        The layer's, flat.
    """
    code, noisy = dropping.code, dropping.noisy
    fisher: Float64 | float = np.inf
    if noisy is not None:
        variance = noisy.deviation**2 * np.prod(layer.input_shape)
        rows = np.square(LayerMap(layer, layer.unflatten(weights)).rows(np.arange(layer.width))).sum(axis=1)
        fisher = unpack_bitmap(kept.bitmap, layer.width) @ rows / variance
    return Cost.of(
        len(kept.counts),
        equations=kept.counts if code.exact else 0,
        bits=layer.width + code.sent_bits(dtype) * kept.counts + code.record_bits(dtype),
        precision=gaussian_precision(noisy.noise if noisy is not None else 0),
        fisher=fisher,
        leverage=np.nan,
    )
