"""Both services under load, in turns."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedsplit.common.certs import make_certificates
from fedsplit.device.home import Home
from fedsplit.service.served import Served
from fedsplit.service.tokens import add_token
from simulations.encryption.halves import Split, records_of
from simulations.encryption.schemes import sealed
from simulations.serving.load import Load
from simulations.serving.service import KINDS, OURS, WHOLE
from simulations.shared.network import free_port
from simulations.shared.options import option
from simulations.shared.results import Results
from simulations.shared.serving import listening
from simulations.shared.settings import finished

RECORDS = 256  # that clients send again and again
WARMING = 2.0  # seconds of load that do not count
Turn = dict[str, float]


@dataclass(frozen=True)
class Options:
    """Which run, and how much load."""

    run: Path | None = option(None, help="folder of a finished run", positional=True)
    seconds: float = option(30.0, quick=1.0, help="of each turn")
    clients: int = option(64, quick=8)
    turns: int = option(6, quick=2)


@dataclass(frozen=True)
class Target:
    """A service: its process, its port, and what clients send it."""

    pid: int
    port: int
    uploads: Sequence[bytes]


def study(options: Options) -> Results:
    """Return each turn's figures by kind of service."""
    with finished(options.run) as run, TemporaryDirectory() as name, ExitStack() as stack:
        folder, served = Path(name), Served.of_run(run)
        path, uploads = f"/v1/models/{served.name}/predict", prepared(run, folder, served)
        targets = {kind: stack.enter_context(_started(run, folder, kind, uploads[kind])) for kind in KINDS}
        for target in targets.values():  # fills caches
            Load(target.port, path, folder, target.uploads).run(options.clients, WARMING)
        found: dict[str, list[Turn]] = {kind: [] for kind in KINDS}
        for number in range(options.turns):
            for kind in KINDS[:: 1 - 2 * (number % 2)]:
                found[kind].append(turn(targets[kind], path, folder, options))
    return {"turns": found}


def prepared(run: Path, folder: Path, served: Served) -> dict[str, list[bytes]]:
    """Write certificates, token and key to a folder; return what clients send to each kind of service."""
    make_certificates(folder / "certs", ["127.0.0.1"])
    (folder / "token").write_text(add_token(folder / "tokens", "load"))
    key = AESGCM.generate_key(256)
    (folder / "key").write_bytes(key)
    split, raw = Split(served.bundle, Home.create(folder / "home", [0])), records_of(run, served)[:RECORDS]
    return {OURS: [split(row[None]) for row in raw], WHOLE: [sealed(AESGCM(key), row.tobytes()) for row in raw]}


@contextmanager
def _started(run: Path, folder: Path, kind: str, uploads: Sequence[bytes]) -> Iterator[Target]:
    port = free_port()
    command = [sys.executable, "-m", "simulations.serving.service", str(run), str(folder), kind, str(port)]
    with listening(command, port) as process:
        yield Target(process.pid, port, uploads)


def turn(target: Target, path: str, folder: Path, options: Options) -> Turn:
    """Load a service for a while; return what it answered, and what that took."""
    load = Load(target.port, path, folder, target.uploads)
    before, _ = usage(target.pid)
    began = time.monotonic()
    load.run(options.clients, options.seconds)
    took = time.monotonic() - began
    after, memory = usage(target.pid)
    good = np.array([latency for latency, status in load.done if status == 200])
    return {
        "errors": len(load.done) - len(good),
        "p50": float(np.quantile(good, 0.5)),
        "p99": float(np.quantile(good, 0.99)),
        "records_per_second": len(good) / took,
        "records": len(good),
        "cpu_seconds": after - before,
        "memory_mb": memory,
    }


def usage(pid: int) -> tuple[float, float]:
    """Return a process's CPU seconds and its memory in MB."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    status = Path(f"/proc/{pid}/status").read_text()
    memory = int(status.partition("VmRSS:")[2].split()[0]) / 1000
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), memory
