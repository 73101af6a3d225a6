"""What a round of a simulation costs: per exchange, device, record and byte, from runs that differ in one of them.

    python -m simulations costs --repeats 3

Below the table stands what these costs predict for other rounds.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from statistics import median

from simulations.scale import settings_for
from simulations.shared.options import option
from simulations.shared.results import Results
from simulations.shared.statistics import medians
from simulations.shared.tables import markdown, page
from simulations.shared.watched import watch

NAMES = {
    "trunk_record": "record, in the trunk",
    "node_record": "record, on its node",
    "device": "device",
    "exchange": "exchange (a message and its answer)",
    "megabyte": "megabyte, up or down",
}
CORES = os.cpu_count() or 1
# devices, actors: the first as the study `scale` measures it, to compare with
ROUNDS_TO_COME = ((100_000, CORES), (10_000, 64), (1_000_000, 64), (1_000_000, 1024))
Figures = dict[str, float]


@dataclass(frozen=True)
class Run:
    """A run with all devices in every round; whether all outputs are kept."""

    devices: int
    records: int = 10
    nodes: int = 2
    all_kept: bool = False

    def measured(self, rounds: int) -> Figures:
        """Simulate, with the run's own figures beside what was measured."""
        dropping = {"policy": "none"} if self.all_kept else {}
        settings = settings_for(self.devices, -(-self.devices // self.nodes), 1.0, rounds, **dropping)
        return {**asdict(self), **watch(settings, self.records * self.devices)}


@dataclass(frozen=True)
class Options:
    """How many devices the runs have, and how often they run."""

    devices: int = option(1000, quick=100, help="the least; one run has ten times as many")
    rounds: int = option(7, quick=3)
    repeats: int = option(3, quick=1)


def runs(devices: int) -> dict[str, Run]:
    """Return the runs by what they have more of than the first."""
    base = Run(devices)
    return {
        "base": base,
        "records": replace(base, records=100),
        "devices": replace(base, devices=10 * devices),
        "nodes": replace(base, nodes=50),
        "bytes": replace(base, records=100, all_kept=True),
    }


def solve(found: dict[str, Figures]) -> Figures:
    """Return seconds per unit, from the differences between runs."""
    base, records, devices, nodes, whole = (found[name] for name in ("base", "records", "devices", "nodes", "bytes"))
    more = base["devices"] * (records["records"] - base["records"])
    return {
        "trunk_record": (records["trunk"] - base["trunk"]) / more,
        "node_record": (_outside(records) - _outside(base)) / more,
        "device": (_outside(devices) - _outside(records)) / (devices["devices"] - records["devices"]),
        "exchange": (_outside(nodes) - _outside(base)) / (nodes["nodes"] - base["nodes"]),
        "megabyte": (_outside(whole) - _outside(records)) / (_megabytes(whole) - _megabytes(records)),
    }


def _outside(found: Figures) -> float:
    """Return a round's seconds on nodes, in transport and in packing."""
    return found["round"] - found["trunk"]


def _megabytes(found: Figures) -> float:
    return found["megabytes_up"] + found["megabytes_down"]


def predict(costs: Figures, devices: int, records: int, actors: int, cores: int) -> tuple[float, float]:
    """Return the seconds on nodes and on the server of a round in which ``devices`` take part, 2,500 on each node.

    The costs were measured on ``cores`` actors.
    """
    spread = devices * (costs["device"] + records * costs["node_record"]) * cores / actors
    return spread, devices * records * costs["trunk_record"] + devices / 2500 * costs["exchange"]


def study(options: Options) -> Results:
    """Return the costs that each repetition gives."""
    solved = []
    for _ in range(options.repeats):
        solved.append(solve({name: run.measured(options.rounds) for name, run in runs(options.devices).items()}))
        print(json.dumps(solved[-1]), file=sys.stderr)
    return {"cores": CORES, "costs": solved}


def tables(results: Results) -> str:
    """Return the costs, and what they predict."""
    solved = results["costs"]
    rows = []
    for key, name in NAMES.items():
        every = [1e6 * costs[key] for costs in solved]
        rows.append((name, *(f"{value:,.1f}" for value in (median(every), min(every), max(every)))))
    said = [_said(medians(solved), *chosen, results["cores"]) for chosen in ROUNDS_TO_COME]
    return page(markdown(("for each", "microseconds", "lowest", "highest"), rows), "\n".join(said))


def _said(costs: Figures, devices: int, actors: int, cores: int) -> str:
    nodes, server = predict(costs, devices, 10, actors, cores)
    return (
        f"- {devices:,} devices of 10 records in a round, {actors:,} actors: {nodes:.1f} s on the nodes, "
        f"{server:.1f} s on the server"
    )
