"""The exposure accountant: what has left a device of each record, over its whole life.

It is asked before a release and written to disk before the release leaves, so that a process killed between the two
has counted too much, never too little. A file that is missing, damaged or another owner's is refused and never begun
anew. (An older copy of the whole disk, put back, cannot be told from inside.)
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fedsplit.errors import StateError
from fedsplit.packing import IntArray
from fedsplit.state import replacing

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Cost:
    """What some releases tell of their records; every field an array ``(records,)``.

    Attributes
    ----------
    equations : int64
        Outputs sent, each an equation in the record's numbers.
    bits : int64
        An upper bound on the information: the pattern's bits and those of the values.
    gradient : float64
        Leverage of the record in a sum of first-layer gradients.
    precision : float64
        1 / (noise multiplier)^2 of Gaussian noise; infinite without noise, 0 if nothing of the outputs is sent.
    fisher : float64
        Diagonal Fisher information: squared norm of the rows sent over the noise's variance, per number of the record
        (Maeng et al. 2023, arXiv 2305.04146).
    leverage : float64
        Largest leverage of any of the record's numbers in all that has left of it, this included; NaN: not computed.
    """

    equations: IntArray
    bits: IntArray
    gradient: Float64
    precision: Float64
    fisher: Float64
    leverage: Float64

    @classmethod
    def of(cls, count: int, **known: NDArray[np.generic] | float) -> "Cost":
        """Return a cost of 0 for ``count`` records but for what is given."""
        columns: dict[str, Any] = {
            name: np.broadcast_to(np.asarray(known.get(name, 0), kind), (count,))
            for name, kind in _TABLE.items()
            if name != "releases"
        }
        return cls(**columns)


_TABLE: dict[str, type[np.generic]] = {
    "releases": np.int64,
    "equations": np.int64,
    "bits": np.int64,
    "gradient": np.float64,
    "precision": np.float64,
    "fisher": np.float64,
    "leverage": np.float64,
}


@dataclass(frozen=True)
class Spent:
    """What has left of a record, or the most of any: the fields of :class:`Cost` added up, and how many releases."""

    releases: int
    equations: int
    bits: int
    gradient: float
    precision: float
    fisher: float
    leverage: float


def epsilon(precision: float, delta: float) -> float:
    """Return the epsilon of Gaussian releases whose precisions add up to ``precision``.

    Releases of noise multipliers s_i compose exactly into one of 1/s^2 = sum 1/s_i^2; infinite if any had no noise.
    """
    if precision == 0 or math.isinf(precision):
        return precision
    from dp_accounting import GaussianDpEvent
    from dp_accounting.pld import PLDAccountant

    return float(PLDAccountant().compose(GaussianDpEvent(precision**-0.5)).get_epsilon(delta))


class ExposureAccountant:
    """Per-record ledgers in one file.

    A record is named by a number (device and index on the device). Where records overlap, they are counted by the
    segments that they are made of: a segment has left with every record that covers it.

    Parameters
    ----------
    path : Path
        Made by :meth:`create`.
    owner : bytes
        A fingerprint of whose records these are.

    Raises
    ------
    StateError
        If the file is missing, damaged or another owner's.
    """

    def __init__(self, path: Path, owner: bytes) -> None:
        self.path = path
        self._owner = owner
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
            self._names: IntArray = found["names"]
            self._table = {name: found[name] for name in _TABLE}
            self._releases: list[bytes] = [row.tobytes() for row in found["releases_sent"]]
            self._sent: IntArray = found["sent"]
            self._runs = {int(run): (int(last), int(refused)) for run, last, refused in found["runs"].tolist()}
            saved_owner = found["owner"].tobytes()
        except FileNotFoundError:
            raise StateError(f"exposure ledger {path} is missing: what has left cannot be known") from None
        except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, BadZipFile):
            raise StateError(f"exposure ledger {path} is damaged: what has left cannot be known") from None
        if saved_owner != owner:
            raise StateError(f"exposure ledger {path} belongs to other devices")

    @classmethod
    def create(cls, path: Path, owner: bytes) -> "ExposureAccountant":
        """Begin the ledger of records that have never left; refuses to replace one.

        Raises
        ------
        StateError
            If the file exists.
        """
        if path.exists():
            raise StateError(f"exposure ledger {path} exists already")
        new = object.__new__(cls)
        new.path, new._owner = path, owner
        new._names = np.zeros(0, dtype=np.int64)
        new._table = {name: np.zeros(0, dtype=kind) for name, kind in _TABLE.items()}
        new._releases, new._sent, new._runs = [], np.zeros((0, 2), dtype=np.int64), {}
        new.save()
        return new

    def is_new(self, records: IntArray, release: bytes) -> NDArray[np.bool_]:
        """Return which of the records have not left under this name: only these cost anything.

        ``release`` is a 32-byte digest of all that decides the bytes besides the record: weights, policy, masks.
        """
        if release not in self._releases:
            return np.ones(len(records), dtype=bool)
        sent = self._sent[self._sent[:, 1] == self._releases.index(release), 0]
        return ~np.isin(records, sent)

    def after(self, segments: IntArray, cost: Cost) -> Spent:
        """Return, as arrays ``(records,)``, what would have left of each record once these had, too.

        Parameters
        ----------
        segments : int64 array (records, segments of each)
            The names that the records are counted under; a record that overlaps none has one, its own.
        cost : Cost
            Of the records; they count as one new release each.
        """
        names, place = np.unique(segments, return_inverse=True)
        place = place.reshape(segments.shape)
        charged = self._charge(len(names), place, cost)
        known = np.searchsorted(self._names, names)
        old = (known < len(self._names)) & (np.append(self._names, -1)[known] == names)
        for name, column in charged.items():
            before = self._table[name][known[old]]
            column[old] = np.fmax(column[old], before) if name == "leverage" else column[old] + before
        return Spent(**{name: np.fmax.reduce(column[place], axis=1) for name, column in charged.items()})

    def step(self, records: IntArray, segments: IntArray, release: bytes, cost: Cost) -> None:
        """Count a release of records that :meth:`is_new` says have not left under this name."""
        if release not in self._releases:
            self._releases.append(release)
        number = self._releases.index(release)
        rows = np.stack([records, np.full(len(records), number)], axis=1)
        self._sent = np.concatenate([self._sent, rows.astype(np.int64)])
        self._add(segments, cost, count=True)

    def add_gradient(self, segments: IntArray, leverage: Float64) -> None:
        """Count a sum of gradients that records were part of with such leverages; it is no release of its own."""
        self._add(segments, Cost.of(len(segments), gradient=leverage, leverage=np.nan), count=False)

    def _add(self, segments: IntArray, cost: Cost, *, count: bool) -> None:
        names = np.union1d(self._names, segments)
        place = np.searchsorted(names, segments)
        charged = self._charge(len(names), place, cost)
        old = np.searchsorted(names, self._names)
        for name, column in charged.items():
            before = np.full(len(names), np.nan) if name == "leverage" else np.zeros(len(names), column.dtype)
            before[old] = self._table[name]
            if name == "leverage":
                charged[name] = np.fmax(before, column)
            elif name != "releases" or count:
                charged[name] = before + column
            else:
                charged[name] = before
        self._names, self._table = names, charged

    @staticmethod
    def _charge(size: int, place: IntArray, cost: Cost) -> dict[str, NDArray[np.generic]]:
        """Charge each record's cost in full to each of its segments."""
        charged = {name: np.zeros(size, dtype=kind) for name, kind in _TABLE.items()}
        charged["leverage"][:] = np.nan
        for column in place.T:
            np.add.at(charged["releases"], column, 1)
            for name in _TABLE.keys() - {"releases", "leverage"}:
                np.add.at(charged[name], column, getattr(cost, name))
            np.fmax.at(charged["leverage"], column, cost.leverage)
        return charged

    def last_round(self, run: int) -> int:
        """Return the latest round of a run in which records left; 0 if none did."""
        return self._runs.get(run, (0, 0))[0]

    def refused(self, run: int) -> int:
        """Return how many records have been refused in a run."""
        return self._runs.get(run, (0, 0))[1]

    def note(self, run: int, round_number: int, refused: int) -> None:
        """Remember a run's latest round and add to its refusals."""
        last, before = self._runs.get(run, (0, 0))
        self._runs[run] = (max(last, round_number), before + refused)

    def rows(self) -> Iterator[tuple[int, Spent]]:
        """Yield all ledgers, by the records' or segments' numbers."""
        for i, name in enumerate(self._names.tolist()):
            yield name, Spent(**{column: values[i].item() for column, values in self._table.items()})

    def most(self) -> Spent:
        """Return the most that has left of any record or segment, ledger by ledger; leverage NaN if not computed."""
        none = dict.fromkeys(_TABLE, 0) | {"leverage": np.nan}
        return Spent(**{name: np.fmax.reduce(np.append(v, none[name])).item() for name, v in self._table.items()})

    def exposures(self) -> int:
        """Return the largest number of releases of any record; a segment may have left more often."""
        return int(np.unique(self._sent[:, 0], return_counts=True)[1].max(initial=0))

    def save(self) -> None:
        """Write the file in one step, and wait until the disk has it."""
        runs = np.array([(run, *noted) for run, noted in self._runs.items()], dtype=np.int64).reshape(-1, 3)
        names = np.frombuffer(b"".join(self._releases), dtype=np.uint8).reshape(-1, 32)
        with replacing(self.path) as new, new.open("wb") as file:
            np.savez(
                file,
                owner=np.frombuffer(self._owner, dtype=np.uint8),
                names=self._names,
                releases_sent=names,
                sent=self._sent,
                runs=runs,
                **self._table,
            )
            file.flush()
            os.fsync(file.fileno())


def gaussian_precision(noise: float) -> float:
    """Return the precision of one release with noise of ``noise * clip``: replacing a record moves it by 2 clip."""
    return 4 / noise**2 if noise else math.inf
