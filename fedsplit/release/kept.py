"""What dropping leaves of outputs: the only thing a release can be packed from."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray


@dataclass(frozen=True)
class Kept:
    """What is left of first-layer outputs after dropping: the only thing a release can be packed from.

    Attributes
    ----------
    counts : int64 array (records,)
        Outputs kept of each record.
    bitmap : uint8 array (records, ceil(width / 8))
        Which ones, one bit per output, lowest bit first.
    values : float32 array (sum of counts,)
        The kept outputs, record by record in the order of their index.
    width : int
        Outputs of the first layer.
    """

    counts: NDArray[np.int64]
    bitmap: NDArray[np.uint8]
    values: FloatArray
    width: int

    @classmethod
    def of(cls, outputs: FloatArray, mask: NDArray[np.bool_], *, zeros_count: bool) -> "Kept":
        """Drop the outputs that a mask does not keep.

        Parameters
        ----------
        outputs : float32 array (records, width)
        mask : bool array (records, width)
        zeros_count : bool
            Whether a kept zero is sent. It is false for relu: the derivative at zero is zero, so a zero sends nothing.
        """
        pattern = mask if zeros_count else mask & (outputs != 0)
        return cls(
            counts=pattern.sum(axis=1, dtype=np.int64),
            bitmap=np.packbits(pattern, axis=1, bitorder="little"),
            values=outputs.ravel()[np.flatnonzero(pattern)],  # three times as quick as by the pattern itself
            width=outputs.shape[1],
        )

    def take(self, rows: NDArray[np.bool_]) -> "Kept":
        """Return some of the records, in their order."""
        values = self.values[np.repeat(rows, self.counts)]
        return Kept(self.counts[rows], self.bitmap[rows], values, self.width)

    @classmethod
    def join(cls, parts: "list[Kept]", width: int) -> "Kept":
        """Put the records of several parts behind one another."""
        return cls(
            counts=np.concatenate([p.counts for p in parts] or [np.zeros(0, np.int64)]),
            bitmap=np.concatenate([p.bitmap for p in parts] or [np.zeros((0, -(-width // 8)), np.uint8)]),
            values=np.concatenate([p.values for p in parts] or [np.zeros(0, np.float32)]),
            width=width,
        )
