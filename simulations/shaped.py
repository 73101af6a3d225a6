"""Whether the virtual clock is right: the same runs on real nodes behind slow links, and simulated with their figures.

    python simulations/shaped.py

Each node reaches the server over loopback, TLS and keys included, through a proxy of its own that is as slow as the
node's figures say (`simulations/shaping.py`); the simulation gets these figures as a trace. Compared is the time of a
round without the trunk's, without the first and the last: first every node alone, then all four together. Then the
round trips of an exchange are counted: by how many of them it is longer if each takes longer. Writes
`simulations/results/shaped.json`.
"""

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import replicated
from processes import deployment
from shaping import Link, shaped

from fedsplit.plan.settings import Settings, check_settings
from fedsplit.runs.simulation import simulate

RESULTS = Path(__file__).parent / "results" / "shaped.json"
RECORDS = 1600  # of each device
# Of an exchange over Flower's HTTP: to see the message, to fetch it, to confirm it, to announce the answer, and half of
# one to send it. To the clock an exchange is one round trip, so the trace has so many times the latency.
ROUND_TRIPS = 4.5
Row = dict[str, Any]


@dataclass(frozen=True)
class Figures:
    """A node's way to the server: Mbit/s, and seconds of a round trip."""

    uplink: float
    downlink: float
    latency: float

    def __str__(self) -> str:
        return f"{self.uplink:g} up, {self.downlink:g} down, {1000 * self.latency:g} ms"


NODES = (Figures(1, 4, 0.05), Figures(2, 8, 0.2), Figures(4, 16, 0.1), Figures(8, 6, 0.02))
TOGETHER: dict[str, dict[str, dict[str, Any]]] = {
    "all, pipelined": {},
    "all, synchronous": {"protocol": {"mode": "synchronous"}},
    "the first two": {"devices": {"fraction": 0.5, "over-sampling": 2.0}},
    "all in 7 seconds": {"protocol": {"deadline": 7.0}},
}
LATENCIES = (0.02, 0.1, 0.2, 0.4)
COUNTED: dict[str, tuple[float, int | str]] = {"long": (8.0, "epoch"), "short": (100.0, 8)}  # Mbit/s and chunk


def settings_for(count: int, rounds: int, changes: dict[str, dict[str, Any]]) -> Settings:
    """Return a run over some devices, with uploads of almost 1 MB unless changed."""
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "shaped", "rounds": rounds, "engine": "inline"},
        "data": {"builder": "replicated:device", "task": "classification", "outputs": 7},
        "devices": {"count": count, "test": [0]},
        "model": {"name": "sensor-cnn", "width": 16},
        "dropping": {"policy": "top-k", "k": 250},
        "protocol": {"mode": "pipelined", "chunk": "epoch", "batch-size": 256},
    }
    return check_settings({name: table | changes.get(name, {}) for name, table in tables.items()})


def rounds_of(folder: Path) -> list[Row]:
    """Return what a run's folder says of each round."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def real(folder: Path, nodes: Sequence[Figures], settings: Settings) -> tuple[list[float], float]:
    """Run on real nodes, one for each device.

    Returns
    -------
    tuple
        Seconds of each round, and bytes on the links to those of the payloads.
    """
    links = []
    with ExitStack() as stack:
        trial = stack.enter_context(deployment(folder, environment={"OMP_NUM_THREADS": "1"}))
        for device, figures in enumerate(nodes):
            up, down = (Link(speed, figures.latency / 2) for speed in (figures.uplink, figures.downlink))
            port = stack.enter_context(shaped(trial.host, trial.port, up, down))
            trial.make_node(f"n{device}", [device], settings, allow=["replicated:device"])
            trial.start_node(f"n{device}", "--superlink", f"{trial.host}:{port}")  # the last one counts
            links += [up, down]
        config = trial.folder / "run.toml"
        config.write_text(settings.to_toml())
        trial.run(config, "run")
        result = trial.result("run")
    seconds = [r["seconds"] - r.get("trunk_seconds", 0) for r in rounds_of(trial.folder / "run")]
    return seconds, sum(link.bytes for link in links) / (result["bytes_up"] + result["bytes_down"])


def simulated(folder: Path, nodes: Sequence[Figures], settings: Settings) -> list[float]:
    """Return the simulated seconds of the same run's rounds."""
    folder.mkdir()
    trace = folder / "trace.csv"
    seen = [replace(figures, latency=ROUND_TRIPS * figures.latency) for figures in nodes]
    lines = [",".join(map(str, (device, 0, *astuple(figures)))) for device, figures in enumerate(seen)]
    trace.write_text("\n".join(["device,seconds,uplink,downlink,latency", *lines]) + "\n")
    tables = settings.tables()
    tables["devices"] |= {"profile": {"trace": str(trace)}}
    simulate(check_settings(tables), out=folder / "run")
    ends = [0.0, *(r["simulated_seconds"] for r in rounds_of(folder / "run"))]
    return [after - before for before, after in pairwise(ends)]


def compared(folder: Path, nodes: Sequence[Figures], settings: Settings) -> Row:
    """Compare a run's rounds but the first and the last."""
    os.environ[replicated.RECORDS] = str(RECORDS * len(nodes))
    there, overhead = real(folder / "real", nodes, settings)
    here = simulated(folder / "simulated", nodes, settings)
    ratios = [s / r for s, r in zip(here[1:-1], there[1:-1], strict=True)]
    return {
        "real": median(there[1:-1]),
        "simulated": median(here[1:-1]),
        "ratio": median(ratios),
        "ratios": [min(ratios), max(ratios)],
        "overhead": overhead,
        "rounds": {"real": there, "simulated": here},
    }


def round_trips(folder: Path, speed: float, chunk: int | str, rounds: int) -> Row:
    """Count an exchange's round trips: the slope of its seconds over those of one."""
    os.environ[replicated.RECORDS] = str(RECORDS)
    settings = settings_for(1, rounds, {"protocol": {"chunk": chunk}})
    found = {}
    for latency in LATENCIES:
        seconds, _ = real(folder / f"{chunk}-{latency}", [Figures(speed, speed, latency)], settings)
        found[latency] = median(seconds[1:-1])
    slope, rest = linear_regression([*found], [*found.values()])
    return {"seconds": found, "round_trips": slope, "rest": rest}


def main() -> None:
    """Compare all rows and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    logging.getLogger("flwr").setLevel(logging.WARNING)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    found: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rows: dict[str, tuple[Sequence[Figures], dict[str, dict[str, Any]]]] = {
            **{str(node): ([node], {}) for node in NODES},
            **{title: (NODES, changes) for title, changes in TOGETHER.items()},
        }
        print(f"{'':24} {'real':>7} {'simulated':>9} {'ratio':>5} (of single rounds)  bytes to payloads'")
        for title, (nodes, changes) in rows.items():
            row = found[title] = compared(place / title, nodes, settings_for(len(nodes), rounds, changes))
            least, most = row["ratios"]
            print(
                f"{title:24} {row['real']:6.2f}s {row['simulated']:8.2f}s {row['ratio']:5.2f} ({least:.2f}-{most:.2f})"
                f"{row['overhead']:21.3f}",
                flush=True,
            )
        for title, (speed, chunk) in COUNTED.items():
            row = found[f"{title} exchanges"] = round_trips(place, speed, chunk, rounds)
            print(f"{title} exchanges: {row['round_trips']:.1f} round trips and {row['rest']:.2f} s", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
