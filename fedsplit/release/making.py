"""The forward half: from records to what dropping leaves of their first-layer outputs.

All devices share the first layer, so the records of many are computed in one product; what depends on the device
(masks, noise) is drawn from its own secret.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray, IntArray
from fedsplit.common.errors import ConfigError
from fedsplit.data import Records
from fedsplit.model.layer import FirstLayer
from fedsplit.release.kept import Kept
from fedsplit.release.noise import Noisy
from fedsplit.release.policy import Policy

BLOCK = 1024  # records computed at once: bounds the dense activations in memory
Secret = Callable[[int], bytes]


@dataclass(frozen=True)
class Chunk:
    """Some records of some devices: rows of x and y belong to ``devices[i]`` for ``records[i]`` rows in turn.

    Attributes
    ----------
    devices, records : int64 arrays (devices,)
    index : int64 array (records,)
        Which of its device's records each is: masks and noise are drawn by it.
    segments : int64 array (records, segments of each)
        Pieces of a device's series, which records may share.
    x : float32 or float64 array (records, *input_shape)
    y : array (records,) or (records, outputs)
    content : int64 array (records,), optional
        What a ledger knows the records by, where that is their content and not device and index.
    """

    devices: IntArray
    records: IntArray
    index: IntArray
    segments: IntArray
    x: FloatArray | NDArray[np.float64]
    y: NDArray[Any]
    content: IntArray | None = None

    @classmethod
    def of(cls, device: int, records: Records) -> "Chunk":
        """Return all records of one device."""
        index = np.arange(len(records))
        segments = index[:, None] if records.segments is None else records.segments
        return cls(np.array([device]), np.array([len(index)]), index, segments, records.x, records.y)

    @property
    def owners(self) -> IntArray:
        """The device of each record."""
        return np.repeat(self.devices, self.records)

    @property
    def numbers(self) -> IntArray:
        """The records' numbers in a ledger: by device and index, or by content where that is what they are known by."""
        return self.owners << 32 | self.index if self.content is None else self.content

    @property
    def shared(self) -> IntArray:
        """The numbers that records are counted under in a ledger, ``(records, segments of each)``."""
        return (self.owners << 32)[:, None] | self.segments if self.content is None else self.segments

    def take(self, rows: NDArray[np.bool_]) -> "Chunk":
        """Return some of the records; devices without any left are gone."""
        devices, records = np.unique(self.owners[rows], return_counts=True)
        content = None if self.content is None else self.content[rows]
        return Chunk(devices, records, self.index[rows], self.segments[rows], self.x[rows], self.y[rows], content)


@dataclass(frozen=True)
class Outputs:
    """A chunk's outputs after dropping.

    ``slopes`` are the derivatives at what was kept, where they are not 1; ``active`` is the share of each record's
    outputs that were above zero before dropping.
    """

    kept: Kept
    slopes: FloatArray
    active: NDArray[np.float64]

    def take(self, rows: NDArray[np.bool_]) -> "Outputs":
        """Return some of the records."""
        slopes = self.slopes[np.repeat(rows, self.kept.counts)] if len(self.slopes) else self.slopes
        return Outputs(self.kept.take(rows), slopes, self.active[rows])


def forward(
    layer: FirstLayer,
    dropping: Policy,
    secret: Secret,
    chunk: Chunk,
    weights: FloatArray,
    mask_round: int,
    noise_name: bytes,
    *,
    want_slopes: bool,
) -> Outputs:
    """Compute and drop, a block of records at a time.

    Parameters
    ----------
    secret : callable
        Returns a device's 32-byte secret by its id.
    weights : float32 array (parameters,)
    mask_round : int
        Which masks to draw.
    noise_name : bytes
        Which noise to draw; never the same for two weights.
    want_slopes : bool
        Whether a backward half will follow.
    """

    def drawn(rows: slice, draw: Callable[[bytes, slice], NDArray[Any]]) -> NDArray[Any]:
        """Draw each device's rows of a block from its own secret."""
        devices, starts = np.unique(owners[rows], return_index=True)
        stops = [*starts[1:].tolist(), len(owners[rows])]
        return np.concatenate(
            [draw(secret(d), slice(*r)) for d, *r in zip(devices.tolist(), starts.tolist(), stops, strict=True)]
        )

    def with_noise(noisy: Noisy, outputs: FloatArray, mask: NDArray[np.bool_], rows: slice) -> tuple[FloatArray, ...]:
        outputs = np.nan_to_num(outputs)  # no noise hides which are infinite
        scales, index = noisy.scales(outputs, mask), chunk.index[rows]
        noise = drawn(rows, lambda key, r: noisy.gaussian(key, noise_name, mask_round, index[r], layer.width))
        return outputs * scales + noise, scales

    def block(rows: slice) -> Outputs:
        index = chunk.index[rows]
        pre = layer.pre_activations(layer.unflatten(weights), chunk.x[rows]).flatten(1)
        outputs = layer.activation(pre).numpy().astype(np.float32, copy=False)
        active = (outputs > 0).mean(axis=1)
        outputs = dropping.coded(outputs)
        mask = drawn(rows, lambda key, r: dropping.mask(outputs[r], key, mask_round, index[r]))
        _check_shape(outputs, mask, (len(index), layer.width))
        scales = np.ones((len(outputs), 1), dtype=np.float32)
        if noisy is not None:
            outputs, scales = with_noise(noisy, outputs, mask, rows)
        kept = Kept.of(outputs, mask, zeros_count=dropping.zeros_count or not layer.positive_only)
        slopes = np.zeros(0, dtype=np.float32)
        if want_slopes and (noisy is not None or not layer.unit_slope):
            slopes = (layer.derivative(pre.numpy()) * scales)[mask]
        return Outputs(kept, slopes, active)

    owners, noisy = chunk.owners, dropping.noisy
    blocks = [block(slice(start, start + BLOCK)) for start in range(0, len(chunk.x), BLOCK)]
    return Outputs(
        Kept.join([b.kept for b in blocks], layer.width),
        np.concatenate([b.slopes for b in blocks] or [np.zeros(0, np.float32)]),
        np.concatenate([b.active for b in blocks] or [np.zeros(0)]),
    )


def _check_shape(outputs: FloatArray, mask: NDArray[np.bool_], shape: tuple[int, int]) -> None:
    """Refuse what a policy from outside makes of outputs, if a pattern could not be told from it."""
    if outputs.shape != shape or outputs.dtype != np.float32 or mask.shape != shape or mask.dtype != np.bool_:
        raise ConfigError(
            f"the policy must return float32 outputs and a bool mask of shape {shape}, got {outputs.dtype} of "
            f"{outputs.shape} and {mask.dtype} of {mask.shape}"
        )
