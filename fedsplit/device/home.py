"""A real node's folder: its secret and key, its owner's limits, the ledgers of what has left, and of which records.

Made once by ``fedsplit node init``. Every file can be read by its owner alone. A folder that lacks one of them is
refused, never mended: a new secret or an empty ledger would forget what has left.
"""

import logging
import secrets
import shutil
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np
import tomli_w
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedsplit.common.certs import make_key_pair, write_private
from fedsplit.common.errors import ConfigError, StateError
from fedsplit.common.files import alone, writing
from fedsplit.data import DeviceData, Records
from fedsplit.guard.accountant import ExposureAccountant
from fedsplit.guard.guard import Guard
from fedsplit.guard.limits import SHIPPED, Limits, load_limits
from fedsplit.guard.sealed import load_sealed, save_sealed
from fedsplit.model.layer import FirstLayer
from fedsplit.wire.container import MAX_DEVICES

log = logging.getLogger(__name__)
LEDGERS = ("train", "test")
ASKED = 1 << 61  # in the ledgers, above all records that are known by their place: those of predictions
_NONE = np.zeros(0, dtype="<u8")
_LONG_OVER = 7 * 86400.0  # seconds


@dataclass(frozen=True)
class Home:
    """A node's folder."""

    folder: Path

    @classmethod
    def create(cls, folder: Path, devices: Sequence[int], allow: Sequence[str] = ()) -> "Home":
        """Make a node's folder for some devices.

        Parameters
        ----------
        folder : Path
        devices : sequence of int
        allow : sequence of str
            What a run's settings may name on this machine: see :attr:`allowed`.

        Raises
        ------
        ConfigError
            If the folder exists and is not empty, or cannot be written, or the device ids are not valid.
        """
        if len(set(devices)) < len(devices) or not devices or not all(0 <= d < MAX_DEVICES for d in devices):
            raise ConfigError(f"devices must be different ids in 0..{MAX_DEVICES - 1}, got {list(devices)}")
        with writing(f"folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if any(folder.iterdir()):
                raise ConfigError(f"folder {folder} is not empty: a node's secret and ledgers are never replaced")
            folder.chmod(0o700)
            home = cls(folder)
            write_private(folder / "secret", secrets.token_bytes(32))
            own = {"devices": sorted(devices), "allow": list(allow)}
            write_private(folder / "node.toml", tomli_w.dumps(own).encode())
            make_key_pair(home.key_path, f"fedsplit-devices={','.join(map(str, sorted(devices)))}")
            shutil.copy(SHIPPED, folder / "limits.toml")
            (folder / "limits.toml").chmod(0o600)
        for ledger in LEDGERS:
            ExposureAccountant.create(home.ledger_path(ledger), home.owner)
        for device in devices:
            save_sealed(home.known_path(device), train=_NONE, test=_NONE)
        return home

    @cached_property
    def secret(self) -> bytes:
        """The node's 32 secret bytes; raises StateError if they are missing, damaged or open to others."""
        return _secret(self.folder / "secret")

    @property
    def key_path(self) -> Path:
        """The file of the private key by which the server knows the node; its public half is beside it."""
        return self.folder / "key"

    @property
    def seen_path(self) -> Path:
        """A file that is there once the node has been connected to a server."""
        return self.folder / "connected"

    def check(self) -> None:
        """Look at all that a node needs before it takes part.

        Raises
        ------
        StateError
            If something is missing, damaged, or private and open to others.
        ConfigError
            If the limits are not valid.
        """
        _private(self.key_path)
        if not self.limits.enforce:
            log.warning("%s: enforce is false: everything leaves this node", self.folder / "limits.toml")
        for ledger in LEDGERS:
            self.accountant(ledger)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Hold the folder for one process: two would be one node twice, and its ledgers would not add up.

        Raises
        ------
        ConfigError
            If another process has it.
        """
        running = f"node {self.folder} is already running: it cannot be started twice"
        with alone(self.folder / "lock", running):
            self._forget_old_runs()
            yield

    def run_folder(self, run: int) -> Path:
        """Return the folder of what a run has pending here."""
        return self.folder / "runs" / f"{run:x}"

    def _forget_old_runs(self) -> None:
        """Remove what runs that are long over, or have stopped without an end, had pending."""
        for folder in self.run_folder(0).parent.glob("*"):
            if folder.stat().st_mtime < time.time() - _LONG_OVER:
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def owner(self) -> bytes:
        """A fingerprint by which the ledgers know whose they are."""
        return sha256(b"fedsplit ledger" + self.secret).digest()

    @property
    def devices(self) -> list[int]:
        """The ids of the node's devices; raises StateError."""
        return self._own[0]

    @property
    def allowed(self) -> list[str]:
        """What a run's settings may name here: ``module:function`` of installed code, folders; raises StateError."""
        return self._own[1]

    @cached_property
    def _own(self) -> tuple[list[int], list[str]]:
        path = self.folder / "node.toml"
        try:
            found = tomllib.loads(path.read_text(encoding="utf-8"))
            devices, allow = found["devices"], found.get("allow", [])
            if not isinstance(devices, list) or not isinstance(allow, list):
                raise TypeError
            return [int(device) for device in devices], [str(name) for name in allow]
        except (OSError, ValueError, KeyError, TypeError):
            raise StateError(f"{path} is missing or damaged: it must hold devices = [ids], allow = [names]") from None

    @cached_property
    def limits(self) -> Limits:
        """The owner's limits; raises ConfigError."""
        return load_limits(self.folder / "limits.toml")

    def device_secret(self, device: int) -> bytes:
        """Return a device's 32-byte secret: HKDF-SHA256 of the node's (RFC 5869).

        A file ``secret-DEVICE`` wins over it, for a device that has come from another node or from a simulation.
        """
        if (own := self.folder / f"secret-{device}").exists():
            return _secret(own)
        info = b"fedsplit device %d" % device
        return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(self.secret)

    def known(self, device: int, data: DeviceData) -> DeviceData:
        """Return a device's data after remembering, by keyed hashes, which record is at which place.

        The ledgers name records by their place: behind those that were there, others may be added; nothing else.

        Raises
        ------
        StateError
            If a record is not the one that was at its place before, or it is not known what was.
        """
        path = self.known_path(device)
        try:
            before, _ = load_sealed(path)
        except (OSError, ValueError):
            raise StateError(f"{path} is missing or damaged: which records have left cannot be known") from None
        now = {ledger: self._hashes(records) for ledger, records in zip(LEDGERS, (data.train, data.test), strict=True)}
        for ledger, hashes in now.items():
            most = max(len(hashes), len(before[ledger]))
            old, new = (np.pad(h, (0, most - len(h))) for h in (before[ledger], hashes))
            changed = np.flatnonzero((old != new)[: len(before[ledger])])
            if len(changed):
                raise StateError(
                    f"{ledger} record {changed[0]} of device {device} is not the one that it was: the ledgers count "
                    "records by their place, so add new ones behind the others and leave those as they are"
                )
        if any(len(hashes) > len(before[ledger]) for ledger, hashes in now.items()):
            save_sealed(path, train=now["train"], test=now["test"])
        return data

    def _hashes(self, records: Records) -> NDArray[np.uint64]:
        segments = [b""] * len(records) if records.segments is None else list(records.segments)
        found = [
            blake2b(np.ascontiguousarray(x).tobytes() + bytes(s), digest_size=8, key=self.secret).digest()
            for x, s in zip(records.x, segments, strict=True)
        ]
        return np.frombuffer(b"".join(found), dtype="<u8")

    def known_path(self, device: int) -> Path:
        """Return the file of the hashes of a device's records."""
        return self.folder / f"records-{device}.npz"

    def ledger_path(self, ledger: str) -> Path:
        """Return the file of the ledger ``train`` or ``test``."""
        return self.folder / f"ledger-{ledger}.npz"

    def accountant(self, ledger: str) -> ExposureAccountant:
        """Open a ledger; raises StateError if it is missing, damaged or another node's."""
        return ExposureAccountant(self.ledger_path(ledger), self.owner)

    def guard(self, ledger: str, layer: FirstLayer) -> Guard:
        """Open the guard, which enforces the limits unless their owner says otherwise."""
        return Guard(self.limits, self.accountant(ledger), layer, enforce=self.limits.enforce)


def _secret(path: Path) -> bytes:
    found = _private(path)
    if len(found) != 32:
        raise StateError(f"secret {path} is damaged: it must have 32 bytes, it has {len(found)}")
    return found


def _private(path: Path) -> bytes:
    try:
        found, mode = path.read_bytes(), path.stat().st_mode
    except OSError:
        raise StateError(f"{path} is missing: make a node with fedsplit node init") from None
    if mode & 0o077:
        raise StateError(f"{path} can be read by others: chmod 600 it, if nobody has")
    return found
