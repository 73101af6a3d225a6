"""A real deployment on this machine: is it as the simulation, and what do faults do to it.

    python simulations/deployment.py             # the same parameters and accuracy as the simulation?
    python simulations/deployment.py --faults    # injects every fault that docs/deployment.md lists

A SuperLink with TLS and keys, four nodes as processes of their own with the wearables data in folders of their own,
and, where it is permitted (root), in network namespaces of their own.
"""

import argparse
import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from processes import Deployment, deployment, namespaces_permitted
from safetensors.numpy import load_file

from fedsplit.device.home import Home
from fedsplit.plan.settings import Settings, load_settings
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.simulation import simulate

CONFIG = Path(__file__).parent.parent / "configs" / "wearables.toml"
NODES = 4
EXACT = (
    "run.rounds=5",
    'protocol.mode="pipelined"',
    'protocol.chunk="epoch"',
    'protocol.dtype="float32"',
    'first-layer.strategy="FedAvg"',
    "first-layer.lr=0.1",
    'trunk.optimizer="sgd"',
    "trunk.lr=0.05",
)
EPOCHS = ("run.rounds=15", 'protocol.mode="pipelined"', 'protocol.chunk="epoch"')
TIMEOUT = 8.0  # seconds that a message may take while faults are injected
FAULTY = ("data.overlap=false", f"protocol.timeout={TIMEOUT}", "protocol.max-staleness=3")
SEEDS = 3  # one run differs from another by more than a point, whatever the difference: 749 records are tested
MOST = 2.0  # points of accuracy that a fault may cost, in the mean over the seeds


def sets(overrides: tuple[str, ...]) -> list[str]:
    """Return overrides as options of a command."""
    return [part for override in overrides for part in ("--set", override)]


def add_nodes(trial: Deployment, settings: Settings, *, warm: bool = True) -> list[str]:
    """Make and start four nodes with five devices each."""
    names = [f"n{number}" for number in range(NODES)]
    for name, devices in zip(names, np.array_split(np.arange(20), NODES), strict=True):
        trial.make_node(name, devices.tolist(), settings)
        trial.start_node(name, warm=warm)
    return names


def difference(one: Path, other: Path) -> float:
    """Return the largest difference of any parameter between two run folders."""
    found = 0.0
    for half in ("first_layer", "trunk"):
        a, b = (load_file(folder / "checkpoint" / f"{half}.safetensors") for folder in (one, other))
        found = max(found, *(float(np.abs(a[name] - b[name]).max(initial=0)) for name in a))
    return found


def compare(folder: Path, namespaces: bool) -> None:
    """Run two settings as simulation and as deployment, and print what differs."""
    runs = (
        ("SGD, FedAvg, float32, 5 rounds", EXACT),
        ("pipelined, 15 whole epochs", EPOCHS),
        ("as shipped", ()),
    )
    for title, overrides in runs:
        settings = load_settings(CONFIG, [*overrides, "devices.per-node=5"])
        place = folder / title.split(",")[0].replace(" ", "-")
        with deployment(place, namespaces=namespaces) as trial:
            add_nodes(trial, settings)
            began = time.monotonic()
            trial.run(CONFIG, "run", *sets((*overrides, "devices.per-node=5")))
            real = trial.result("run")
            total = time.monotonic() - began
            options = sets((*overrides, "devices.per-node=5"))
            trial.fedsplit("simulate", str(CONFIG), "--out", "simulation", "--json", *options)
        simulated = json.loads((place / "simulation" / "result.json").read_text())
        print(f"{title}:")
        print(f"  largest difference of a parameter   {difference(place / 'run', place / 'simulation'):.2g}")
        print(f"  test accuracy: simulated, deployed  {simulated['test_accuracy']:.4f}, {real['test_accuracy']:.4f}")
        seconds = simulated["seconds"]["training"], real["seconds"]["training"]
        print(f"  training: simulated, deployed       {seconds[0]:.1f} s, {seconds[1]:.1f} s; with all {total:.1f} s")
        print(f"  exchanges, bytes up                 {real['exchanges']}, {real['bytes_up']:,}", flush=True)


# ------------------------------------------------------------------------------------------------- faults


@dataclass
class Case:
    """A fault while a run is on, and what it is expected to do.

    ``inject`` is called after round ``at`` of ``rounds`` and returns a word on what was seen; ``log`` must be in the
    run's log; ``returns`` tells whether the node is there at the end.
    """

    name: str
    inject: Callable[[Deployment], str]
    goes_on: bool = True
    log: str = ""
    at: int = 15
    returns: bool = True
    rounds: int = 60

    @property
    def settings(self) -> tuple[str, ...]:
        """What it changes of the settings."""
        return (*FAULTY, f"run.rounds={self.rounds}")


def kill_node(trial: Deployment) -> str:
    """Kill a node for good."""
    trial.kill("n0")
    return "5 devices gone for good"


