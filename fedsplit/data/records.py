"""Records of devices, and the check that every record passes before training sees it."""

import math
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import finite
from fedsplit.common.errors import DataError, FedsplitError
from fedsplit.model.tasks.base import Task

IndexArray = NDArray[np.int64]


@dataclass(frozen=True)
class Records:
    """Some records and their targets.

    Attributes
    ----------
    x : float32 array (records, *input_shape)
    y : array
        int64 ``(records,)`` for classification, binary (0 or 1) and novelty (which of the device's recordings a record
        is of, or ``outputs`` for something new in a test), float32 ``(records, outputs)`` for regression.
    segments : int64 array (records, segments of each) or None
        Numbers in 0..2^31-1 of the pieces that each record is made of, for windows that overlap: what leaves of a
        record has left of all its pieces. None: no record shares anything with another.
    """

    x: NDArray[np.float32]
    y: NDArray[Any]
    segments: IndexArray | None = None

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: NDArray[np.integer[Any]]) -> Self:
        """Return a copy of the records at ``index``, in its order."""
        return type(self)(self.x[index], self.y[index], None if self.segments is None else self.segments[index])

    @classmethod
    def empty(cls, like: "Records") -> Self:
        """Return no records, of the shapes and dtypes of ``like``."""
        return cls(np.empty((0, *like.x.shape[1:]), like.x.dtype), np.empty((0, *like.y.shape[1:]), like.y.dtype))


Raw = Records | tuple[Any, Any]
"""What a user may give for records: :class:`Records`, or a pair of arrays (x, y)."""


@dataclass(frozen=True, init=False)
class DeviceData:
    """All records of one device; nothing of it leaves the device as it is.

    Parameters
    ----------
    train, test : Records or pair of arrays (x, y)
        Left out, ``test`` is empty. A device that only tests gives ``train=(x[:0], y[:0])``.

    Raises
    ------
    TypeError
        If one of them is neither.

    Examples
    --------
    >>> len(DeviceData(train=(np.zeros((5, 3)), np.zeros(5, int))).test)
    0
    """

    train: Records
    test: Records

    def __init__(self, train: Raw, test: Raw | None = None) -> None:
        records = _as_records(train)
        # the class is frozen: this is how a dataclass's own __init__ sets its fields, too
        object.__setattr__(self, "train", records)
        object.__setattr__(self, "test", Records.empty(records) if test is None else _as_records(test))


