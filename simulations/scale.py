"""How a simulation grows with the number of devices: seconds per round, memory of all processes, bytes.

    python simulations/scale.py --devices 100 1000 10000 100000

Each device has 10 records; in a round a fixed cohort takes part, or all devices. Every measurement is a run of its own
on Ray in a new process; memory is the largest sum, while it lasts, of the proportional shares (PSS) of that process
and all below it: driver, Ray's own, actors. "Outside" are the seconds of the process that are not training. Writes a
table, `scale.json` and `scale.png` to `simulations/results/scale`.
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
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "scale"
RECORDS = 10  # of each device
CONFIG = """
run = {{rounds = {rounds}}}
data = {{builder = "replicated:device", task = "classification", outputs = 7}}
devices = {{count = {devices}, per-node = {per_node}, fraction = {fraction}, test = [0]}}
model = {{name = "mlp", width = 256}}
dropping = {{policy = "random", keep = 0.25}}
protocol = {{mode = "pipelined"}}
"""
ASKED_PER_NODE = 2500  # at most: a node's records of a round are in memory together


def memory(pid: int) -> tuple[float, float]:
    """Return the gibibytes that a process has, and those of all below it (Linux)."""
    total, below = 0.0, []
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
        total = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 2**20
        below = [c for task in Path(f"/proc/{pid}/task").glob("*/children") for c in task.read_text().split()]
    except (OSError, StopIteration):
        pass  # ended in the meantime
    return total, sum(sum(memory(int(child))) for child in below)


def measure(devices: int, cohort: int, rounds: int) -> dict[str, Any]:
    """Simulate some rounds of ``cohort`` devices out of all; see :func:`watch`."""
    nodes = max(2, -(-cohort // ASKED_PER_NODE))
    settings = CONFIG.format(rounds=rounds, devices=devices, per_node=-(-devices // nodes), fraction=cohort / devices)
    return {"devices": devices, "cohort": cohort, "nodes": nodes, **watch(settings, RECORDS * devices, rounds)}


def watch(settings: str, records: int, rounds: int) -> dict[str, float]:
    """Simulate in a new process and watch it."""
    with tempfile.TemporaryDirectory() as folder:
        config, out = Path(folder) / "scale.toml", Path(folder) / "run"
        config.write_text(settings, encoding="utf-8")
        command = [sys.executable, "-m", "fedsplit.cli", "simulate", str(config), "--out", str(out)]
        environment = {**os.environ, "PYTHONPATH": str(HERE), "REPLICATED_RECORDS": str(records)}
        driver = others = total = 0.0
        began = time.perf_counter()
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                own, below = memory(process.pid)
                driver, others, total = max(driver, own), max(others, below), max(total, own + below)
                time.sleep(0.25)
        if process.returncode:
            raise SystemExit(f"a run ended with {process.returncode}")
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    middle = [json.loads(line) for line in lines][1:-1]  # the first sends nothing back, the last sends back twice
    return {
        "outside": time.perf_counter() - began - result["seconds"]["training"],
        "round": median(line["seconds"] for line in middle),
        "trunk": median(line["trunk_seconds"] for line in middle),
        "gibibytes": total,
        "driver_gibibytes": driver,
        "other_gibibytes": others,
        "megabytes_up": result["bytes_up"] / rounds / 1e6,
        "megabytes_down": result["bytes_down"] / rounds / 1e6,
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds per round and memory over the number of devices."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for name, chosen in (
        ("fixed cohort", [r for r in rows if r["fixed"]]),
        ("all devices", [r for r in rows if not r["fixed"]]),
    ):
        for axis, key in zip(axes, ("round", "gibibytes"), strict=True):
            axis.loglog([r["devices"] for r in chosen], [r[key] for r in chosen], "o-", label=name)
    for axis, label in zip(axes, ("seconds per round", "GiB in all processes"), strict=True):
        axis.set(xlabel="devices", ylabel=label)
        axis.grid(visible=True, which="both", alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--cohort", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    rows = []
    for fixed in (True, False):
        for devices in arguments.devices:
            cohort = min(arguments.cohort, devices) if fixed else devices
            rounds = arguments.rounds if fixed else 4
            rows.append({**measure(devices, cohort, rounds), "fixed": fixed})
            print(json.dumps(rows[-1]), file=sys.stderr)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "scale.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    draw(rows, RESULTS / "scale.png")
    table = Table(title=f"{RECORDS} records on each device", title_justify="left")
    for name in ("devices", "in a round", "nodes", "outside s", "round s", "GiB", "of it driver", "MB up", "MB down"):
        table.add_column(name, justify="right")
    for r in rows:
        counts = (f"{r[key]:,}" for key in ("devices", "cohort", "nodes"))
        sizes = (f"{r[key]:.2f}" for key in ("round", "gibibytes", "driver_gibibytes"))
        moved = (f"{r[key]:.1f}" for key in ("megabytes_up", "megabytes_down"))
        table.add_row(*counts, f"{r['outside']:.1f}", *sizes, *moved)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
