"""What the server saw of some records: recorded in simulation, read back by the audit.

The folder ``audit`` of a run holds every exchange as it went over the wire, and apart from them the originals of the
records that are attacked, for scoring alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray, IntArray
from fedsplit.common.errors import DataError
from fedsplit.common.files import replacing
from fedsplit.common.seeds import seed_of
from fedsplit.data import Records, Source
from fedsplit.wire.exchange import Download, Upload

MOST_CANDIDATES = 5000
_EXCHANGES, _SUBJECTS = "exchanges", "subjects.npz"


def record_exchange(folder: Path, node: int, download: Download, upload: Upload, index: IntArray) -> None:
    """Write one exchange of a simulated node; ``index`` are the released records' indices on their devices."""
    folder = folder / _EXCHANGES
    folder.mkdir(parents=True, exist_ok=True)
    half = "release" if len(download.schedule) else f"gradient-{_asked(download):08x}"
    with replacing(folder / f"{download.round_number:06d}-{half}-{node:06d}.npz") as path, path.open("wb") as file:
        sent, got = (np.frombuffer(m.to_bytes(), dtype=np.uint8) for m in (upload, download))
        np.savez_compressed(file, download=got, upload=sent, index=index, node=node, devices=_devices(download, upload))


def _asked(download: Download) -> int:
    """Return a number of the gradients that are asked for: a node may be asked for several sums in a round."""
    asked = 0
    for block in download.pending:
        asked = crc32(f"{block.round_number} {block.devices.tolist()}".encode() + block.codes.tobytes(), asked)
    return asked


def _devices(download: Download, upload: Upload) -> IntArray:
    """Return the devices that an exchange is about."""
    asked = [download.schedule[:, 0], *(block.devices for block in download.pending)]
    return np.unique(np.concatenate([*asked, upload.release.devices, upload.failed, upload.refused[:, 0]]))


def may_hold(folder: Path, device: int) -> bool:
    """Whether recordings have anything of a device; a file that does not say whose it is may have."""
    return any(_may_hold(path, device) for path in folder.rglob("*") if path.is_file())


def _may_hold(path: Path, device: int) -> bool:
    try:
        with np.load(path, allow_pickle=False) as file:
            return device in file["devices"]
    except Exception:  # see Subjects.load; earlier versions did not say
        return True


def tested(source: Source) -> Records:
    """Return the records of test devices, which stand in for public ones."""
    tests = [source.device(d).test for d in source.test_devices]
    return Records(np.concatenate([r.x for r in tests]), np.concatenate([r.y for r in tests]))


@dataclass(frozen=True)
class Subjects:
    """The records that are attacked, and what the attacker knows beforehand.

    Attributes
    ----------
    x, y : arrays
        The targets' originals ``(targets, *input_shape)`` and labels.
    device, index : int64 arrays (targets,)
        Where they come from.
    candidates : float32 array (candidates, *input_shape)
        Private records among which a reconstruction is looked up.
    place : int64 array (targets,)
        Each target's place among the candidates.
    public : Records
        Disjoint from the candidates.
    stand_in : bool
        Whether the public records are really those of test devices, for want of others.
    devices : int64 array (devices,)
        Whose records any of the arrays has, as far as they are a device's.
    """

    x: FloatArray
    y: NDArray[Any]
    device: IntArray
    index: IntArray
    candidates: FloatArray
    place: IntArray
    public: Records
    stand_in: bool
    devices: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @classmethod
    def choose(
        cls, source: Source, public: Records | None, donors: tuple[int, ...], targets: int, seed: int
    ) -> "Subjects":
        """Draw targets from all private training records.

        Raises
        ------
        DataError
            If there are fewer, or no public records and no test records in their stead.
        """
        private = [d for d in range(source.count) if d not in donors and len(source.device(d).train)]
        parts = [source.device(d).train for d in private]
        owner = np.concatenate([np.full(len(r), d) for d, r in zip(private, parts, strict=True)])
        index = np.concatenate([np.arange(len(r)) for r in parts])
        x, y = np.concatenate([r.x for r in parts]), np.concatenate([r.y for r in parts])
        if len(x) < targets:
            raise DataError(f"audit.targets must be at most {len(x)} (the private records), got {targets}")
        order = np.random.default_rng(seed_of(seed, "audit targets")).permutation(len(x))
        chosen, candidates = order[:targets], order[: max(targets, MOST_CANDIDATES)]
        known, place = tested(source) if public is None else public, np.arange(targets)
        if public is not None:  # targets' labels are those of their own devices
            known = replace(public, y=source.task.from_trunk(public.y, source.outputs))
        whose = np.union1d(owner[candidates], source.test_devices if public is None else donors).astype(np.int64)
        at = (owner[chosen], index[chosen])
        return cls(x[chosen], y[chosen], *at, x[candidates], place, known, public is None, whose)

    @staticmethod
    def are_in(folder: Path) -> bool:
        """Whether a run has chosen them already."""
        return (folder / _SUBJECTS).exists()

    def save(self, folder: Path) -> None:
        """Write ``subjects.npz``."""
        folder.mkdir(parents=True, exist_ok=True)
        fields = {k: v for k, v in vars(self).items() if k != "public"}
        with replacing(folder / _SUBJECTS) as path, path.open("wb") as file:
            np.savez_compressed(file, public_x=self.public.x, public_y=self.public.y, **fields)

    @classmethod
    def load(cls, folder: Path) -> "Subjects":
        """Read ``subjects.npz``.

        Raises
        ------
        DataError
            If it is missing or damaged.
        """
        path = folder / _SUBJECTS
        try:
            with np.load(path, allow_pickle=False) as file:
                fields = {name: file[name] for name in file.files}
            public = Records(fields.pop("public_x"), fields.pop("public_y"))
            return cls(**{**fields, "public": public, "stand_in": bool(fields["stand_in"])})
        except FileNotFoundError:
            raise DataError(f"{path} is missing: only a run with [audit] targets can be audited") from None
        except Exception as error:  # damage shows as an error of zipfile, zlib or numpy
            raise DataError(f"{path} is damaged ({type(error).__name__})") from None


@dataclass(frozen=True)
class Exchange:
    """One exchange, as the server saw it, and which records it was about."""

    node: int
    download: Download
    upload: Upload
    index: IntArray

    @property
    def owners(self) -> IntArray:
        """The device of each released record."""
        return self.upload.release.owners


def exchanges(folder: Path, parameters: int) -> Iterator[Exchange]:
    """Yield a run's exchanges in the order of rounds, in each those with releases first.

    ``parameters`` is the first layer's size.

    Raises
    ------
    DataError
        If there are none, or one is damaged.
    """
    paths = sorted((folder / _EXCHANGES).glob("*.npz"), key=lambda p: (p.name[:6], "gradient" in p.name, p.name))
    if not paths:
        raise DataError(f"{folder} holds no exchanges: only a run with [audit] targets can be audited")
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as file:
                yield Exchange(
                    int(file["node"]),
                    Download.from_bytes(file["download"].tobytes(), parameters=parameters),
                    Upload.from_bytes(file["upload"].tobytes(), parameters=parameters),
                    file["index"],
                )
        except Exception as error:  # see Subjects.load
            raise DataError(f"{path} is damaged ({type(error).__name__})") from None
