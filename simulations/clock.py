"""What a virtual clock adds to the real time of a round with many devices.

    python -m simulations clock --devices 10000

The same pipelined run (10 records on each device, all of them in every round) in this process, without a profile and
with profiles: one in which everybody is there and in time, so that the work is the same, and the phones' with a
deadline, where devices are away, late and lost. Repetitions are interleaved; a round is compared with the same round
of the run beside it, the first one left out.
"""

import os
import tempfile
from dataclasses import dataclass
from statistics import median
from typing import Any

from fedsplit import simulate
from fedsplit.plan.settings import Settings, check_settings
from simulations.shared import replicated
from simulations.shared.options import option
from simulations.shared.results import Results
from simulations.shared.tables import markdown, page
from simulations.shared.workers import quiet

RECORDS, NODES = 10, 4
KNOWN = {"release-seconds": 2e-5, "gradient-seconds": 2e-5}
PROFILES: dict[str, dict[str, Any]] = {
    "everybody in time": {**KNOWN, "uplink": {"median": 5.0, "sigma": 0.5}, "downlink": 20.0},
    "phones-4g, deadline 5 s": {**KNOWN, "preset": "phones-4g"},
}


@dataclass(frozen=True)
class Options:
    """How many devices, and how often."""

    devices: int = option(10_000, quick=200)
    rounds: int = option(6, quick=3)
    repeats: int = option(3, quick=1)


def settings_for(options: Options, profile: dict[str, Any] | None) -> Settings:
    """Return a run over devices with a few records each."""
    deadline = {"deadline": 5.0} if profile and "preset" in profile else {}
    return check_settings(
        {
            "run": {"name": "clock", "rounds": options.rounds, "engine": "inline"},
            "data": replicated.DATA,
            "devices": {
                "count": options.devices,
                "per-node": -(-options.devices // NODES),
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


def study(options: Options) -> Results:
    """Return the rounds' seconds without a profile, and each profile's ratios to them."""
    quiet()
    os.environ[replicated.RECORDS] = str(RECORDS * options.devices)
    ratios: dict[str, list[float]] = {name: [] for name in PROFILES}
    plain: list[float] = []
    for _ in range(options.repeats):
        without = rounds_of(settings_for(options, None))
        plain += without
        for name, profile in PROFILES.items():
            found = rounds_of(settings_for(options, profile))
            ratios[name] += [mine / other for mine, other in zip(found, without, strict=True)]
    return {"plain": plain, "ratios": ratios}


def tables(results: Results) -> str:
    """Return what a round with each profile takes, in rounds without one."""
    said = f"{results['options']['devices']:,} devices; a round without a profile: {median(results['plain']):.2f} s"
    rows = [
        (name, *(f"{value:.3f}" for value in (median(values), min(values), max(values))))
        for name, values in results["ratios"].items()
    ]
    return page(said, markdown(("profile", "round, times that without", "lowest", "highest"), rows))
