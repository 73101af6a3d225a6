"""The records of a node's own devices, as rounds ask for them. One that cannot be read takes no other with it."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import IntArray
from fedsplit.common.errors import StateError
from fedsplit.data import DeviceData, Records
from fedsplit.release.making import Chunk
from fedsplit.release.streams import record_order

log = logging.getLogger(__name__)
_NONE = np.zeros(0, dtype=np.int64)


class OwnRecords:
    """The records of some devices.

    Parameters
    ----------
    device_ids : int64 array (devices,), ascending
    data : callable
        Returns a device's records by its id; an exception makes that device sit out, no other.
    secret : callable
        Returns a device's 32-byte secret by its id.
    shape : tuple of int
        Of one record.
    """

    def __init__(
        self,
        device_ids: IntArray,
        data: Callable[[int], DeviceData],
        secret: Callable[[int], bytes],
        shape: tuple[int, ...],
    ) -> None:
        self.device_ids = device_ids
        self._data = data
        self._secret = secret
        self._shape = shape

    def sizes(self) -> IntArray:
        """Return how many training and test records each device has, ``(devices, 2)``."""
        return np.array([self._size(d) for d in self.device_ids.tolist()], dtype=np.int64).reshape(-1, 2)

    def of(self, device: int, *, test: bool) -> Records:
        """Return a device's training or test records; raises whatever the device's own code does."""
        if device not in self.device_ids:
            raise ValueError("device of another node")
        data = self._data(device)
        return data.test if test else data.train

    def select(self, schedule: IntArray, *, test: bool) -> tuple[Chunk, IntArray]:
        """Gather the scheduled records of all devices, each device's in ascending order of their index.

        Parameters
        ----------
        schedule : int64 array (devices, 4)
            As in :class:`fedsplit.wire.exchange.Download`.
        test : bool
            Whether the test records are meant.

        Returns
        -------
        tuple
            The records, and the devices that cannot take part.
        """
        parts: list[tuple[int, IntArray, Records]] = []
        failed: list[int] = []
        for device, pass_number, start, stop in schedule.tolist():
            try:
                records = self.of(device, test=test)
                index = self._scheduled(records, device, pass_number, slice(start, stop), test=test)
                parts.append((device, index, taken(records, index)))
            except Exception as error:  # a device's own code may raise anything
                log.warning("device %d sits out a round (%s)", device, why(error))
                failed.append(device)
        return self._join(parts), np.array(failed, dtype=np.int64)

    def _size(self, device: int) -> tuple[int, int]:
        try:
            data = self._data(device)
        except Exception as error:  # as in select
            log.warning("device %d cannot take part (%s)", device, why(error))
            return 0, 0
        return len(data.train), len(data.test)

    def _scheduled(self, records: Records, device: int, pass_number: int, rows: slice, *, test: bool) -> IntArray:
        if rows.stop > len(records):
            raise ValueError("schedule goes beyond the device's records")
        if test or rows.stop - rows.start == len(records):
            return np.arange(rows.start, rows.stop)
        return np.sort(record_order(self._secret(device), pass_number, len(records))[rows])

    def _join(self, parts: list[tuple[int, IntArray, Records]]) -> Chunk:
        return Chunk(
            devices=np.array([device for device, _, _ in parts], dtype=np.int64),
            records=np.array([len(index) for _, index, _ in parts], dtype=np.int64),
            index=np.concatenate([index for _, index, _ in parts] or [_NONE]),
            segments=same_width([segments_of(index, r) for _, index, r in parts]),
            x=np.concatenate([r.x for _, _, r in parts] or [np.zeros((0, *self._shape), np.float32)]),
            y=np.concatenate([r.y for _, _, r in parts] or [_NONE]),
        )


def why(error: Exception) -> str:
    """Return what may be said of an error: the text of others than ours could hold records."""
    return str(error) if isinstance(error, StateError) else type(error).__name__


def taken(records: Records, index: IntArray) -> Records:
    """Return the records at ascending places, without a copy if they are all."""
    whole = len(index) == len(records) and (not len(index) or index[-1] == len(records) - 1)
    return records if whole else records.take(index)


def segments_of(index: IntArray, records: Records) -> IntArray:
    """Return the segments of records; one that overlaps none is its own."""
    return index[:, None] if records.segments is None else records.segments


def same_width(segments: Sequence[IntArray]) -> IntArray:
    """Join segments; where devices have records of fewer one is named again, and counts once."""
    most = max((s.shape[1] for s in segments), default=1)
    wide = [np.concatenate([s, np.repeat(s[:, :1], most - s.shape[1], axis=1)], axis=1) for s in segments]
    return np.concatenate(wide or [np.zeros((0, 1), np.int64)])


def joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Put arrays behind one another, without a copy if there is one."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
