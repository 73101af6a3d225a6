"""Runs side by side: what their folders hold, which settings differ, and the points of a plot."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.common.figures import AXES, FIGURES, SCORES, SHOWN, figure, others
from fedsplit.plan.settings import load_settings
from fedsplit.runs.folder import RunFolder

Figures = dict[str, int | float]
Point = tuple[float, float]

_OPTIONAL = "simulated_seconds"  # which only runs with a profile have


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Attributes
    ----------
    label : str
        How the run is called beside the others.
    folder : Path
    settings : dict
        By dotted key, defaults included; what has no value is not there.
    finished : bool
        Whether there is a result; else ``figures`` are those of the last round that is done.
    figures : dict
        Those in :data:`fedsplit.common.figures.SHOWN` that are known, and then those that are not in the table.
    rounds : list of dict
        The figures of each round.
    """

    label: str
    folder: Path
    settings: dict[str, Any]
    finished: bool
    figures: Figures
    rounds: list[Figures]

    @property
    def planned(self) -> int:
        """How many rounds the whole run has."""
        return int(self.settings["run.rounds"])

    @property
    def done(self) -> int:
        """How many rounds are done."""
        return self.planned if self.finished else len(self.rounds)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the folders of two runs or more, finished or not.

    A run is called by its folder's name, or by the path as given where two folders have the same name.

    Raises
    ------
    ConfigError
        If there are fewer than two, or one is given twice.
    DataError
        If one is no run folder, or a file in it is damaged.
    """
    if len(folders) < 2:
        raise ConfigError(f"compare takes at least 2 run folders, got {len(folders)}")
    real = [os.path.realpath(folder) for folder in folders]
    for number, folder in enumerate(folders):
        if real[number] in real[:number]:
            raise ConfigError(f"run folder {folder} is given twice")
    names = [os.path.basename(path) for path in real]
    labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    return [_read_run(label, folder) for label, folder in zip(labels, folders, strict=True)]


def _read_run(label: str, folder: Path) -> Run:
    run = RunFolder(folder)
    if _text(run.config) is None:
        raise DataError(f"{folder} is not a run folder: it has no {run.config.name}")
    try:
        settings = load_settings(run.config)
    except ConfigError as error:
        raise DataError(f"run {folder}: {error}") from None
    rounds = list(_rounds(run.metrics))
    result = _result(run.result)
    figures = _so_far(rounds) if result is None else result
    return Run(label, folder, settings.flat(), result is not None, figures | _audit(run.report), rounds)


def _rounds(path: Path) -> Iterator[Figures]:
    """Yield the figures of each round; what follows the last line's end is only half written."""
    for number, line in enumerate((_text(path) or "").split("\n")[:-1], start=1):
        where = f"{path} is damaged in line {number}"
        found = _parsed(line, where)
        names = [name for name, known in FIGURES.items() if known.shown or known.place == "round"]
        figures = {name: value for name in names if (value := _number(where, found, name)) is not None}
        if "round" not in figures:
            raise DataError(f"{where}: it has no round")
        yield figures | {name: found[name] for name in others(found)}


def _so_far(rounds: list[Figures]) -> Figures:
    """Return the figures of an unfinished run: the latest of each, and the seconds of all rounds."""
    latest: Figures = {}
    for figures in rounds:
        latest |= figures | {"seconds": latest.get("seconds", 0) + figures.get("seconds", 0)}
    return {name: latest[name] for name in latest if figure(name).shown}


def _result(path: Path) -> Figures | None:
    """Return the figures of ``result.json``, None if there is no such file."""
    if (found := _object(path)) is None:
        return None
    return _known(path, found, "result") | {name: found[name] for name in others(found)}


def _audit(path: Path) -> Figures:
    return _known(path, _object(path) or {}, "audit")


def _object(path: Path) -> dict[str, Any] | None:
    text = _text(path)
    return None if text is None else _parsed(text, f"{path} is damaged")


def _known(path: Path, found: dict[str, Any], place: str) -> Figures:
    wanted = {known.name: known.keys for known in SHOWN if known.place == place}
    where = f"{path} is damaged"
    return {name: value for name, keys in wanted.items() if (value := _number(where, found, *keys)) is not None}


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is damaged: it is not text") from None


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{where}: it must be a JSON object")
    return found


def _number(where: str, found: Any, *keys: str) -> int | float | None:
    """Return a number, None if there is none or it is not finite; raises DataError for anything else."""
    for key in keys:
        if not isinstance(found, dict):
            raise DataError(f"{where}: {keys[0]} must be a table, got {shortened(found)}")
        if (found := found.get(key)) is None:
            return None
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise DataError(f"{where}: {'.'.join(keys)} must be a number, got {shortened(found)}")
    return found if abs(found) <= sys.float_info.max else None


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the settings that differ: by dotted key each run's value, None where it has none.

    The runs' names are left out unless nothing else differs.
    """
    keys = sorted({key for run in runs for key in run.settings})
    values = {key: [run.settings.get(key) for run in runs] for key in keys}
    found = {key: each for key, each in values.items() if any(value != each[0] for value in each)}
    if len(found) > 1:
        found.pop("run.name", None)
    return found


def as_json(runs: Sequence[Run], plot: Path | None) -> str:
    """Return in one line of JSON what the tables and the notes say, and where the plot is."""
    rows = [
        {
            "label": run.label,
            "folder": str(run.folder),
            "finished": run.finished,
            "rounds": {"done": run.done, "planned": run.planned},
            **{name: run.figures.get(name) for name in listed(runs)},
        }
        for run in runs
    ]
    found = {"runs": rows, "settings": differing(runs), "notes": notes(runs), "plot": str(plot) if plot else None}
    return json.dumps(found, default=str)  # a date may stand in [first-layer.args]


def listed(runs: Sequence[Run]) -> list[str]:
    """Return the names of the figures that are told of runs, in their order: those in the table, then others."""
    known = [known.name for known in SHOWN]
    return list(dict.fromkeys([*known, *(name for run in runs for name in run.figures)]))


def notes(runs: Sequence[Run]) -> list[str]:
    """Say which runs are missing in which part of the plot: earlier versions noted neither bytes nor exposures."""
    found = []
    for run in runs:
        missing = [x.axis.short for x in AXES if x.axis and x.name != _OPTIONAL and not any(curves(run, x.name))]
        if missing:
            found.append(
                f"{run.label} is not plotted over {' and '.join(missing)}: its {RunFolder.metrics.name} holds none"
            )
    return found


def curves(run: Run, over: str) -> tuple[list[Point], list[Point]]:
    """Return what is plotted of a run over one of :data:`fedsplit.common.figures.AXES`: points in training and test.

    In the test accuracy, or AUC or R² of other tasks; in training accuracy, only where the test alone makes no curve.
    """
    known = [figures for figures in run.rounds if over in figures]
    train = [(m[over], m["train_accuracy"]) for m in known if "train_accuracy" in m]
    test = [(m[over], m[score.name]) for m in known for score in SCORES if score.name in m]
    return ([] if len(test) > 1 else train), test
