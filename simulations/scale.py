"""How a simulation grows with the number of devices: seconds per round, memory of all processes, bytes.

    python -m simulations scale --devices 100 1000 10000 100000

Each device has 10 records; in a round a fixed cohort takes part, or all devices. Every measurement is a run of its own
on Ray in a new process; memory is the largest sum, while it lasts, of the proportional shares (PSS) of that process
and all below it: driver, Ray's own, actors. "Outside" are the seconds of the process that are not training.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit.plan.settings import Settings, check_settings
from simulations.shared.options import option
from simulations.shared.replicated import DATA
from simulations.shared.results import Results
from simulations.shared.tables import markdown
from simulations.shared.watched import watch

RECORDS = 10  # of each device
ASKED_PER_NODE = 2500  # at most: a node's records of a round are in memory together
COLUMNS = ("devices", "in a round", "nodes", "seconds a round", "GiB", "of it the driver", "MB up", "MB down")


@dataclass(frozen=True)
class Options:
    """How many devices, in all and in a round."""

    devices: tuple[int, ...] = option((100, 1000, 10_000, 100_000), quick=(100,))
    cohort: int = option(1000, quick=50)
    rounds: int = option(7, quick=3)


def settings_for(devices: int, per_node: int, fraction: float, rounds: int, **dropping: Any) -> Settings:
    """Return a run over replicated devices with the light network."""
    return check_settings(
        {
            "run": {"rounds": rounds},
            "data": DATA,
            "devices": {"count": devices, "per-node": per_node, "fraction": fraction, "test": [0]},
            "model": {"name": "mlp", "width": 256},
            "dropping": dropping or {"policy": "random", "keep": 0.25},
            "protocol": {"mode": "pipelined"},
        }
    )


def measure(devices: int, cohort: int, rounds: int) -> dict[str, Any]:
    """Simulate some rounds of ``cohort`` devices out of all."""
    nodes = max(2, -(-cohort // ASKED_PER_NODE))
    settings = settings_for(devices, -(-devices // nodes), cohort / devices, rounds)
    return {"devices": devices, "cohort": cohort, "nodes": nodes, **watch(settings, RECORDS * devices)}


def study(options: Options) -> Results:
    """Return a row for each number of devices, with a fixed cohort and with all devices in a round."""
    rows = []
    for fixed in (True, False):
        for devices in options.devices:
            cohort = min(options.cohort, devices) if fixed else devices
            rounds = options.rounds if fixed else min(options.rounds, 4)
            rows.append({**measure(devices, cohort, rounds), "fixed": fixed})
            print(json.dumps(rows[-1]), file=sys.stderr)
    return {"rows": rows}


def tables(results: Results) -> str:
    """Return the table, first of fixed cohorts, then of all devices."""
    return markdown((*COLUMNS, "seconds outside"), map(_cells, results["rows"]))


def _cells(row: dict[str, Any]) -> list[str]:
    counts = [f"{row[key]:,}" for key in ("devices", "cohort", "nodes")]
    sizes = [f"{row[key]:.2f}" for key in ("round", "gibibytes", "driver_gibibytes")]
    return counts + sizes + [f"{row[key]:.1f}" for key in ("megabytes_up", "megabytes_down", "outside")]


def draw(results: Results, path: Path) -> None:
    """Draw seconds per round and memory over the number of devices."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, fixed in (("fixed cohort", True), ("all devices", False)):
        chosen = [row for row in results["rows"] if row["fixed"] is fixed]
        for axis, key in zip(axes, ("round", "gibibytes"), strict=True):
            axis.loglog([row["devices"] for row in chosen], [row[key] for row in chosen], "o-", label=name)
    for axis, label in zip(axes, ("seconds per round", "GiB in all processes"), strict=True):
        axis.set(xlabel="devices", ylabel=label)
        axis.grid(visible=True, which="both", alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
