"""A simulation in a new process, and the memory of all its processes."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from fedsplit.common.errors import RunError
from fedsplit.plan.settings import Settings
from simulations.shared.processes import importing_studies
from simulations.shared.replicated import RECORDS


def memory(pid: int) -> tuple[float, float]:
    """Return the gibibytes that a process has, and those of all below it, by proportional shares (Linux)."""
    total, below = 0.0, []
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
        total = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 2**20
        below = [c for task in Path(f"/proc/{pid}/task").glob("*/children") for c in task.read_text().split()]
    except (OSError, StopIteration):
        pass  # ended in the meantime
    return total, sum(sum(memory(int(child))) for child in below)


def watch(settings: Settings, records: int) -> dict[str, float]:
    """Simulate in a new process, and watch it.

    Parameters
    ----------
    settings : Settings
        Of a run on replicated devices.
    records : int
        Of all devices together.

    Returns
    -------
    dict
        ``outside``: seconds of the process that are not training; ``round`` and ``trunk``: median seconds of a round,
        and of the trunk in it; ``gibibytes``, ``driver_gibibytes`` and ``other_gibibytes``: the most that all
        processes, the first one, and those below it had; ``megabytes_up`` and ``megabytes_down`` of a round.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "settings.toml").write_text(settings.to_toml(), encoding="utf-8")
        command = [sys.executable, "-m", "fedsplit.cli", "simulate", str(folder / "settings.toml")]
        began = time.perf_counter()
        sizes = list(_sizes([*command, "--out", str(folder / "run")], importing_studies(**{RECORDS: str(records)})))
        seconds = time.perf_counter() - began
        found = _figures(folder / "run", seconds, settings.run.rounds)
    own, below = zip(*sizes, strict=True)
    most = {"driver_gibibytes": max(own), "other_gibibytes": max(below)}
    return {**found, "gibibytes": max(map(sum, sizes)), **most}


def _sizes(command: list[str], environment: dict[str, str]) -> Iterator[tuple[float, float]]:
    """Yield the memory of a process, and of those below it, again and again until it ends."""
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            yield memory(process.pid)
            time.sleep(0.25)
    if process.returncode:
        raise RunError(f"a run ended with {process.returncode}")


def _figures(run: Path, seconds: float, rounds: int) -> dict[str, float]:
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    middle = [json.loads(line) for line in lines][1:-1]  # the first sends nothing back, the last sends back twice
    return {
        "outside": seconds - result["seconds"]["training"],
        "round": median(line["seconds"] for line in middle),
        "trunk": median(line["trunk_seconds"] for line in middle),
        "megabytes_up": result["bytes_up"] / rounds / 1e6,
        "megabytes_down": result["bytes_down"] / rounds / 1e6,
    }
