"""What devices were seen to do over time, from a CSV file."""

import csv
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import IntArray
from fedsplit.common.errors import ConfigError, DataError
from fedsplit.wire.container import MAX_DEVICES

SECOND = 1_000_000  # microseconds
NEVER = 2**62  # microseconds: longer than any run
QUANTITIES = ("compute", "uplink", "downlink", "latency")
_AVAILABLE = "available"


@dataclass(frozen=True)
class Trace:
    """A value of each quantity for each device, from a time on until the device's next row.

    Attributes
    ----------
    devices, seconds : int64 arrays (rows,)
        In ascending order; every device has a row at 0. ``seconds`` are in microseconds.
    columns : dict
        float64 arrays (rows,) by name: some of :data:`QUANTITIES` and ``available`` (0 or 1).
    period : int or None
        Microseconds after which it begins again; None: the last rows hold for ever.
    """

    devices: IntArray
    seconds: IntArray
    columns: dict[str, NDArray[np.float64]]
    period: int | None

    @classmethod
    def read(cls, path: Path | str, count: int, period: float | None) -> "Trace":
        """Read a file with the columns ``device``, ``seconds`` and at least one of what there can be.

        Parameters
        ----------
        path : Path or str
        count : int
            Number of devices: each must have a row at 0 seconds.
        period : float or None
            In seconds.

        Raises
        ------
        ConfigError
            If the file cannot be read.
        DataError
            In one line: the file, the line and what is wrong.
        """
        try:
            with Path(path).open(encoding="utf-8-sig", newline="") as file:  # spreadsheets begin with a mark
                rows = list(csv.reader(file))
        except OSError as error:
            raise ConfigError(f"devices.profile.trace {path}: {error.strerror}") from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"trace {path} is not a CSV file: {error}") from None
        names = [name.strip() for name in rows[0]] if rows else []
        _check_names(path, names)
        numbered = [(number, row) for number, row in enumerate(rows[1:], start=2) if row]
        table = np.array(
            [[_number(path, number, *cell) for cell in _cells(path, number, names, row)] for number, row in numbered]
        ).reshape(-1, len(names))
        lines = np.array([number for number, _ in numbered], dtype=np.int64)
        device, seconds = table[:, names.index("device")], table[:, names.index("seconds")]
        micro = np.rint(seconds * SECOND).astype(np.int64)
        order = np.lexsort([micro, device])
        columns = {n: table[order, i] for i, n in enumerate(names) if n not in ("device", "seconds")}
        most = None if period is None else round(period * SECOND)
        trace = cls(device[order].astype(np.int64), micro[order], columns, most)
        trace._check(path, lines[order], count)
        return trace

    def _check(self, path: Path | str, lines: IntArray, count: int) -> None:
        def refuse(rows: NDArray[np.bool_], what: str) -> None:
            if rows.any():
                row = int(rows.argmax())
                values = {name: column[row] for name, column in self.columns.items()}
                values |= {"device": int(self.devices[row]), "seconds": self.seconds[row] / SECOND}
                raise DataError(f"trace {path}, line {lines[row]}: {what.format(**values)}")

        first = np.diff(self.devices, prepend=-1) != 0
        refuse(self.devices >= count, f"device {{device}} does not exist: ids are 0..{count - 1}")
        refuse(~first & (np.diff(self.seconds, prepend=-1) == 0), "device {device} has two rows at {seconds:g} seconds")
        refuse(
            first & (self.seconds > 0),
            "device {device} begins at {seconds:g} seconds: nothing says what holds from 0 on",
        )
        if self.period is not None:
            refuse(self.seconds >= self.period, f"seconds must be below trace-period {self.period / SECOND:g}")
        if missing := sorted(set(range(count)) - set(self.devices.tolist())):
            raise DataError(
                f"trace {path}: device {missing[0]} has no row; it must have one for each of 0..{count - 1}"
            )

    def at(self, now: int) -> dict[str, NDArray[np.float64]]:
        """Return every column's values by device, at a time in microseconds."""
        rows = self._rows(now)
        return {name: column[rows] for name, column in self.columns.items()}

    def next_change(self, now: int) -> int:
        """Return when any device's next row begins, after a time; :data:`NEVER` if none does."""
        begun, within = self._since(now)
        following = int(np.searchsorted(self._times, within, side="right"))
        if following < len(self._times):
            return begun + int(self._times[following])
        return NEVER if self.period is None else begun + self.period

    def gone_at(self, now: int) -> IntArray:
        """Return when each device is away next, at or after a time; :data:`NEVER` where it never is again."""
        begun, within = self._since(now)
        off = self.columns[_AVAILABLE] == 0
        later = np.full(self._count, NEVER, dtype=np.int64)
        future = off & (self.seconds > within)
        np.minimum.at(later, self.devices[future], begun + self.seconds[future])
        if self.period is not None:  # the next time round
            np.minimum.at(later, self.devices[off], begun + self.period + self.seconds[off])
        later[off[self._rows(now)].nonzero()] = now
        return later

    def most_at_once(self, devices: IntArray) -> int:
        """Return the largest number of some devices that are there at the same time, ever."""
        if _AVAILABLE not in self.columns:
            return len(devices)
        those = np.isin(self.devices, devices)
        # a row changes the number by its difference from the device's row before; each device's first counts itself
        change = np.diff(self.columns[_AVAILABLE], prepend=0.0)
        change[self._starts[:-1]] = self.columns[_AVAILABLE][self._starts[:-1]]
        places = np.searchsorted(self._times, self.seconds[those])
        return int(np.bincount(places, weights=change[those]).cumsum().max(initial=0))

    @property
    def says_who_is_there(self) -> bool:
        """Whether there is a column ``available``."""
        return _AVAILABLE in self.columns

    @cached_property
    def _count(self) -> int:
        return int(self.devices[-1]) + 1

    @cached_property
    def _times(self) -> IntArray:
        return np.unique(self.seconds)

    @cached_property
    def _starts(self) -> IntArray:
        return np.searchsorted(self.devices, np.arange(self._count + 1))

    def _since(self, now: int) -> tuple[int, int]:
        """Return when the trace began last, and the time since then."""
        return (0, now) if self.period is None else (now - now % self.period, now % self.period)

    def _rows(self, now: int) -> IntArray:
        """Return each device's row that holds at a time."""
        begun = np.concatenate([[0], np.cumsum(self.seconds <= self._since(now)[1])])
        return self._starts[:-1] + np.diff(begun[self._starts]) - 1


