"""A prediction service under load, beside the same service that gets encrypted records and runs the whole network.

    python simulations/serving.py runs/mnist-private --seconds 30 --clients 64

Both services are processes of their own, with TLS and a token, and the same code: one gets what dropping left and runs
the trunk, the other opens an AES-256-GCM message with a session key and runs the whole network. Clients with one record
a request keep both saturated in turns, first the one first, then the other, in a third process. Prints errors,
latencies, records a second, CPU time of the service per record and its memory; writes
`simulations/results/serving.json`.
"""

import argparse
import asyncio
import gc
import json
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import uvicorn
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from encryption import Split, Whole, raw_records
from processes import free_port, wait_for_port

from fedsplit.common.arrays import FloatArray
from fedsplit.common.certs import CA, CERTIFICATE, KEY, make_certificates
from fedsplit.common.errors import WireError
from fedsplit.device.home import Home
from fedsplit.plan.experiment import Experiment
from fedsplit.runs.folder import RunFolder
from fedsplit.service.app import service
from fedsplit.service.served import Served
from fedsplit.service.tokens import Tokens, add_token

RESULTS = Path(__file__).parent / "results" / "serving.json"
TURNS = 6
_NONCE = 12
_PATIENCE = 60.0  # seconds for an answer
KINDS = ("fedsplit", "AES-256-GCM, whole network")