def kill_and_return(trial: Deployment) -> str:
    """Kill a node and start it again with its key, which Flower refuses while it takes the old one for online."""
    trial.kill("n0")
    began = time.monotonic()
    trial.start_node("n0")
    said = trial.log("n0").count("connected to")
    while trial.log("n0").count("connected to") == said:
        time.sleep(0.2)
    return f"back after {time.monotonic() - began:.0f} s"


def hang(trial: Deployment) -> str:
    """Stop a node for longer than a message may take, then let it go on."""
    trial.signal("n0", signal.SIGSTOP)
    time.sleep(2 * TIMEOUT)
    trial.signal("n0", signal.SIGCONT)
    return f"hung for {2 * TIMEOUT:.0f} s"


def lose_state(trial: Deployment) -> str:
    """Delete what a node has kept for the backward half."""
    home, lost = trial.folder / "n0" / "runs", 0
    while not lost:
        lost = sum(path.unlink() is None for path in home.glob("*/pending-*.npz"))
    return "pending chunk deleted"


def cut(trial: Deployment) -> str:
    """Take a node's link down for a while."""
    trial.link("n0", "down")
    time.sleep(2 * TIMEOUT)
    trial.link("n0", "up")
    return f"cut for {2 * TIMEOUT:.0f} s"


def kill_serverapp(trial: Deployment) -> str:
    """Kill the process that trains."""
    subprocess.run(["kill", "-9", str(trial.serverapp())], check=True)
    return "process that trains killed"


def kill_superlink(trial: Deployment) -> str:
    """Kill the SuperLink and start it again."""
    trial.kill("server")
    time.sleep(3)
    trial.start_server()
    return "SuperLink killed and restarted"


CASES = [
    # late, since what its devices would still have given is lost
    Case("node killed", kill_node, log="(devices 0-4) has not answered", at=48, returns=False),
    # of more rounds, since nobody waits for a node that is away for half a minute: it would miss a short run
    Case("node killed, returns with its key", kill_and_return, log="(devices 0-4) has not answered", at=40, rounds=150),
    Case("node hangs", hang, log="has not answered", at=40, rounds=150),
    Case("node's pending state lost", lose_state, log="has lost its pending chunk"),
    Case("network cut and restored", cut, log="has not answered", at=40, rounds=150),
    Case("server process killed", kill_serverapp, goes_on=False, log="was killed"),
    Case("SuperLink killed and restarted", kill_superlink, goes_on=False),
]


def ledgers(trial: Deployment, names: list[str]) -> tuple[int, int]:
    """Return how many training records have left the nodes, and the most that one of them has."""
    releases = [spent.releases for name in names for _, spent in Home(trial.folder / name).accountant("train").rows()]
    return len(releases), max(releases, default=0)


def undisturbed(folder: Path, settings: tuple[str, ...]) -> list[float]:
    """Return the accuracy of the simulation, which is that of the deployment, for each seed."""
    found = []
    for seed in range(SEEDS):
        chosen = load_settings(CONFIG, [*settings, f"run.seed={seed}", 'run.engine="inline"'])
        found.append(float(simulate(chosen, out=folder / str(seed))["test_accuracy"]))
    return found


def run_case(case: Case, folder: Path, namespaces: bool, seed: int) -> dict[str, Any]:
    """Run the wearables config with a fault in its middle; go on with ``--resume`` where it ends the run."""
    settings = load_settings(CONFIG, [*case.settings, f"run.seed={seed}"])
    options = sets((*case.settings, f"run.seed={seed}"))
    with deployment(folder, namespaces=namespaces) as trial:
        names = add_nodes(trial, settings)
        trial.run(CONFIG, "run", *options)
        trial.wait_for_round("run", case.at)
        seen = case.inject(trial)
        outcome = "goes on"
        if not case.goes_on:
            if trial.processes["run"].wait(120) != 2:
                raise RuntimeError(f"{case.name}: the run did not end with exit code 2: {trial.log('run')}")
            said, done = trial.log("run").strip().splitlines()[-1], trial.rounds("run")
            outcome = f"stops after round {done} ({said.removeprefix('fedsplit: ')}); --resume ends it"
            trial.run(CONFIG, "run", "--resume", *options)
        result = trial.result("run")
        log = trial.run_log("run") + trial.log("run")
        if case.log and case.log not in log:
            raise RuntimeError(f"{case.name}: nobody said {case.log!r}")
        left, most = ledgers(trial, names)
        there = "0-4" in [
            row["devices"] for row in RunFolder(folder / "run").node_rows() if row["state"] == "connected"
        ]
        if there != case.returns:
            raise RuntimeError(f"{case.name}: the node should{'' if case.returns else ' not'} be there at the end")
    return {"case": case.name, "seen": seen, "outcome": outcome, "left": left, "most": most, **result}


