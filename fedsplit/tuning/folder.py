"""The study folder: every file of a study has its name here."""

from dataclasses import dataclass
from pathlib import Path

from fedsplit.runs.folder import RunFile, RunFolder


@dataclass(frozen=True)
class StudyFolder:
    """A study's folder. What devices released is in the run folders below ``trials`` alone."""

    path: Path

    database = RunFile("study.db", "tune", "tune, Optuna's own tools")
    lock = RunFile("study.lock", "tune, which holds it", "tune")
    settings = RunFile("study.toml", "tune, at the beginning", "people")
    trials = RunFile("trials", "tune: a run folder for each seed of each trial", "tune")
    front = RunFile("front", "tune, at the end: a settings file for each point", "people")
    results = RunFile("tune.json", "tune, at the end", "people")
    front_picture = RunFile("front.png", "tune, at the end", "people")
    importance_picture = RunFile("importance.png", "tune, at the end", "people")

    def trial(self, number: int) -> Path:
        """Return a trial's folder, from wherever one is."""
        return self.trials.resolve() / f"{number:04d}"

    def runs(self, number: int) -> list[RunFolder]:
        """Return the run folders that a trial has so far."""
        return [RunFolder(path) for path in sorted(self.trial(number).glob("seed-*"))]


def seed_folder(trial: Path, seed: int) -> Path:
    """Return the run folder of one of a trial's seeds."""
    return trial / f"seed-{seed}"