@dataclass(frozen=True)
class Sealed(Served):
    """The whole network behind AES-256-GCM."""

    key: bytes = b""
    whole: Any = None
    size: int = 0

    def answers(self, payloads: Sequence[bytes]) -> Sequence[FloatArray | WireError]:
        """Return the network's outputs for each of some messages."""
        cipher = AESGCM(self.key)
        plain = [cipher.decrypt(payload[:_NONCE], payload[_NONCE:], None) for payload in payloads]
        return np.split(self.whole(b"".join(plain)), np.cumsum([len(p) // self.size for p in plain])[:-1])


def records_of(run: Path, served: Served) -> Any:
    """Return the raw test records of a run."""
    source = Experiment(RunFolder(run).trained()).source
    test = np.concatenate([source.device(device).test.x for device in source.test_devices])
    return raw_records(served.bundle.scaling, test)


def serve(run: Path, folder: Path, kind: str, port: int) -> None:
    """Serve in this process until it is ended."""
    torch.set_num_threads(1)
    model = served = Served.of_run(run)
    if kind != KINDS[0]:
        raw, key = records_of(run, served), (folder / "key").read_bytes()
        model = Sealed(served.bundle, served.trunk, served.name, key, Whole(served, raw), raw[0].nbytes)
    app = service([model], Tokens(folder / "tokens"))
    gc.collect()
    gc.freeze()  # as fedsplit serve does
    files = {"ssl_certfile": str(folder / CERTIFICATE), "ssl_keyfile": str(folder / KEY)}
    uvicorn.run(app, port=port, log_level="warning", access_log=False, ws="none", **files)  # type: ignore[arg-type]


async def load(port: int, path: str, files: Path, payloads: list[bytes], clients: int, seconds: float) -> list[Any]:
    """Keep ``clients`` requests going, each on a connection of its own; return (latency, status) of each.

    Bare streams, so that as little as possible of a latency is the client's own: from before a request is written until
    all of its answer is read. Connections are made before.
    """
    context = ssl.create_default_context(cafile=str(files / CA))
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {(files / 'token').read_text()}\r\n"
    requests = [f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload for payload in payloads]
    done: list[Any] = []

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", port, ssl=context)

    connections = [await connect() for _ in range(clients)]
    deadline = time.monotonic() + seconds

    async def ask(number: int) -> None:
        reader, writer = connections[number]
        while (began := time.monotonic()) < deadline:
            writer.write(requests[number % len(requests)])
            number += clients
            try:
                answer = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _PATIENCE)).lower()
                length = int(answer.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
                await asyncio.wait_for(reader.readexactly(length), _PATIENCE)
                done.append((time.monotonic() - began, int(answer.split(b" ", 2)[1])))
            except (OSError, EOFError, ValueError, asyncio.LimitOverrunError):  # an error, and the clock goes on
                done.append((time.monotonic() - began, 0))
                writer.close()
                reader, writer = await connect()
        writer.close()

    await asyncio.gather(*(ask(number) for number in range(clients)))
    return done


def usage(pid: int) -> tuple[float, float]:
    """Return a process's CPU seconds and its memory in MB."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    status = Path(f"/proc/{pid}/status").read_text()
    memory = int(status.partition("VmRSS:")[2].split()[0]) / 1000
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), memory


def main() -> None:
    """Load both services in turns and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each turn")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        folder, kind, port = options.serve
        serve(options.run, Path(folder), kind, int(port))
        return
    with TemporaryDirectory() as place:
        found = measure(options.run, Path(place), options.seconds, options.clients)
    for kind, turns in found.items():
        middle = {name: median(turn[name] for turn in turns) for name in turns[0]} | {"cpu": cpu_of(turns)}
        grown = turns[-1]["memory_mb"] - turns[0]["memory_mb"]
        print(
            f"{kind:28} {sum(turn['errors'] for turn in turns)} errors, p50 {1000 * middle['p50']:.1f} ms, "
            f"p99 {1000 * middle['p99']:.1f} ms, {middle['records_per_second']:.0f} records/s, "
            f"{1e6 * middle['cpu']:.0f} us CPU a record, {middle['memory_mb']:.0f} MB ({grown:+.1f})"
        )
    ours, theirs = (found[kind] for kind in KINDS)
    pairs = [cpu_of([one]) / cpu_of([other]) for one, other in zip(ours, theirs, strict=True)]
    print(
        f"CPU of fedsplit's service to the other's, a record: {cpu_of(ours) / cpu_of(theirs):.2f} over all turns, "
        f"{min(pairs):.2f} to {max(pairs):.2f} (median {median(pairs):.2f}) by turns"
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


def cpu_of(turns: Sequence[Mapping[str, float]]) -> float:
    """Return CPU seconds a record over some turns."""
    return sum(turn["cpu_seconds"] for turn in turns) / sum(turn["records"] for turn in turns)


def measure(run: Path, folder: Path, seconds: float, clients: int) -> dict[str, list[dict[str, float]]]:
    """Return each turn's figures by kind of service."""
    make_certificates(folder / "certs", ["127.0.0.1"])
    for name in (CA, CERTIFICATE, KEY):
        (folder / "certs" / name).rename(folder / name)
    (folder / "token").write_text(add_token(folder / "tokens", "load"))
    key = AESGCM.generate_key(256)
    (folder / "key").write_bytes(key)
    served = Served.of_run(run)
    raw = records_of(run, served)[:256]
    split = Split(served.bundle, Home.create(folder / "home", [0]))
    nonces = [os.urandom(_NONCE) for _ in raw]
    uploads = {
        KINDS[0]: [split(row[None]) for row in raw],
        KINDS[1]: [n + AESGCM(key).encrypt(n, row.tobytes(), None) for n, row in zip(nonces, raw, strict=True)],
    }
    ports = {kind: free_port() for kind in KINDS}
    command = [sys.executable, __file__, str(run), "--serve", str(folder)]
    processes = {kind: subprocess.Popen([*command, kind, str(port)]) for kind, port in ports.items()}
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    path = f"/v1/models/{served.name}/predict"
    try:
        for kind, port in ports.items():
            wait_for_port("127.0.0.1", port)
            asyncio.run(load(port, path, folder, uploads[kind], clients, 2.0))  # caches
        for turn in range(TURNS):
            for kind in KINDS[:: 1 - 2 * (turn % 2)]:
                port = ports[kind]
                before, _ = usage(processes[kind].pid)
                began = time.monotonic()
                done = asyncio.run(load(port, path, folder, uploads[kind], clients, seconds))
                took = time.monotonic() - began
                after, memory = usage(processes[kind].pid)
                good = np.array([latency for latency, status in done if status == 200])
                found[kind].append(
                    {
                        "errors": len(done) - len(good),
                        "p50": float(np.quantile(good, 0.5)),
                        "p99": float(np.quantile(good, 0.99)),
                        "records_per_second": len(good) / took,
                        "records": len(good),
                        "cpu_seconds": after - before,
                        "memory_mb": memory,
                    }
                )
    finally:
        for process in processes.values():
            process.terminate()
            process.wait(20)
    return found


if __name__ == "__main__":
    main()
