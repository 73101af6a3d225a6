"""Runs on real nodes behind slow links, and the same runs simulated."""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from fedsplit.plan.settings import Settings, check_settings
from fedsplit.runs.simulation import simulate
from simulations.shaped.proxy import Link, shaped
from simulations.shared import replicated
from simulations.shared.options import option
from simulations.shared.processes import Deployment, deployment
from simulations.shared.results import Results
from simulations.shared.settings import Changes
from simulations.shared.workers import quiet

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
TOGETHER: dict[str, Changes] = {
    "all, pipelined": {},
    "all, synchronous": {"protocol": {"mode": "synchronous"}},
    "the first two": {"devices": {"fraction": 0.5, "over-sampling": 2.0}},
    "all in 7 seconds": {"protocol": {"deadline": 7.0}},
}
LATENCIES = (0.02, 0.1, 0.2, 0.4)
COUNTED: dict[str, tuple[float, int | str]] = {"long": (8.0, "epoch"), "short": (100.0, 8)}  # Mbit/s and chunk


def settings_for(count: int, rounds: int, changes: Changes) -> Settings:
    """Return a run over some devices, with uploads of almost 1 MB unless changed."""
    tables: Changes = {
        "run": {"name": "shaped", "rounds": rounds, "engine": "inline"},
        "data": replicated.DATA,
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
    with ExitStack() as stack:
        trial = stack.enter_context(deployment(folder, environment={"OMP_NUM_THREADS": "1"}))
        links = [link for device, node in enumerate(nodes) for link in _connect(stack, trial, device, node, settings)]
        config = trial.folder / "run.toml"
        config.write_text(settings.to_toml())
        trial.run(config, "run")
        result = trial.result("run")
    seconds = [r["seconds"] - r.get("trunk_seconds", 0) for r in rounds_of(trial.folder / "run")]
    return seconds, sum(link.bytes for link in links) / (result["bytes_up"] + result["bytes_down"])


def _connect(
    stack: ExitStack, trial: Deployment, device: int, figures: Figures, settings: Settings
) -> tuple[Link, Link]:
    """Start a device's node behind a proxy; return its links."""
    up, down = (Link(speed, figures.latency / 2) for speed in (figures.uplink, figures.downlink))
    port = stack.enter_context(shaped(trial.host, trial.port, up, down))
    trial.make_node(f"n{device}", [device], settings, allow=[replicated.BUILDER])
    trial.start_node(f"n{device}", "--superlink", f"{trial.host}:{port}")  # the last one counts
    return up, down


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
    return {"real": there[1:-1], "simulated": here[1:-1], "overhead": overhead}


def round_trips(folder: Path, speed: float, chunk: int | str, rounds: int) -> dict[str, float]:
    """Return the median seconds of an exchange by the seconds of a round trip."""
    os.environ[replicated.RECORDS] = str(RECORDS)
    settings = settings_for(1, rounds, {"protocol": {"chunk": chunk}})
    found = {}
    for latency in LATENCIES:
        seconds, _ = real(folder / f"{chunk}-{latency}", [Figures(speed, speed, latency)], settings)
        found[str(latency)] = median(seconds[1:-1])
    return found


def cases() -> dict[str, tuple[Sequence[Figures], Changes]]:
    """Return what is compared, by name: each node alone, and all together in several ways."""
    return {
        **{str(node): ([node], {}) for node in NODES},
        **{title: (NODES, changes) for title, changes in TOGETHER.items()},
    }


@dataclass(frozen=True)
class Options:
    """What is compared, and how long."""

    rounds: int = option(10, quick=3)
    rows: tuple[str, ...] = option(tuple(cases()), quick=(str(NODES[-1]),), choices=tuple(cases()))
    counted: tuple[str, ...] = option(tuple(COUNTED), quick=(), choices=tuple(COUNTED), help="exchanges")


def study(options: Options) -> Results:
    """Compare all rows, and count round trips."""
    quiet()
    found: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, row in enumerate(options.rows):
            nodes, changes = cases()[row]
            settings = settings_for(len(nodes), options.rounds, changes)
            found[row] = compared(Path(folder) / str(number), nodes, settings)
            print(row, found[row], file=sys.stderr)
        counted = {name: round_trips(Path(folder), *COUNTED[name], options.rounds) for name in options.counted}
    return {"rows": found, "counted": counted}