def disk_full(folder: Path, namespaces: bool) -> dict[str, Any]:
    """Run with a run folder on a file system that fills up; give it room, and go on."""
    settings = load_settings(CONFIG, FAULTY)
    with deployment(folder, namespaces=namespaces) as trial, small_disk(trial.folder / "disk") as grow:
        names = add_nodes(trial, settings)
        trial.run(CONFIG, "disk/run", *sets(FAULTY))
        if trial.processes["disk/run"].wait(120) != 2:
            raise RuntimeError(f"the run did not end with exit code 2: {trial.log('disk/run')}")
        said, done = trial.log("disk/run").strip().splitlines()[-1], trial.rounds("disk/run")
        grow()
        trial.run(CONFIG, "disk/run", "--resume", *sets(FAULTY))
        result = trial.result("disk/run")
        left, most = ledgers(trial, names)
    outcome = f"stops after round {done} ({said.removeprefix('fedsplit: ')}); with room --resume ends it"
    return {"case": "disk full", "seen": "", "outcome": outcome, "left": left, "most": most, **result}


@contextmanager
def small_disk(place: Path) -> Any:
    """Mount a file system of 700 kB; the value is a function that makes it larger."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(place)], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=50m", str(place)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def clocks(folder: Path) -> list[str]:
    """Start nodes whose clocks are wrong; return what becomes of each."""
    lines = []
    with deployment(folder) as trial:
        for name, shift in (("slow", "-200s"), ("fast", "+60s")):
            trial.make_node(name, [len(lines)])
            preload = {"LD_PRELOAD": faketime_library(), "FAKETIME": shift, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
            before, trial.environment = trial.environment, {**trial.environment, **preload}
            process = trial.start_node(name)
            trial.environment = before
            try:
                trial.wait_for(name, "connected to", timeout=20)
                lines.append(f"clock {shift}: connects")
            except RuntimeError:
                lines.append(f"clock {shift}: exit code {process.poll()}: {trial.log(name).strip().splitlines()[-1]}")
    return lines


def faketime_library() -> str:
    """Return the path of libfaketime (Debian's package faketime)."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not found:
        raise RuntimeError("Debian's package faketime is not installed")
    return str(found[0])


def faults(folder: Path, namespaces: bool) -> None:
    """Inject every fault and print a table; raise RuntimeError if an outcome is not as it should be."""
    bases: dict[tuple[str, ...], list[float]] = {}
    for case in CASES:
        if case.settings not in bases:
            bases[case.settings] = undisturbed(folder / f"undisturbed-{case.rounds}", case.settings)
            accuracies = ", ".join(f"{accuracy:.4f}" for accuracy in bases[case.settings])
            print(f"undisturbed, {case.rounds} rounds: accuracy {accuracies} by seed", flush=True)
    for number, case in enumerate(CASES):
        if case.inject is cut and not namespaces:
            print(f"not run: {case.name} (needs network namespaces: root and iproute2)")
            continue
        seeds = range(SEEDS if case.goes_on else 1)  # one that is resumed has nothing to do with chance
        base = bases[case.settings]
        gaps = [show(run_case(case, folder / f"{number}-{seed}", namespaces, seed), base[seed]) for seed in seeds]
        print(f"    in the mean {np.mean(gaps):+.1f} points", flush=True)
        if abs(np.mean(gaps)) > MOST or (not case.goes_on and gaps != [0.0]):
            raise RuntimeError(f"{case.name}: the accuracy is too far off")
    if namespaces:
        show(disk_full(folder / "disk", namespaces), bases[CASES[0].settings][0])
    else:
        print("not run: disk full (needs root, to mount a small file system)")
    if list(Path("/usr/lib").glob("*/faketime")):
        print("\n".join(clocks(folder / "clocks")))
    else:
        print("not run: clocks (needs Debian's package faketime)")


def show(row: dict[str, Any], undisturbed: float) -> float:
    """Print a case and return by how many points of accuracy it is off; raise RuntimeError if a record left twice."""
    gap = 100 * (row["test_accuracy"] - undisturbed)
    print(f"{row['case']}{': ' if row['seen'] else ''}{row['seen']}\n    {row['outcome']}")
    print(
        f"    accuracy {row['test_accuracy']:.4f} ({gap:+.1f} points), trained on {row['samples']} records, "
        f"{row['left']} have left, none more than {row['most']} time(s)",
        flush=True,
    )
    if row["most"] > 1 or row["left"] < row["samples"]:
        raise RuntimeError("the ledgers are wrong")
    return gap


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", action="store_true", help="inject faults")
    parser.add_argument("--keep", type=Path, help="folder for everything that is written; default: a temporary one")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp())
    try:
        permitted = namespaces_permitted()
        (faults if options.faults else compare)(folder, permitted)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
