"""How long a simulation takes to its first exchange, beside a bare Ray that imports torch.

    python -m simulations startup --devices 1000 --repeats 5

Both are new processes, timed from their start: the bare one starts a local Ray, makes an actor for each core and
imports torch in all of them; fedsplit's goes on until its nodes have registered, with 100 records for each device.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from fedsplit.common.errors import RunError
from simulations.scale import settings_for
from simulations.shared.options import option
from simulations.shared.processes import importing_studies
from simulations.shared.replicated import RECORDS
from simulations.shared.results import Results
from simulations.shared.tables import markdown

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}  # as fedsplit sets them
BARE = """
import os, ray
ray.init(address="local", include_dashboard=False, log_to_driver=False)
@ray.remote(num_cpus=1)
class Actor:
    def load(self):
        import torch
        return torch.__version__
actors = [Actor.remote() for _ in range(int(ray.cluster_resources()["CPU"]))]
ray.get([actor.load.remote() for actor in actors])
print("ready", flush=True)
ray.shutdown()
"""
FEDSPLIT = """
import sys, tempfile
from fedsplit.runs import simulation
def prepared(*arguments, before=simulation._prepared, **more):
    run = before(*arguments, **more)
    def register(grid, register=run.strategy.register):
        register(grid)
        print("ready", flush=True)
    run.strategy.register = register
    return run
simulation._prepared = prepared
with tempfile.TemporaryDirectory() as folder:
    simulation.simulate(sys.argv[1], out=folder + "/run")
"""


@dataclass(frozen=True)
class Options:
    """How many devices, and how often."""

    devices: int = option(1000, quick=100)
    repeats: int = option(5, quick=1)


def seconds_to_ready(code: str, *arguments: str, records: int = 0) -> float:
    """Start a process and return the seconds until it says that it is ready; raises RunError."""
    environment = importing_studies(**{RECORDS: str(records)}, **QUIET)
    began = time.perf_counter()
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        found = next((time.perf_counter() - began for line in process.stdout if line.strip() == "ready"), None)
        process.stdout.read()
    if found is None or process.returncode:
        raise RunError(f"a process ended with {process.returncode} before it was ready")
    return found


def study(options: Options) -> Results:
    """Return the seconds of both in pairs, without the first, which reads everything from the disk."""
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "startup.toml"
        config.write_text(settings_for(options.devices, -(-options.devices // 2), 1.0, 1).to_toml(), encoding="utf-8")
        for _ in range(options.repeats + 1):
            bare = seconds_to_ready(BARE)
            pairs.append((bare, seconds_to_ready(FEDSPLIT, str(config), records=100 * options.devices)))
    return {"pairs": pairs[1:]}


def tables(results: Results) -> str:
    """Return the medians of both, and of their ratio."""
    bare, own = (f"{median(column):.1f}" for column in zip(*results["pairs"], strict=True))
    ratios = [own / bare for bare, own in results["pairs"]]
    cells = (f"{value:.2f}" for value in (median(ratios), min(ratios), max(ratios)))
    columns = ("devices", "bare Ray, s", "fedsplit, s", "ratio", "lowest", "highest")
    return markdown(columns, [(f"{results['options']['devices']:,}", bare, own, *cells)])
