"""How long a simulation takes to its first exchange, beside a bare Ray that imports torch.

    python simulations/startup.py --devices 1000 --repeats 5

Both are new processes, timed from their start: the bare one starts a local Ray, makes an actor for each core and
imports torch in all of them; fedsplit's goes on until its nodes have registered, with 100 records for each device.
Writes `startup.json` to `simulations/results/startup`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "startup"
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
CONFIG = """
run = {rounds = 1}
data = {builder = "replicated:device", task = "classification", outputs = 7}
devices = {count = %d, per-node = %d, test = [0]}
model = {name = "mlp", width = 256}
dropping = {policy = "random", keep = 0.25}
protocol = {mode = "pipelined"}
"""


def seconds_to_ready(code: str, *arguments: str, records: int = 0) -> float:
    """Start a process and return the seconds until it says that it is ready."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "REPLICATED_RECORDS": str(records), **QUIET}
    began = time.perf_counter()
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        found = next((time.perf_counter() - began for line in process.stdout if line.strip() == "ready"), None)
        process.stdout.read()
    if found is None or process.returncode:
        raise SystemExit(f"a process ended with {process.returncode} before it was ready")
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    pairs: list[tuple[float, float]] = []
    devices = arguments.devices
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "startup.toml"
        config.write_text(CONFIG % (devices, -(-devices // 2)), encoding="utf-8")
        for _ in range(arguments.repeats + 1):
            bare = seconds_to_ready(BARE)
            pairs.append((bare, seconds_to_ready(FEDSPLIT, str(config), records=100 * devices)))
    pairs = pairs[1:]  # the first reads everything from the disk
    bare, own, ratio = (median(v) for v in zip(*((b, f, f / b) for b, f in pairs), strict=True))
    found = {"devices": devices, "bare": bare, "fedsplit": own, "ratio": ratio, "pairs": pairs}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "startup.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"bare Ray {bare:.1f} s, fedsplit at {devices:,} devices {own:.1f} s: {ratio:.2f} times")


if __name__ == "__main__":
    main()