def _check_names(path: Path | str, names: list[str]) -> None:
    allowed = ("device", "seconds", *QUANTITIES, _AVAILABLE)
    if wrong := [name for name in names if name not in allowed]:
        raise DataError(f"trace {path}, line 1: unknown column {wrong[0]!r}; allowed: {', '.join(allowed)}")
    if missing := [name for name in allowed[:2] if name not in names]:
        raise DataError(f"trace {path}, line 1: column {missing[0]!r} is missing")
    if len(set(names)) < len(names) or len(names) == 2:
        raise DataError(
            f"trace {path}, line 1: needs each of device, seconds and some of {', '.join(allowed[2:])} once"
        )


def _cells(path: Path | str, line: int, names: list[str], row: list[str]) -> list[tuple[str, str]]:
    if len(row) != len(names):
        raise DataError(f"trace {path}, line {line}: has {len(row)} columns, line 1 has {len(names)}")
    return list(zip(names, row, strict=True))


def _number(path: Path | str, line: int, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    rule, holds = {
        "device": ("a device's id", 0 <= value < MAX_DEVICES and value == value // 1),
        "seconds": ("at least 0", 0 <= value < NEVER / SECOND),
        _AVAILABLE: ("0 or 1", value in (0, 1)),
        "latency": ("at least 0", 0 <= value < math.inf),
    }.get(name, ("above 0", 0 < value < math.inf))
    if not holds:
        raise DataError(f"trace {path}, line {line}: {name} must be {rule}, got {text.strip()!r}")
    return value
