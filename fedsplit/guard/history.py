"""What has left, kept beside the exposure ledger where later releases must be judged together with it."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray, IntArray, unpack_bitmap
from fedsplit.common.errors import StateError
from fedsplit.guard.accountant import ExposureAccountant
from fedsplit.guard.criterion import LayerMap
from fedsplit.guard.sealed import load_sealed, save_sealed
from fedsplit.model.layer import FirstLayer

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Sum:
    """A sum of gradients: the records, their segments, and the gradients at their pre-activations."""

    records: IntArray
    segments: IntArray
    delta: FloatArray


def history_folder(ledger: Path) -> Path:
    """Return the folder of what is kept beside a ledger."""
    return ledger.with_suffix(".history")


class History:
    """Patterns of releases and sums of gradients, one file for each name in the ledger.

    They are written before the ledger is: a process killed between the two has kept too much, never too little.

    Parameters
    ----------
    accountant : ExposureAccountant
    layer : FirstLayer
    """

    def __init__(self, accountant: ExposureAccountant, layer: FirstLayer) -> None:
        self.accountant = accountant
        self.layer = layer
        self._folder = history_folder(accountant.path)
        self._layer = np.frombuffer(sha256(layer.description.encode()).digest(), dtype=np.uint8)

    def keep_release(self, name: bytes, weights: FloatArray, records: IntArray, bitmap: NDArray[np.uint8]) -> None:
        """Keep which outputs of some records leave, beside those that left under this name before."""
        if (old := self._load(name)) is not None:
            records, bitmap = np.concatenate([old["records"], records]), np.concatenate([old["bitmap"], bitmap])
        records, first = np.unique(records, return_index=True)
        self._save(name, weights=weights, records=records, bitmap=bitmap[first])

    def releases(self, records: IntArray) -> tuple[list[tuple[LayerMap, Mask]], IntArray, Mask]:
        """Return what has left of some records.

        Returns
        -------
        list of (LayerMap, bool array (records, width))
            For each release: the outputs that left.
        int64 array (records,)
            How many releases there were of each record.
        bool array (records,)
            Whether the list has them all.
        """
        found: list[tuple[LayerMap, Mask]] = []
        count, complete = np.zeros(len(records), dtype=np.int64), np.ones(len(records), dtype=bool)
        for name, left in self.accountant.earlier(records):
            count += left
            if (file := self._load(name)) is None or not np.array_equal(file["layer"], self._layer):
                complete &= ~left  # not kept, or of another layer, with which it cannot be judged together
                continue
            held = np.isin(records, file["records"])
            complete &= held | ~left
            pattern = np.zeros((len(records), self.layer.width), dtype=bool)
            rows = np.searchsorted(file["records"], records[held])
            pattern[held] = unpack_bitmap(file["bitmap"][rows], self.layer.width)
            found.append((LayerMap(self.layer, self.layer.unflatten(file["weights"])), pattern))
        return found, count, complete

    def keep_sum(self, name: bytes, records: IntArray, segments: IntArray, delta: FloatArray) -> None:
        """Keep a sum of gradients that leaves."""
        self._save(name, records=records, segments=segments, delta=delta)

    def related_sums(self, records: IntArray) -> list["Sum"]:
        """Return the sums that have left and share records with these, or with one another."""
        known, rest = records, list(self.accountant.sums)
        found: list[Sum] = []
        grown = True
        while grown:
            grown = False
            for name in list(rest):
                if (file := self._load(name)) is None:
                    raise StateError(f"exposure history {self._path(name)} is missing: what has left cannot be known")
                if np.isin(file["records"], known).any():
                    if not np.array_equal(file["layer"], self._layer):
                        raise StateError(f"exposure history {self._path(name)} is of another first layer")
                    rest.remove(name)
                    known, grown = np.union1d(known, file["records"]), True
                    found.append(Sum(file["records"], file["segments"], file["delta"]))
        return found

    def _path(self, name: bytes) -> Path:
        return self._folder / f"{name.hex()}.npz"

    def _save(self, name: bytes, **arrays: NDArray[Any]) -> None:
        self._folder.mkdir(exist_ok=True, mode=0o700)
        save_sealed(self._path(name), durable=True, layer=self._layer, **arrays)

    def _load(self, name: bytes) -> dict[str, NDArray[Any]] | None:
        try:
            return load_sealed(self._path(name))[0]
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            raise StateError(f"exposure history {self._path(name)} is damaged: what has left cannot be known") from None
