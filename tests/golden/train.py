"""Train shipped configurations for a few rounds, in this process, and print hashes of all that comes of it as JSON.

Run it with ``--write`` to replace ``hashes.json`` after an intended change::

    python tests/golden/train.py --write

The arithmetic of torch and numpy depends on what a CPU can do. So this process asks for their plainest code, and
tells with a hash of plain torch, ``arithmetic``, whether its figures can be compared at all.
"""

import os

os.environ |= {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_SERVICE_FORCE_INTEL": "1",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Prescott",
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
}

import json
import logging
import secrets
import sys
import tempfile
from collections.abc import Iterable
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message
from safetensors.numpy import load_file

from fedsplit import simulate
from fedsplit.flower.grid import InProcessGrid
from fedsplit.flower.record import from_record
from fedsplit.runs import engine

HASHES = Path(__file__).with_name("hashes.json")
CONFIGS = Path(__file__).parents[2] / "configs"
_FEW = ["run.engine=inline", "audit.targets=0"]
_AT_HOME = ["protocol.mode=synchronous", "protocol.labels=at-home", "protocol.batch-size=2000"]
_CLOCK = [
    "devices.profile.preset=phones-4g",
    "devices.profile.release-seconds=1e-4",
    "devices.profile.gradient-seconds=1e-4",
    "devices.profile.dropout=0.1",
]
RUNS = {
    "single-pass": ("wearables", [*_FEW, "run.rounds=3"]),
    "private": ("wearables-private", [*_FEW, "run.rounds=2", "public.epochs=1"]),
    "paper": ("wearables-paper", [*_FEW, "run.rounds=2"]),
    "digits": ("digits", [*_FEW, "run.rounds=4"]),
    "novelty": ("wearables-novelty", [*_FEW, "run.rounds=2", "public.epochs=1"]),
    "labels-at-home": ("digits", [*_FEW, *_AT_HOME, "run.rounds=4"]),
    "virtual-clock": ("digits", [*_FEW, *_CLOCK, "run.rounds=4"]),
}
_NOT_HASHED = ("seconds", "samples_per_second", "versions", "trunk_seconds")  # of result.json and metrics.jsonl
_PAYLOADS: list[bytes] = []


class _ListeningGrid(InProcessGrid):
    """Notes the payload of every reply; they are pulled in no particular order."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        _PAYLOADS.extend(from_record(reply.content) for reply in replies)
        return replies


def _digest(parts: Iterable[bytes]) -> str:
    total = sha256()
    for part in parts:
        total.update(sha256(part).digest())
    return total.hexdigest()[:16]


def _arrays(path: Path) -> list[bytes]:
    return [name.encode() + values.tobytes() for name, values in sorted(load_file(path).items())]


def _figures(tables: list[dict[str, Any]]) -> bytes:
    kept = [{key: value for key, value in table.items() if key not in _NOT_HASHED} for table in tables]
    return json.dumps(kept, sort_keys=True).encode()


def hashes(config: str, overrides: list[str]) -> dict[str, str]:
    """Train and return a hash of the weights, of the uploads and of the figures."""
    _PAYLOADS.clear()
    numbers = count(1)
    secrets.randbits = lambda bits: next(numbers)  # nonces, which uploads repeat, and the run's number
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        result = simulate(CONFIGS / f"{config}.toml", overrides=overrides, out=out)
        rounds = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        weights = [part for path in sorted((out / "checkpoint").glob("*.safetensors")) for part in _arrays(path)]
    return {
        "weights": _digest(weights),
        "uploads": _digest(sorted(_PAYLOADS)),
        "figures": _digest([_figures([*rounds, result])]),
    }


def arithmetic() -> str:
    """Return a hash of what plain torch and numpy compute here, in networks like those of the runs."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv1d(6, 16, 9, 2, 4), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(16 * 32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 5),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(torch.randn(70, 6, 64)), torch.arange(70) % 5).backward()
        optimizer.step()
    double = net[0].weight.detach().double().numpy().reshape(16, -1)
    return _digest(
        [*(p.detach().numpy().tobytes() for p in net.parameters()), np.linalg.svd(double @ double.T)[1].tobytes()]
    )


def main() -> None:
    """Print, or write, the hashes of all runs."""
    engine.InProcessGrid = _ListeningGrid
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = {"arithmetic": arithmetic(), **{name: hashes(*run) for name, run in RUNS.items()}}
    text = json.dumps(found, indent=2) + "\n"
    if "--write" in sys.argv:
        HASHES.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