@dataclass(frozen=True)
class Scaling:
    """How raw numbers become the records that a network learns from: ``(raw - subtract) / divide``, as float32.

    Attributes
    ----------
    subtract, divide : tuple of float
        One number, or one for each index of a record's first axis.
    low, high : float
        Raw numbers outside of these are in other units.
    """

    subtract: tuple[float, ...] = (0.0,)
    divide: tuple[float, ...] = (1.0,)
    low: float = -math.inf
    high: float = math.inf

    def apply(self, raw: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return records ``(records, ...)`` from raw numbers of the same shape."""
        return np.asarray((raw - self._wide(self.subtract, raw)) / self._wide(self.divide, raw), np.float32)

    def undo(self, records: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the raw numbers that :meth:`apply` takes to records, but for rounding."""
        x = records.astype(np.float64)
        return np.asarray(x * self._wide(self.divide, x) + self._wide(self.subtract, x))

    def looks_scaled(self, raw: NDArray[np.float64]) -> bool:
        """Whether numbers that should be raw use so little of their range that they may be records already."""
        return math.isfinite(self.high) and bool(0 < np.abs(raw).max(initial=0.0) <= self.high / max(2.0, *self.divide))

    @staticmethod
    def _wide(numbers: tuple[float, ...], like: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.reshape(np.array(numbers), (1, -1) + (1,) * (like.ndim - 2))


@dataclass(frozen=True)
class Pool:
    """A data set in one piece, to be dealt to devices.

    Attributes
    ----------
    x, y : arrays
        As in :class:`Records`.
    task : Task
    outputs : int
        Number of classes; 1 for binary; the targets' width for regression.
    owners : int array (records,) or None
        The device that each record comes from, if the data set has natural devices.
    people : tuple of int
        The person behind each natural device, if there are such: a person is tested as a whole, or results would not
        be those of people that training has never seen.
    held_out : bool array (records,) or None
        Records that are only ever tested when the partition is not natural; None: any may be.
    segments : int64 array or None
        As in :class:`Records`.
    scaling : Scaling
        How ``x`` was made.
    """

    x: NDArray[np.float32]
    y: NDArray[Any]
    task: Task
    outputs: int
    owners: IndexArray | None = None
    people: tuple[int, ...] = ()
    held_out: NDArray[np.bool_] | None = None
    segments: IndexArray | None = None
    scaling: Scaling = field(default_factory=Scaling)


def check_records(raw: Raw, *, task: Task, outputs: int, input_shape: tuple[int, ...] | None, where: str) -> Records:
    """Convert ``raw`` to the dtypes of :class:`Records` and refuse what training cannot use.

    Parameters
    ----------
    raw : Records or pair of arrays (x, y)
        Regression targets may be ``(records,)`` if there is one output.
    task : Task
    outputs : int
        Of the task.
    input_shape : tuple of int or None
        Shape of one record; None takes it from ``x``.
    where : str
        Begins the text of every error, for example ``device 3 (hospital-b.npz), train``.

    Raises
    ------
    DataError
        If x or y holds NaN, infinity or anything but numbers, if their shapes or lengths do not fit, or if targets
        are not the task's. The text never holds a record's values.
    """
    try:
        records = _as_records(raw)
    except (TypeError, ValueError):  # numpy's ValueError: rows of unequal length
        raise DataError(f"{where}: must be a pair of arrays (x, y)") from None
    x, y = records.x, records.y
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise DataError(f"{where}: x and y must have one row per record, got shapes {x.shape} and {y.shape}")
    if len(x) == 0 and input_shape is not None:
        x = x.reshape(0, *input_shape)  # no records, however written: np.array([]) has the shape (0,)
    shape = x.shape[1:] if input_shape is None else input_shape
    if x.ndim < 2 or math.prod(shape) == 0:
        raise DataError(f"{where}: x must have shape (records, ...) with no empty side, got {x.shape}")
    if x.shape[1:] != shape:
        raise DataError(f"{where}: records must have shape {shape}, got {x.shape[1:]}")
    targets = _targets(y, task, outputs, where)
    return Records(finite(x, "x", where), targets, _segments(records.segments, len(x), where))


def _as_records(raw: Raw) -> Records:
    if isinstance(raw, Records):
        return Records(np.asarray(raw.x), np.asarray(raw.y), raw.segments)
    if not isinstance(raw, tuple) or len(raw) != 2:
        raise TypeError(f"must be Records or a pair (x, y), got {type(raw).__name__}")
    return Records(np.asarray(raw[0]), np.asarray(raw[1]))


def _segments(raw: Any, count: int, where: str) -> IndexArray | None:
    if raw is None or not count:
        return None
    found = np.asarray(raw)
    if found.ndim != 2 or found.shape[0] != count or not found.shape[1] or found.dtype.kind not in "iu":
        raise DataError(f"{where}: segments must be integers of shape (records, pieces), got {found.shape}")
    if found.min() < 0 or found.max() >= 2**31:
        raise DataError(f"{where}: segments must be in 0..2^31-1")
    return found.astype(np.int64)


def _targets(y: NDArray[Any], task: Task, outputs: int, where: str) -> NDArray[Any]:
    try:
        return task.check_targets(y, outputs, where)
    except FedsplitError:
        raise
    except Exception as error:  # of a task's own code: its text could hold targets
        raise DataError(f"{where}: task {task.name!r} raised {type(error).__name__} at the targets") from None
