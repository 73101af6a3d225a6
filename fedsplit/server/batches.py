"""Released records as mini-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray, IntArray, unpack_bitmap
from fedsplit.wire.release import Release


@dataclass(frozen=True)
class Batches:
    """Released records in canonical order (device, record), dense only one mini-batch at a time.

    Attributes
    ----------
    devices : int64 array (records,)
        Which device each record came from.
    targets : float32 or int64 array (records,) or (records, outputs)
    starts : int64 array (records + 1,)
        Where each record's values begin.
    bitmap : uint8 array (records, ceil(width / 8))
    values : float32 array (number of sent outputs,)
    width : int
    """

    devices: IntArray
    targets: NDArray[Any]
    starts: IntArray
    bitmap: NDArray[np.uint8]
    values: FloatArray
    width: int

    @classmethod
    def join(cls, releases: Sequence[Release]) -> "Batches":
        """Join the releases of one round, whatever nodes they came from, into canonical order."""
        devices = np.concatenate([r.owners for r in releases])
        order = np.argsort(devices, kind="stable")  # a device's own records are in order already
        counts = np.concatenate([r.counts for r in releases])
        values = np.concatenate([r.values() for r in releases])
        starts = np.concatenate([[0], np.cumsum(counts)])
        return cls(
            devices=devices[order],
            targets=np.concatenate([r.targets for r in releases])[order],
            starts=np.concatenate([[0], np.cumsum(counts[order])]),
            bitmap=np.concatenate([r.bitmap for r in releases])[order],
            values=values[_ranges(starts, order)],
            width=releases[0].width,
        )

    @classmethod
    def concat(cls, parts: Sequence["Batches"]) -> "Batches":
        """Put rounds behind one another, for replay."""
        counts = np.concatenate([np.diff(p.starts) for p in parts])
        return cls(
            devices=np.concatenate([p.devices for p in parts]),
            targets=np.concatenate([p.targets for p in parts]),
            starts=np.concatenate([[0], np.cumsum(counts)]),
            bitmap=np.concatenate([p.bitmap for p in parts]),
            values=np.concatenate([p.values for p in parts]),
            width=parts[0].width,
        )

    def without(self, device: int) -> "Batches":
        """Return the records of all other devices."""
        return self.take(np.flatnonzero(self.devices != device))

    def part(self, size: int, rng: np.random.Generator) -> "Batches":
        """Return as many of the records as fit into ``size`` bytes, drawn at random."""
        if self.nbytes <= size:
            return self
        lengths = np.diff(self.starts)
        alike = self.nbytes - self.starts.itemsize - self.values.nbytes  # all but values is as large for any record
        order = rng.permutation(len(self))
        used = np.cumsum(alike // max(1, len(self)) + self.values.itemsize * lengths[order])
        return self.take(np.sort(order[: np.searchsorted(used, size - self.starts.itemsize, side="right")]))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(a.nbytes for a in (self.devices, self.targets, self.starts, self.bitmap, self.values))

    def take(self, rows: IntArray) -> "Batches":
        """Return some of the records, in the order asked for."""
        return Batches(
            devices=self.devices[rows],
            targets=self.targets[rows],
            starts=np.concatenate([[0], np.cumsum(np.diff(self.starts)[rows])]),
            bitmap=self.bitmap[rows],
            values=self.values[_ranges(self.starts, rows)],
            width=self.width,
        )

    def __len__(self) -> int:
        return len(self.devices)

    def dense(self, rows: IntArray) -> tuple[FloatArray, IntArray, IntArray]:
        """Return the outputs ``(rows, width)`` of some records, the cells that were sent, and where their values stand.

        Cells are counted through all rows: numpy reads and writes by places quicker than by a pattern.
        """
        cells = np.flatnonzero(unpack_bitmap(self.bitmap[rows], self.width))
        positions = _ranges(self.starts, rows)
        outputs = np.zeros(len(rows) * self.width, dtype=np.float32)
        outputs[cells] = self.values[positions]
        return outputs.reshape(len(rows), self.width), cells, positions


def _ranges(starts: IntArray, rows: IntArray) -> IntArray:
    """Return ``starts[r]..starts[r+1]`` of all rows behind one another."""
    lengths = starts[rows + 1] - starts[rows]
    ends = np.cumsum(lengths)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
    return np.asarray(np.repeat(starts[rows], lengths) + within, dtype=np.int64)


def minibatches(order: IntArray, size: int) -> Iterator[IntArray]:
    """Cut an order into mini-batches; a last batch of one record joins the one before (batch norm needs two)."""
    starts = list(range(0, len(order), size))
    if len(starts) > 1 and len(order) - starts[-1] == 1:
        starts.pop()
    for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
        yield order[start:stop]
