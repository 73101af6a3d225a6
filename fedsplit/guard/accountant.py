"""The exposure accountant: what has left a device of each record, over its whole life.

It is asked before a release and written to disk before the release leaves, so that a process killed between the two
has counted too much, never too little. A file that is missing, damaged or another owner's is refused and never begun
anew; so is one that another process has written to in the meantime. (An older copy of the whole disk, put back, cannot
be told from inside.)
"""

import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import IntArray
from fedsplit.common.errors import StateError
from fedsplit.guard.sealed import load_sealed, save_sealed

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
        Leverage of the record in a sum of first-layer gradients; at most 1, which it counts as where not computed.
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
        """Return the costs of ``count`` records: 0, except for what is given."""
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


_REFUSAL = np.dtype([("record", np.int64), ("release", np.uint8, 32)])
_NONE: dict[str, float] = dict.fromkeys(_TABLE, 0) | {"leverage": np.nan}


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
    durable : bool
        Whether :meth:`save` waits until the disk has it; a simulation need not survive a power cut.

    Attributes
    ----------
    refused : int
        Records that were refused because of what they hold.

    Raises
    ------
    StateError
        If the file is missing, damaged or another owner's.
    """

    def __init__(self, path: Path, owner: bytes, *, durable: bool = True) -> None:
        self.path = path
        self._owner = owner
        self._durable = durable
        try:
            found, self._saved = load_sealed(path)
            self._names: IntArray = found["names"]
            self._table = {name: found[name] for name in _TABLE}
            self._releases, self._sums = _split(found["releases_sent"]), _split(found["sums_sent"])
            self._sent: IntArray = found["sent"]
            self._last_rounds: dict[int, int] = dict(found["rounds"].tolist())
            self.refused, self._refusals = int(found["refused"]), found["refusals"]
            saved_owner = found["owner"].tobytes()
        except FileNotFoundError:
            raise StateError(f"exposure ledger {path} is missing: what has left cannot be known") from None
        except Exception:  # not a file, cut off, or with anything else in it
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
        new.path, new._owner, new._durable = path, owner, True
        new._names = np.zeros(0, dtype=np.int64)
        new._table = {name: np.zeros(0, dtype=kind) for name, kind in _TABLE.items()}
        new._releases, new._sent, new._sums = [], np.zeros((0, 2), dtype=np.int64), []
        new._last_rounds, new.refused, new._saved = {}, 0, b""
        new._refusals = np.zeros(0, dtype=_REFUSAL)
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

    def earlier(self, records: IntArray) -> Iterator[tuple[bytes, NDArray[np.bool_]]]:
        """Yield the names under which any of the records have left, and which of them."""
        for number in np.unique(self._sent[np.isin(self._sent[:, 0], records), 1]).tolist():
            yield self._releases[number], ~self.is_new(records, self._releases[number])

    def spent(self, segments: IntArray) -> Spent:
        """Return, as arrays ``(records,)``, the most that has left of any segment of each record."""
        return Spent(**{name: np.fmax.reduce(column, axis=1) for name, column in self._ledgers(segments).items()})

    def after(self, segments: IntArray, cost: Cost) -> Spent:
        """Return, as arrays ``(records,)``, what would have left of each record once all of these had, too.

        Parameters
        ----------
        segments : int64 array (records, segments of each)
            The names that the records are counted under; a record that overlaps none has one, its own.
        cost : Cost
            Of the records; they count as one new release each.
        """
        names = np.unique(segments)
        place, table = np.searchsorted(names, segments), self._charged(names, segments, cost)
        return Spent(**{name: np.fmax.reduce(column[place], axis=1) for name, column in table.items()})

    def step(self, records: IntArray, segments: IntArray, release: bytes, cost: Cost) -> None:
        """Count a release of records that :meth:`is_new` says have not left under this name.

        Parameters
        ----------
        records : int64 array (records,)
        segments : int64 array (records, pieces)
            The names that the records are counted under.
        release : bytes
            The release's name.
        cost : Cost
            What the release tells of each record.
        """
        if not len(records):
            return
        if release not in self._releases:
            self._releases.append(release)
        number = self._releases.index(release)
        rows = np.stack([records, np.full(len(records), number)], axis=1)
        self._sent = np.concatenate([self._sent, rows.astype(np.int64)])
        self._add(segments, cost, releases=1)

    @property
    def sums(self) -> tuple[bytes, ...]:
        """The names of the sums of gradients that have left."""
        return tuple(self._sums)

    def add_gradient(self, name: bytes, segments: IntArray, leverage: Float64) -> None:
        """Count a sum of gradients; it is no release of its own.

        It has no noise, whatever the activations had.

        Parameters
        ----------
        name : bytes
            A 32-byte digest of all that decides the sum.
        segments : int64 array (records, pieces)
            The segments of the records that were part of it.
        leverage : float64 array (records,)
            The records' leverages in the sum.
        """
        self._sums.append(name)
        bare = Cost.of(len(segments), gradient=leverage, precision=np.inf, fisher=np.inf, leverage=np.nan)
        self._add(segments, bare, releases=0)

    def _add(self, segments: IntArray, cost: Cost, *, releases: int) -> None:
        names = np.union1d(self._names, segments)
        self._names, self._table = names, self._charged(names, segments, cost, releases=releases)

    def _ledgers(self, names: IntArray) -> dict[str, NDArray[Any]]:
        """Return the ledgers of segments, as arrays of the shape of ``names``."""
        place = np.searchsorted(self._names, names)
        known = np.append(self._names, -1)[place] == names  # no number is negative
        found = {}
        for name, column in self._table.items():
            none = column.dtype.type(_NONE[name])
            found[name] = np.where(known, np.append(column, none)[place], none)
        return found

    def _charged(
        self, names: IntArray, segments: IntArray, cost: Cost, *, releases: int = 1
    ) -> dict[str, NDArray[Any]]:
        """Return the ledgers of ``names``, ascending, after charging each record in full to each of its segments."""
        table, place = self._ledgers(names), np.searchsorted(names, segments)
        for i, column in enumerate(place.T):
            rows = ~(place[:, :i] == column[:, None]).any(axis=1)  # a segment that a record lists twice counts once
            np.add.at(table["releases"], column[rows], releases)
            for name in _TABLE.keys() - {"releases", "leverage"}:
                np.add.at(table[name], column[rows], getattr(cost, name)[rows])
            np.fmax.at(table["leverage"], column[rows], cost.leverage[rows])
        return table

    def refuse(self, records: IntArray, release: bytes) -> None:
        """Count records that are refused because of what they hold."""
        new = np.empty(len(records), dtype=_REFUSAL)
        new["record"], new["release"] = records, np.frombuffer(release, np.uint8)
        self._refusals = np.concatenate([self._refusals, new])
        self.refused += len(records)

    def was_refused(self, records: IntArray, release: bytes) -> NDArray[np.bool_]:
        """Return which of the records have been refused under this name: to say so again tells nothing new."""
        same = (self._refusals["release"] == np.frombuffer(release, np.uint8)).all(axis=1)
        return np.isin(records, self._refusals["record"][same])

    def last_round(self, run: int) -> int:
        """Return the latest round of a run in which records left; 0 if none did."""
        return self._last_rounds.get(run, 0)

    def note(self, run: int, round_number: int) -> None:
        """Remember that records left in a round of a run."""
        self._last_rounds[run] = max(self.last_round(run), round_number)

    def rows(self) -> Iterator[tuple[int, Spent]]:
        """Yield all ledgers, by the records' or segments' numbers."""
        for i, name in enumerate(self._names.tolist()):
            yield name, Spent(**{column: values[i].item() for column, values in self._table.items()})

    def most(self) -> Spent:
        """Return the most that has left of any record or segment, ledger by ledger; leverage NaN if not computed."""
        return Spent(**{name: np.fmax.reduce(np.append(v, _NONE[name])).item() for name, v in self._table.items()})

    def exposures(self) -> int:
        """Return the largest number of releases of any record; a segment may have left more often."""
        return int(np.unique(self._sent[:, 0], return_counts=True)[1].max(initial=0))

    def save(self) -> None:
        """Write the file in one step, and wait until the disk has it.

        Raises
        ------
        StateError
            If the file has been written to or taken away since it was opened.
        """
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # until it is closed
            if (self.path.read_bytes()[-32:] if self.path.exists() else b"") != self._saved:
                raise StateError(f"exposure ledger {self.path} was changed by another process")
            self._saved = save_sealed(
                self.path,
                durable=self._durable,
                owner=np.frombuffer(self._owner, dtype=np.uint8),
                names=self._names,
                releases_sent=_join(self._releases),
                sent=self._sent,
                sums_sent=_join(self._sums),
                rounds=np.array(list(self._last_rounds.items()), dtype=np.int64).reshape(-1, 2),
                refused=np.int64(self.refused),
                refusals=self._refusals,
                **self._table,
            )
            if self._durable:
                os.fsync(folder)  # its entry for the file
        finally:
            os.close(folder)


def _join(names: list[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(names), dtype=np.uint8).reshape(-1, 32)


def _split(names: NDArray[np.uint8]) -> list[bytes]:
    return [name.tobytes() for name in names]
