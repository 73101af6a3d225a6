"""A node's folder of what must outlive a process: the patterns of pending chunks."""

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray, IntArray
from fedsplit.common.files import replacing


@dataclass(frozen=True)
class Pending:
    """What the backward half of a released chunk needs; all arrays in the order of the release.

    Attributes
    ----------
    weights : float32 array (parameters,)
        Those that released the chunk.
    devices, records : int64 arrays (devices,)
        Device ids, ascending, and how many records each released.
    index : int64 array (records,)
        The records' indices on their devices.
    counts, bitmap
        Which outputs were sent, as in :class:`fedsplit.release.kept.Kept`.
    slopes : float32 array (sum of counts,) or (0,)
        The activation's derivative at the sent outputs; empty where it is 1 (relu and identity).
    """

    weights: FloatArray
    devices: IntArray
    records: IntArray
    index: IntArray
    counts: IntArray
    bitmap: NDArray[np.uint8]
    slopes: FloatArray

    def among(self, devices: IntArray) -> "Pending":
        """Return the part of some devices: the server may not have heard of all."""
        rows = np.isin(self.devices, devices)
        if rows.all():
            return self
        of_records = np.repeat(rows, self.records)
        of_values = np.repeat(of_records, self.counts)
        return Pending(
            self.weights,
            self.devices[rows],
            self.records[rows],
            self.index[of_records],
            self.counts[of_records],
            self.bitmap[of_records],
            self.slopes[of_values] if len(self.slopes) else self.slopes,
        )


class NodeState:
    """The state of one node in one run, in files, since processes and Ray actors come and go.

    Parameters
    ----------
    folder : Path
        Made if missing, readable by its owner alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def save_pending(self, round_number: int, pending: Pending) -> None:
        """Write a chunk's pattern, in place of an earlier one of the same round."""
        with replacing(self._pending(round_number)) as path, path.open("wb") as file:
            np.savez(file, **vars(pending))

    def load_pending(self, round_number: int) -> Pending | None:
        """Return a chunk's pattern, or None if it is missing or damaged."""
        try:
            with np.load(self._pending(round_number), allow_pickle=False) as file:
                return Pending(**file)
        except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, BadZipFile):
            return None

    def forget_before(self, round_number: int) -> None:
        """Delete the patterns of earlier rounds."""
        for path in self.folder.glob("pending-*.npz"):
            if int(path.stem.removeprefix("pending-")) < round_number:
                path.unlink(missing_ok=True)

    def rounds_of(self, device: int) -> list[int]:
        """Return the rounds of which a device has a pattern here."""
        rounds = sorted(int(path.stem.removeprefix("pending-")) for path in self.folder.glob("pending-*.npz"))
        found = ((number, self.load_pending(number)) for number in rounds)
        return [number for number, pending in found if pending is None or device in pending.devices]

    def forget(self, device: int) -> None:
        """Delete a device's patterns, and those that cannot be read."""
        for number in self.rounds_of(device):
            pending = self.load_pending(number)
            if pending is None or len(pending.devices) == 1:
                self._pending(number).unlink()
            else:
                self.save_pending(number, pending.among(pending.devices[pending.devices != device]))

    def _pending(self, round_number: int) -> Path:
        return self.folder / f"pending-{round_number}.npz"
