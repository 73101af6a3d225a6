"""Runs with a fault in their middle, beside undisturbed ones."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from fedsplit.common.errors import RunError
from fedsplit.device.home import Home
from fedsplit.plan.settings import load_settings
from fedsplit.runs.folder import read_nodes
from fedsplit.runs.simulation import simulate
from simulations.deployment import CONFIG, add_nodes, sets
from simulations.faults.cases import CASES, FAULTY, Case, cut
from simulations.faults.machine import clocks, faketime_installed, small_disk
from simulations.shared.network import namespaces_permitted
from simulations.shared.options import option
from simulations.shared.processes import Deployment, deployment
from simulations.shared.results import Results

NAMES = tuple(case.name for case in CASES)
DISK, CLOCKS = "disk full", "wrong clocks"
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Which faults, and how often."""

    seeds: int = option(3, quick=1, help="one run differs from another by more than a point: 749 records are tested")
    cases: tuple[str, ...] = option(
        (*NAMES, DISK, CLOCKS), quick=("node's pending state lost",), choices=(*NAMES, DISK, CLOCKS)
    )
    length: float = option(1.0, quick=0.25, help="of the runs, in parts of their full length")
    most: float = option(2.0, quick=100.0, help="points of accuracy that a fault may cost, in the mean over seeds")


def study(options: Options) -> Results:
    """Inject all faults that this machine permits; raises RunError if an outcome is not as it should be."""
    with TemporaryDirectory() as folder:
        trials = Trials(Path(folder), namespaces_permitted(), options)
        rows = [row for case in CASES if case.name in options.cases for row in trials.rows(case)]
        if DISK in options.cases:
            rows.append(trials.disk())
        wrong = clocks(Path(folder) / "clocks") if CLOCKS in options.cases and faketime_installed() else {}
    return {"rows": rows, "clocks": wrong}


class Trials:
    """All cases, in folders below one.

    Parameters
    ----------
    folder : Path
    namespaces : bool
        Whether this user may make network namespaces.
    options : Options
    """

    def __init__(self, folder: Path, namespaces: bool, options: Options) -> None:
        self._folder, self._namespaces, self._options = folder, namespaces, options
        self._bases: dict[tuple[tuple[str, ...], int], float] = {}

    def rows(self, case: Case) -> list[Row]:
        """Return what became of a case, for each seed."""
        if case.inject is cut and not self._namespaces:
            return [{"case": case.name, "outcome": "not run: it needs network namespaces (root and iproute2)"}]
        case = case.shorter(self._options.length)
        seeds = range(self._options.seeds if case.goes_on else 1)  # one that is resumed has nothing to do with chance
        found = []
        for seed in seeds:
            row = run_case(case, self._folder / f"{NAMES.index(case.name)}-{seed}", self._namespaces, seed)
            found.append(judged(row, self._undisturbed(case.settings, seed)))
            print(found[-1], file=sys.stderr)
        gaps = [row["gap"] for row in found]
        if abs(mean(gaps)) > self._options.most or (not case.goes_on and gaps != [0.0]):
            raise RunError(f"{case.name}: the accuracy is too far off: {gaps} points")
        return found

    def disk(self) -> Row:
        """Return what became of a run on a disk that was full."""
        if not self._namespaces:
            return {"case": DISK, "outcome": "not run: it needs root, to mount a small file system"}
        return judged(disk_full(self._folder / "disk"), self._undisturbed(FAULTY, 0))

    def _undisturbed(self, settings: tuple[str, ...], seed: int) -> float:
        """Return the accuracy of the simulation, which is that of the deployment."""
        if (settings, seed) not in self._bases:
            chosen = load_settings(CONFIG, [*settings, f"run.seed={seed}", 'run.engine="inline"'])
            out = self._folder / f"undisturbed-{len(self._bases)}"
            self._bases[settings, seed] = float(simulate(chosen, out=out)["test_accuracy"])
        return self._bases[settings, seed]


def run_case(case: Case, folder: Path, namespaces: bool, seed: int) -> Row:
    """Run the wearables config with a fault in its middle; go on with ``--resume`` where it ends the run."""
    own = (*case.settings, f"run.seed={seed}")
    with deployment(folder, namespaces=namespaces) as trial:
        names = add_nodes(trial, load_settings(CONFIG, own))
        trial.run(CONFIG, "run", *sets(own))
        trial.wait_for_round("run", case.at)
        seen = case.inject(trial)
        outcome = "goes on" if case.goes_on else resumed(trial, "run", own)
        result = trial.result("run")
        _check_log(case, trial)
        spent = ledgers(trial, names)
    return {"case": case.name, "seen": seen, "outcome": outcome, **spent, **_figures(result)}


def disk_full(folder: Path) -> Row:
    """Run with a run folder on a file system that fills up; give it room, and go on."""
    with deployment(folder, namespaces=True) as trial, small_disk(trial.folder / "disk") as grow:
        names = add_nodes(trial, load_settings(CONFIG, FAULTY))
        trial.run(CONFIG, "disk/run", *sets(FAULTY))
        outcome = resumed(trial, "disk/run", FAULTY, grow)
        result = trial.result("disk/run")
        spent = ledgers(trial, names)
    return {"case": DISK, "seen": "", "outcome": outcome, **spent, **_figures(result)}


def resumed(trial: Deployment, out: str, own: Sequence[str], before: Callable[[], None] = lambda: None) -> str:
    """Wait until a run has ended itself, and resume it; return what was seen."""
    if trial.processes[out].wait(120) != 2:
        raise RunError(f"the run did not end with exit code 2: {trial.log(out)}")
    said, done = trial.log(out).strip().splitlines()[-1], trial.rounds(out)
    before()
    trial.run(CONFIG, out, "--resume", *sets(own))
    return f"stops after round {done} ({said.removeprefix('fedsplit: ')}); --resume ends it"


def _check_log(case: Case, trial: Deployment) -> None:
    """Check that somebody has said what is wrong, and that the node is there at the end, or not."""
    if case.log and case.log not in trial.run_log("run") + trial.log("run"):
        raise RunError(f"{case.name}: nobody said {case.log!r}")
    nodes = read_nodes(trial.folder / "run")
    there = "0-4" in [row["devices"] for row in nodes if row["state"] == "connected"]
    if there != case.returns:
        raise RunError(f"{case.name}: the node should{'' if case.returns else ' not'} be there at the end")


def ledgers(trial: Deployment, names: Sequence[str]) -> dict[str, int]:
    """Return how many training records have left the nodes, and the most often that one of them has."""
    releases = [spent.releases for name in names for _, spent in Home(trial.folder / name).accountant("train").rows()]
    return {"left": len(releases), "most": max(releases, default=0)}


def _figures(result: Row) -> Row:
    return {"accuracy": result["test_accuracy"], "samples": result["samples"]}


def judged(row: Row, undisturbed: float) -> Row:
    """Return a row with by how many points of accuracy it is off; raises RunError if a record left twice."""
    if row["most"] > 1 or row["left"] < row["samples"]:
        raise RunError(f"{row['case']}: the ledgers are wrong: {row}")
    return {**row, "undisturbed": undisturbed, "gap": 100 * (row["accuracy"] - undisturbed)}
