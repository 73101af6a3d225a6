"""What the targets of records are, where they are read in and where they arrive over the wire."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import finite
from fedsplit.common.errors import DataError, WireError


class Targets(ABC):
    """What the targets of records are.

    Attributes
    ----------
    classes : int
        How many a record can be of; 0 if targets are no classes.
    columns : int or None
        Of a record's target; None: it is one integer.
    """

    classes: int = 0
    columns: int | None = None

    @abstractmethod
    def read(self, y: NDArray[Any], where: str, said: str) -> NDArray[Any]:
        """Convert a user's targets to those of :class:`fedsplit.data.records.Records`.

        Parameters
        ----------
        y : array (records, ...)
        where, said : str
            Begin and end the text of an error: whose targets they are, and for what they must be right.

        Raises
        ------
        DataError
            If they are others. The text never holds a record's values.
        """

    @abstractmethod
    def check(self, targets: NDArray[Any]) -> None:
        """Refuse targets ``(records, ...)``, at least one, that a device must not send; raises WireError."""


@dataclass(frozen=True)
class Classes(Targets):
    """Integers 0..classes-1, int64 ``(records,)``."""

    classes: int

    def read(self, y: NDArray[Any], where: str, said: str) -> NDArray[np.int64]:
        """Convert labels ``(records,)`` of integers or bools.

        Parameters
        ----------
        y, where, said : array (records,), str, str
            As in :meth:`Targets.read`.
        """
        if len(y) == 0:  # np.array([]) is float64: there is no label that could be wrong
            return np.empty(0, np.int64)
        if y.ndim != 1:
            raise DataError(f"{where}: y must have shape (records,), got {y.shape}")
        if y.dtype.kind not in "biu":
            finite(y, "y", where)  # NaN is the better reason
            raise DataError(f"{where}: labels must be integers, got dtype {y.dtype.name}")
        if y.min() < 0 or y.max() >= self.classes:
            raise DataError(f"{where}: labels must be in 0..{self.classes - 1} for {said}")
        return y.astype(np.int64)

    def check(self, targets: NDArray[Any]) -> None:
        """Refuse what are not classes."""
        if targets.dtype.kind != "i" or targets.ndim != 1 or targets.min() < 0 or targets.max() >= self.classes:
            raise WireError(f"targets must be classes in 0..{self.classes - 1}")


@dataclass(frozen=True)
class Columns(Targets):
    """Numbers ``low..high``, float32 ``(records, columns)``; one column may be read from ``(records,)``."""

    columns: int
    low: float = -inf
    high: float = inf

    def read(self, y: NDArray[Any], where: str, said: str) -> NDArray[np.float32]:
        """Convert numbers to float32 ``(records, columns)``.

        Parameters
        ----------
        y, where, said : array (records, columns), str, str
            As in :meth:`Targets.read`. A vector ``(records,)`` is one column.
        """
        if len(y) == 0:
            return np.empty((0, self.columns), np.float32)
        rows = y.reshape(-1, 1) if y.ndim == 1 else y
        if rows.shape != (len(y), self.columns):
            raise DataError(f"{where}: y must have shape (records, {self.columns}), got {y.shape}")
        found = finite(rows, "y", where)
        if self._outside(found):
            raise DataError(f"{where}: targets must be in {self.low:g}..{self.high:g} for {said}")
        return found

    def check(self, targets: NDArray[Any]) -> None:
        """Refuse other columns, and numbers out of range."""
        if targets.dtype.kind != "f" or targets.shape[1:] != (self.columns,):
            raise WireError(f"targets must be float32 with {self.columns} columns")
        if self._outside(targets):
            raise WireError(f"targets must be in {self.low:g}..{self.high:g}")

    def _outside(self, found: NDArray[np.float32]) -> bool:
        return bool(found.min() < self.low or found.max() > self.high)


class Withheld(Targets):
    """Targets that stay where they are: in their place float32 ``(records, 0)``."""

    columns = 0

    def read(self, y: NDArray[Any], where: str, said: str) -> NDArray[np.float32]:
        """Return an empty float32 array ``(records, 0)`` in the place of any targets.

        Parameters
        ----------
        y, where, said : array (records, ...), str, str
            As in :meth:`Targets.read`; only the number of records counts.
        """
        return np.zeros((len(y), 0), dtype=np.float32)

    def check(self, targets: NDArray[Any]) -> None:
        """Refuse any."""
        if targets.shape[1:] != (0,):
            raise WireError("targets must not be there: labels stay at home")
