"""What a virtual clock adds to the real time of a round with many devices.

    python simulations/clock.py --devices 10000

The same pipelined run (10 records on each device, all of them in every round) in this process, without a profile and
with profiles: one in which everybody is there and in time, so that the work is the same, and the phones' with a
deadline, where devices are away, late and lost. Repetitions are interleaved; a round is compared with the same round
of the run beside it, the first one left out. Writes `simulations/results/clock.json`.
"""

import argparse
import json
import logging
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import replicated
from rich.console import Console
from rich.table import Table

from fedsplit import simulate
from fedsplit.plan.settings import Settings, check_settings

RESULTS = Path(__file__).parent / "results" / "clock.json"
RECORDS, NODES = 10, 4
KNOWN = {"release-seconds": 2e-5, "gradient-seconds": 2e-5}
PROFILES: dict[str, dict[str, Any]] = {
    "everybody in time": {**KNOWN, "uplink": {"median": 5.0, "sigma": 0.5}, "downlink": 20.0},
    "phones-4g, deadline 5 s": {**KNOWN, "preset": "phones-4g"},
}


def settings_for(devices: int, rounds: int, profile: dict[str, Any] | None) -> Settings:
    """Return a run over devices with a few records each."""
    deadline = {"deadline": 5.0} if profile and "preset" in profile else {}
    return check_settings(
        {
            "run": {"name": "clock", "rounds": rounds, "engine": "inline"},
            "data": {"builder": "replicated:device", "task": "classification", "outputs": 7},
            "devices": {
                "count": devices,
                "per-node": -(-devices // NODES),
                "test": [0],
                **({"profile": profile} if profile else {}),
            },
            "model": {"name": "mlp", "width": 256},
            "dropping": {"policy": "random", "keep": 0.25},
            "protocol": {"mode": "pipelined", **deadline},
        }
    )


def rounds_of(settings: Settings) -> list[float]:
    """Simulate; return the seconds of each round but the first."""
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        simulate(settings, out=folder, report=lambda metrics: seconds.append(metrics["seconds"]))
    return seconds[1:]


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    os.environ[replicated.RECORDS] = str(RECORDS * arguments.devices)
    ratios: dict[str, list[float]] = {name: [] for name in PROFILES}
    plain: list[float] = []
    for _ in range(arguments.repeats):
        without = rounds_of(settings_for(arguments.devices, arguments.rounds, None))
        plain += without
        for name, profile in PROFILES.items():
            found = rounds_of(settings_for(arguments.devices, arguments.rounds, profile))
            ratios[name] += [mine / other for mine, other in zip(found, without, strict=True)]
    table = Table(title=f"{arguments.devices:,} devices, a round without a profile: {median(plain):.2f} s")
    for column in ("profile", "round, times that without", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "profile" else "right")
    for name, values in ratios.items():
        table.add_row(name, *(f"{value:.3f}" for value in (median(values), min(values), max(values))))
    Console().print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"devices": arguments.devices, "plain": plain, "ratios": ratios}, indent=2) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
