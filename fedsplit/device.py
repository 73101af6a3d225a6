"""One node's devices: the forward half of a chunk, the backward half of a pending one, prediction.

All devices share the first layer, so a node computes the records of all of them in one product. What depends on the
device (secret, masks, order, gradients) is taken per device, and devices are added in float64: how devices are packed
into nodes changes no release, and a sum of gradients by far less than a float32 can show.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.data import DeviceData, Records
from fedsplit.dropping import KEYED_ROUND, Dropping, Kept, record_order, unpack_bitmap
from fedsplit.model import FirstLayer, Weights
from fedsplit.packing import FloatArray, IntArray, sum_groups
from fedsplit.state import NodeState, Pending
from fedsplit.wire import CutGradients, Download, Gradients, Registration, Release, Upload, weights_digest

log = logging.getLogger(__name__)
BLOCK = 1024  # records computed at once: bounds the dense activations in memory
_WHOLE_NODE = -1


@dataclass(frozen=True)
class _Chunk:
    """Some records of some devices: rows of x and y belong to ``devices[i]`` for ``records[i]`` rows in turn."""

    devices: IntArray
    records: IntArray
    index: IntArray
    x: FloatArray
    y: NDArray[Any]


class Node:
    """The devices of one node.

    Parameters
    ----------
    first_layer : FirstLayer
        Its initial weights are not used: they come with each download.
    dropping : Dropping
    device_ids : sequence of int, ascending
    data : callable
        Returns a device's records by its id; an exception makes that device sit out, no other.
    secret : callable
        Returns a device's 32-byte secret by its id.
    state : callable
        Returns the node's state folder for a run by the run's number.
    dtype : str
        Of activations on the wire: ``float16`` or ``float32``.
    keyed : bool
        Whether a record keeps the same outputs in all rounds.
    """

    def __init__(
        self,
        first_layer: FirstLayer,
        dropping: Dropping,
        device_ids: Sequence[int],
        data: Callable[[int], DeviceData],
        secret: Callable[[int], bytes],
        state: Callable[[int], NodeState],
        *,
        dtype: str,
        keyed: bool,
    ) -> None:
        self.first_layer = first_layer
        self.dropping = dropping
        self.device_ids = np.asarray(device_ids, dtype=np.int64)
        self.dtype = dtype
        self.keyed = keyed
        self._data = data
        self._secret = secret
        self._state = state

    def register(self) -> Registration:
        """Return the node's devices and how many records each holds."""
        sizes = np.array([self._size(d) for d in self.device_ids.tolist()], dtype=np.int64).reshape(-1, 2)
        return Registration(self.device_ids, sizes[:, 0], sizes[:, 1])

    def exchange(self, download: Download) -> Upload:
        """Run the backward half of the pending chunks, then release the records that the schedule names."""
        state = self._state(download.run)
        state.forget_before(download.keep_from)
        gradients, lost = self._backward(download, state)
        chunk, failed = self._select(download.schedule, test=False)
        weights = self.first_layer.unflatten(download.weights)
        mask_round = KEYED_ROUND if self.keyed else download.round_number
        kept, slopes = self._forward(chunk, weights, mask_round, want_slopes=True)
        digest = weights_digest(download.weights)
        if len(chunk.devices):
            pending = Pending(digest, chunk.devices, chunk.records, chunk.index, kept.counts, kept.bitmap, slopes)
            state.save_pending(download.round_number, pending)
        exposures = self._note(state, "train", chunk, download, digest) if len(chunk.devices) else 0
        return Upload(self._release(kept, chunk), gradients, lost, failed, exposures)

    def evaluate(self, download: Download) -> Upload:
        """Release the test records that the schedule names, with the masks of prediction (always keyed)."""
        state = self._state(download.run)
        chunk, failed = self._select(download.schedule, test=True)
        kept, _ = self._forward(chunk, self.first_layer.unflatten(download.weights), KEYED_ROUND, want_slopes=False)
        exposures = self._note(state, "test", chunk, download, weights_digest(download.weights))
        nothing = np.zeros(0, dtype=np.int64)
        return Upload(self._release(kept, chunk), self._gradients([], []), nothing, failed, exposures)

    def _size(self, device: int) -> tuple[int, int]:
        try:
            data = self._data(device)
        except Exception as error:  # a device's own code may raise anything; its text could hold records
            log.warning("device %d cannot take part (%s)", device, type(error).__name__)
            return 0, 0
        return len(data.train), len(data.test)

    def _select(self, schedule: IntArray, *, test: bool) -> tuple[_Chunk, IntArray]:
        """Gather the scheduled records of all devices, each device's in ascending order of their index."""
        parts: list[tuple[int, IntArray, Records]] = []
        failed: list[int] = []
        for device, pass_number, start, stop in schedule.tolist():
            try:
                records = self._records(device, test=test)
                if stop > len(records):
                    raise ValueError("schedule goes beyond the device's records")
                if test or stop - start == len(records):
                    index = np.arange(start, stop)
                else:
                    order = record_order(self._secret(device), pass_number, len(records))
                    index = np.sort(order[start:stop])
                parts.append((device, index, records.take(index)))
            except Exception as error:  # see _size
                log.warning("device %d sits out a round (%s)", device, type(error).__name__)
                failed.append(device)
        return self._join(parts), np.array(failed, dtype=np.int64)

    def _records(self, device: int, *, test: bool) -> Records:
        if device not in self.device_ids:
            raise ValueError("device of another node")
        data = self._data(device)
        return data.test if test else data.train

    def _join(self, parts: list[tuple[int, IntArray, Records]]) -> _Chunk:
        shape = self.first_layer.input_shape
        return _Chunk(
            devices=np.array([device for device, _, _ in parts], dtype=np.int64),
            records=np.array([len(index) for _, index, _ in parts], dtype=np.int64),
            index=np.concatenate([index for _, index, _ in parts] or [np.zeros(0, np.int64)]),
            x=np.concatenate([r.x for _, _, r in parts] or [np.zeros((0, *shape), np.float32)]),
            y=np.concatenate([r.y for _, _, r in parts] or [np.zeros(0, np.int64)]),
        )

    def _forward(
        self, chunk: _Chunk, weights: Weights, mask_round: int, *, want_slopes: bool
    ) -> tuple[Kept, FloatArray]:
        """Compute, drop and keep; also the activation's derivative at what was kept, where it is not 1."""
        layer, width = self.first_layer, self.first_layer.width
        owners = np.repeat(chunk.devices, chunk.records)
        parts: list[Kept] = []
        slopes: list[FloatArray] = []
        for start in range(0, len(chunk.x), BLOCK):
            rows = slice(start, start + BLOCK)
            pre = layer.pre_activations(weights, chunk.x[rows]).flatten(1)
            outputs = layer.activation(pre).numpy()
            mask = self._masks(outputs, owners[rows], chunk.index[rows], mask_round)
            parts.append(Kept.of(outputs, mask, zeros_count=not layer.positive_only))
            if want_slopes and not layer.unit_slope:
                slopes.append(layer.derivative(pre.numpy()[mask]))
        return Kept.join(parts, width), np.concatenate([*slopes, np.zeros(0, np.float32)])

    def _masks(self, outputs: FloatArray, owners: IntArray, index: IntArray, mask_round: int) -> NDArray[np.bool_]:
        """Take each device's masks from its own secret; ``owners`` is ascending."""
        devices, starts = np.unique(owners, return_index=True)
        mask = np.empty(outputs.shape, dtype=bool)
        for device, start, stop in zip(devices.tolist(), starts, [*starts[1:], len(owners)], strict=True):
            rows = slice(start, stop)
            mask[rows] = self.dropping.mask(outputs[rows], self._secret(device), mask_round, index[rows])
        return mask

    def _release(self, kept: Kept, chunk: _Chunk) -> Release:
        return Release.pack(kept, chunk.devices, chunk.records, chunk.y, self.dtype)

    def _note(self, state: NodeState, ledger: str, chunk: _Chunk, download: Download, digest: int) -> int:
        """Count the chunk's exposures in the node's ledger; see :meth:`NodeState.count_exposures`."""
        owners = np.repeat(chunk.devices, chunk.records)
        name = b"%d %d %s %s" % (download.round_number, digest, chunk.devices.tobytes(), chunk.index.tobytes())
        release = int.from_bytes(sha256(name).digest()[:8], "little") >> 2
        return state.count_exposures(ledger, release, owners << 32 | chunk.index)

    def _backward(self, download: Download, state: NodeState) -> tuple[Gradients, IntArray]:
        """Sum the first-layer gradients of all pending chunks, per device or over the node."""
        sums: dict[int, NDArray[np.float64]] = {}
        counts: dict[int, int] = {}
        lost: list[int] = []
        for block in download.pending:
            pending = state.load_pending(block.round_number)
            if pending is None or not _fits(pending, block):
                lost.append(block.round_number)
                continue
            try:
                chunk = self._chunk_gradients(pending, block)
            except Exception as error:  # see _size
                log.warning("backward half of round %d failed (%s)", block.round_number, type(error).__name__)
                lost.append(block.round_number)
                continue
            for device, count, total in chunk:
                group = device if download.per_device else _WHOLE_NODE
                sums[group] = sums[group] + total if group in sums else total
                counts[group] = counts.get(group, 0) + count
        groups = sorted(sums)
        gradients = self._gradients([sums[g] for g in groups], [counts[g] for g in groups], groups)
        return gradients, np.array(lost, dtype=np.int64)

    def _gradients(self, sums: list[NDArray[np.float64]], counts: list[int], groups: Sequence[int] = ()) -> Gradients:
        return Gradients(
            np.array(groups, dtype=np.int64),
            np.array(counts, dtype=np.int64),
            np.stack(sums) if sums else np.zeros((0, self.first_layer.size)),
        )

    def _chunk_gradients(self, pending: Pending, block: CutGradients) -> list[tuple[int, int, NDArray[np.float64]]]:
        """Return (device, records, dW of the summed loss) of a pending chunk's devices."""
        delta = block.values()
        if len(pending.slopes):
            delta = delta * pending.slopes
        stops = np.cumsum(pending.records)
        rows = np.concatenate([[0], stops])
        values = np.concatenate([[0], np.cumsum(pending.counts)])
        result = []
        for device, start, stop in zip(pending.devices.tolist(), rows[:-1].tolist(), rows[1:].tolist(), strict=True):
            if stop > start:
                x = self._records(device, test=False).x[pending.index[start:stop]]
                total = self._gradient(x, pending, start, stop, delta[values[start] : values[stop]])
                result.append((device, stop - start, total))
        return result

    def _gradient(
        self, x: FloatArray, pending: Pending, start: int, stop: int, delta: FloatArray
    ) -> NDArray[np.float64]:
        """Return dW over the rows ``start:stop`` of a pending chunk; ``delta`` are their values at what was sent."""
        layer, used = self.first_layer, 0
        total = np.zeros(layer.size)
        for first in range(start, stop, BLOCK):
            last = min(first + BLOCK, stop)
            pattern = unpack_bitmap(pending.bitmap[first:last], layer.width)
            dense = np.zeros(pattern.shape, dtype=np.float32)
            count = int(pending.counts[first:last].sum())
            dense[pattern] = delta[used : used + count]
            used += count
            shaped = dense.reshape(-1, *layer.cut_shape)
            total += layer.gradient(x[first - start : last - start], shaped)
        return total


def _fits(pending: Pending, block: CutGradients) -> bool:
    """Whether cut gradients belong to this chunk: same weights, devices and number of values."""
    return (
        pending.digest == block.digest
        and np.array_equal(pending.devices, block.devices)
        and np.array_equal(sum_groups(pending.counts, pending.records), block.lengths)
    )
