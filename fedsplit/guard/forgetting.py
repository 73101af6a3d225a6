"""What a ledger, and the history beside it, hold of one device, and how it goes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.guard.history import history_folder
from fedsplit.guard.sealed import load_sealed, save_sealed

_BY_RECORD = {  # arrays with a row for each record or segment, and where its number stands
    "names": ("names", "releases", "equations", "bits", "gradient", "precision", "fisher", "leverage"),
    "sent": ("sent",),
    "refusals": ("refusals",),
    "records": ("records", "bitmap", "segments", "delta"),
}


def holding(ledger: Path, device: int) -> list[Path]:
    """Return which of a ledger's files have a row of a device's records.

    Raises
    ------
    OSError, ValueError
        If one cannot be read, or is damaged.
    """
    return [path for path in _files(ledger) if any(mine.any() for _, mine in _rows(load_sealed(path)[0], device))]


def forget_device(path: Path, device: int) -> None:
    """Write one of a ledger's files anew, without the rows of a device's records."""
    found, _ = load_sealed(path)
    for names, mine in _rows(found, device):
        found |= {name: found[name][~mine] for name in names if name in found}
    save_sealed(path, durable=False, **found)


def _files(ledger: Path) -> list[Path]:
    return [ledger, *sorted(history_folder(ledger).glob("*.npz"))]


def _rows(found: dict[str, NDArray[Any]], device: int) -> Iterator[tuple[tuple[str, ...], NDArray[np.bool_]]]:
    """Yield arrays whose rows are of records, and which rows are the device's: a number is device and index."""
    for key, names in _BY_RECORD.items():
        if key in found:
            numbers = {"sent": lambda a: a[:, 0], "refusals": lambda a: a["record"]}.get(key, lambda a: a)(found[key])
            yield names, np.asarray(numbers >> 32 == device)
