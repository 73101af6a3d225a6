"""The backward half of a node: sums of first-layer gradients over the records of pending chunks.

Devices are added in float64: how they are packed into nodes changes a sum by far less than a float32 can show.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray, IntArray, sum_groups, unpack_bitmap
from fedsplit.data import Records
from fedsplit.device.own_records import OwnRecords, joined, same_width, segments_of, taken, why
from fedsplit.device.pending import NodeState, Pending
from fedsplit.guard.guard import Guard
from fedsplit.guard.proposal import Summed
from fedsplit.model.layer import FirstLayer
from fedsplit.release.making import BLOCK
from fedsplit.wire.exchange import CutGradients, Download, Gradients, weights_digest
from fedsplit.wire.ledger import Reason

log = logging.getLogger(__name__)
_WHOLE_NODE = -1
_FEW_RECORDS = 32  # of a device, below which it takes no product of its own
Refusals = list[tuple[int, int, int]]


@dataclass(frozen=True)
class _Share:
    """A device's part of a pending chunk; ``delta`` are the gradients at the pre-activations that were sent."""

    device: int
    index: IntArray
    records: Records
    counts: IntArray
    bitmap: NDArray[np.uint8]
    delta: FloatArray


class Backward:
    """Answers cut gradients.

    Parameters
    ----------
    layer : FirstLayer
    records : OwnRecords
    """

    def __init__(self, layer: FirstLayer, records: OwnRecords) -> None:
        self._layer = layer
        self._records = records

    def answer(self, download: Download, state: NodeState, guard: Guard) -> tuple[Gradients, IntArray, Refusals]:
        """Sum the first-layer gradients of all pending chunks, per device or over the node.

        Parameters
        ----------
        download : Download
            Its pending chunks hold the cut gradients.
        state : NodeState
            What the node has kept of its pending chunks.
        guard : Guard
            Checks each chunk before its gradients leave.

        Returns
        -------
        tuple
            The sums; the rounds of chunks that are lost; (device, reason, records) of what the guard refuses.
        """
        sums: dict[int, NDArray[np.float64]] = {}
        counts: dict[int, int] = {}
        lost: list[int] = []
        refused: Refusals = []
        for block in download.pending:
            pending = _load(state, block)
            shares = [] if pending is None else self._shares(pending, block)
            if pending is None or not shares:
                lost.append(block.round_number)
                continue
            if not _admit(guard, pending.weights, shares, per_device=download.per_device):
                refused += [(s.device, Reason.GRADIENTS, len(s.index)) for s in shares]
                if guard.enforce:
                    lost.append(block.round_number)
                    continue
            for group, records, total in self._sums(shares, per_device=download.per_device):
                sums[group] = sums.get(group, 0) + total
                counts[group] = counts.get(group, 0) + records
        return self._gradients(sums, counts), np.array(lost, dtype=np.int64), refused

    def _shares(self, pending: Pending, block: CutGradients) -> list[_Share]:
        """Return the devices' parts of a pending chunk; none if a device raises: the server expects all or nothing."""
        delta = block.values() * (pending.slopes if len(pending.slopes) else 1)
        rows = np.concatenate([[0], np.cumsum(pending.records)]).tolist()
        values = np.concatenate([[0], np.cumsum(pending.counts)])
        shares = []
        for device, start, stop in zip(pending.devices.tolist(), rows[:-1], rows[1:], strict=True):
            try:
                index = pending.index[start:stop]
                records = taken(self._records.of(device, test=False), index)
                shares.append(
                    _Share(
                        device,
                        index,
                        records,
                        pending.counts[start:stop],
                        pending.bitmap[start:stop],
                        delta[values[start] : values[stop]],
                    )
                )
            except Exception as error:  # a device's own code may raise anything
                log.warning("device %d fails in a backward half (%s)", device, why(error))
                return []
        return shares

    def _gradients(self, sums: dict[int, NDArray[np.float64]], counts: dict[int, int]) -> Gradients:
        groups = sorted(sums)
        return Gradients(
            np.array(groups, dtype=np.int64),
            np.array([counts[g] for g in groups], dtype=np.int64),
            np.stack([sums[g] for g in groups]) if groups else np.zeros((0, self._layer.size)),
        )

    def nothing(self) -> Gradients:
        """Return no sums."""
        return self._gradients({}, {})

    def _sums(self, shares: Sequence[_Share], *, per_device: bool) -> Iterator[tuple[int, int, NDArray[np.float64]]]:
        """Yield sums of dW of the summed loss: the group that each belongs to, how many records it is over, the sum.

        A device with many records takes float32 products of its own. Of those with few one product takes many, but in
        float64: which other devices a node happens to have must not show.
        """
        few = [] if per_device else [s for s in shares if len(s.index) < _FEW_RECORDS]
        for share in shares if per_device else [s for s in shares if len(s.index) >= _FEW_RECORDS]:
            group = share.device if per_device else _WHOLE_NODE
            yield group, len(share.index), self._gradient([share], np.float32)
        for start in range(0, len(few), _FEW_RECORDS):
            several = few[start : start + _FEW_RECORDS]
            yield _WHOLE_NODE, sum(len(s.index) for s in several), self._gradient(several, np.float64)

    def _gradient(self, shares: Sequence[_Share], dtype: type[np.floating[Any]]) -> NDArray[np.float64]:
        """Return dW of the loss summed over all records of some shares, a block at a time."""
        layer, used = self._layer, 0
        total = np.zeros(layer.size)
        x, counts = joined([s.records.x for s in shares]), joined([s.counts for s in shares])
        bitmap, delta = joined([s.bitmap for s in shares]), joined([s.delta for s in shares])
        for start in range(0, len(x), BLOCK):
            rows = slice(start, start + BLOCK)
            cells = np.flatnonzero(unpack_bitmap(bitmap[rows], layer.width))
            dense = np.zeros(len(bitmap[rows]) * layer.width, dtype=dtype)
            count = int(counts[rows].sum())
            dense[cells] = delta[used : used + count]
            used += count
            total += layer.gradient(x[rows].astype(dtype, copy=False), dense.reshape(-1, *layer.cut_shape))
        return total


def _load(state: NodeState, block: CutGradients) -> Pending | None:
    """Return what is kept of a chunk, if cut gradients belong to it: same weights, devices and number of values."""
    pending = state.load_pending(block.round_number)
    pending = pending and pending.among(block.devices)
    fits = (
        pending is not None
        and weights_digest(pending.weights) == block.digest
        and np.array_equal(pending.devices, block.devices)
        and np.array_equal(sum_groups(pending.counts, pending.records), block.lengths)
    )
    return pending if fits else None


def _admit(guard: Guard, weights: FloatArray, shares: Sequence[_Share], *, per_device: bool) -> bool:
    """Ask the guard for a block's gradient: summed over the node, or by device."""
    allowed = []
    for group in [[share] for share in shares] if per_device else [shares]:
        owners = np.concatenate([np.repeat(np.int64(s.device) << 32, len(s.index)) for s in group])
        summed = Summed(
            weights,
            owners | np.concatenate([s.index for s in group]),
            owners[:, None] | same_width([segments_of(s.index, s.records) for s in group]),
            np.concatenate([s.bitmap for s in group]),
            np.concatenate([s.delta for s in group]),
        )
        allowed.append(guard.admit_gradient(summed))
    return all(allowed)  # of a list: when observing, all of them leave and are counted
