"""Whether the virtual clock is right: the same run on real nodes behind slow links and with a device profile.

    python simulations/shaped.py

Each node reaches the server over loopback, TLS and keys included, through a proxy of its own that is as slow as the
node's figures say (`simulations/shaping.py`). The simulation is given the same figures as a trace. Compared is the time
of a round without the trunk's, round by round, without the first and the last. First every node alone, then all four,
where the slowest decides. Then the round trips of an exchange: by how much it takes longer when a round trip does, with
links that are otherwise fast. Writes `simulations/results/shaped.json`.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import replicated
from processes import deployment
from shaping import Link, shaped

from fedsplit.config import Settings, check_settings

RESULTS = Path(__file__).parent / "results" / "shaped.json"
RECORDS = 1600  # of each device
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Figures:
    """A node's way to the server: Mbit/s, and seconds of a round trip."""

    uplink: float
    downlink: float
    latency: float

    def __str__(self) -> str:
        return f"{self.uplink:g} up, {self.downlink:g} down, {1000 * self.latency:g} ms"


NODES = (Figures(1, 4, 0.05), Figures(2, 8, 0.2), Figures(4, 16, 0.1), Figures(8, 6, 0.02))
ROUND_TRIPS = (0.02, 0.1, 0.2, 0.4)  # seconds
FAST = 200.0  # Mbit/s


def settings_for(count: int, rounds: int, mode: str, chunk: int | str, **devices: Any) -> Settings:
    """Return a run over some devices, in whose rounds all take part."""
    return check_settings(
        {
            "run": {"name": "shaped", "rounds": rounds, "engine": "inline"},
            "data": {"builder": "replicated:device", "task": "classification", "outputs": 7},
            "devices": {"count": count, "test": [0], **devices},
            "model": {"name": "sensor-cnn", "width": 16},
            "dropping": {"policy": "top-k", "k": 250},
            "protocol": {"mode": mode, "chunk": chunk, "batch-size": 256},
        }
    )


def real(folder: Path, nodes: Sequence[Figures], settings: Settings) -> list[float]:
    """Return the seconds of a run's rounds on real nodes, one for each device."""
    with ExitStack() as stack:
        trial = stack.enter_context(deployment(folder, environment={"OMP_NUM_THREADS": "1"}))
        for device, figures in enumerate(nodes):
            up, down = (Link(speed, figures.latency / 2) for speed in (figures.uplink, figures.downlink))
            port = stack.enter_context(shaped(trial.host, trial.port, up, down))
            trial.make_node(f"n{device}", [device], settings, allow=["replicated:device"])
            trial.start_node(f"n{device}", "--superlink", f"{trial.host}:{port}")  # the last one counts
        config = trial.folder / "run.toml"
        config.write_text(settings.to_toml())
        trial.run(config, "run")
        trial.result("run")
        return [r["seconds"] - r["trunk_seconds"] for r in rounds_of(trial.folder / "run")]


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    """Return what a run's folder says of each round."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def round_trips(place: Path, chunk: int | str, rounds: int) -> dict[str, Any]:
    """Measure by how many round trips an exchange takes longer than a computation."""
    found = {}
    for latency in ROUND_TRIPS:
        settings = settings_for(1, rounds, "pipelined", chunk)
        times = real(place / f"{chunk}-{latency}", [Figures(FAST, FAST, latency)], settings)
        found[latency] = median(times[1:-1])
        print(f"chunk {chunk}, {latency} s", [round(t, 3) for t in times], file=sys.stderr, flush=True)
    slope, rest = linear_regression([*found], [*found.values()])
    return {"seconds": found, "round_trips": slope, "rest": rest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for title, nodes, mode in [(f"node {i}", [n], "pipelined") for i, n in enumerate(NODES)] + [
            ("all", NODES, "pipelined"),
            ("all, synchronous", NODES, "synchronous"),
        ]:
            os.environ[replicated.RECORDS] = str(RECORDS * len(nodes))
            times = real(place / title, nodes, settings_for(len(nodes), rounds, mode, "epoch"))
            print(title, [round(t, 3) for t in times], file=sys.stderr, flush=True)
        os.environ[replicated.RECORDS] = str(RECORDS)
        print({chunk: round_trips(place, chunk, rounds) for chunk in (8, "epoch")})


if __name__ == "__main__":
    main()
