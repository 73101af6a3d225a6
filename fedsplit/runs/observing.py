"""Who is told of a run while it goes on: what each of its files needs, the one who started it, and a user's own."""

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit.common.errors import ConfigError, FedsplitError, RunError
from fedsplit.common.figures import is_number
from fedsplit.common.files import put
from fedsplit.common.plugins import resolve_function
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.pictures import draw_curves
from fedsplit.server.checkpoint import save_checkpoint
from fedsplit.server.rounds import SplitStrategy

log = logging.getLogger(__name__)
Figures = dict[str, Any]
Report = Callable[[Figures], None]


@dataclass(frozen=True)
class Begun:
    """A run that begins, or goes on.

    Attributes
    ----------
    name : str
        As in ``run.name``.
    folder : Path
        The run folder; an observer may write files of its own there.
    settings : dict
        By dotted key, defaults included; what has no value is not there.
    rounds : int
        How many the whole run has.
    done : int
        How many of them are behind it; 0 at a beginning.
    """

    name: str
    folder: Path
    settings: Figures
    rounds: int
    done: int


class Observer:
    """Is told of a run on the server, where it trains; derive from it, and override what is of interest.

    It is made without arguments, and gets figures: never a record, a release or a weight. What it gets is its own copy.
    """

    def start(self, run: Begun) -> None:
        """Take note that a run begins, or goes on.

        Of a run that goes on, rounds after ``run.done`` may have been told before it was stopped: they come again.
        """

    def evaluation(self, figures: Figures) -> None:
        """Take note of a test: ``round`` and the scores; told before that round."""

    def round(self, figures: Figures) -> Mapping[str, float] | None:
        """Take note of a round: what its line in ``metrics.jsonl`` will hold.

        Returns
        -------
        dict or None
            Figures that join them, by names of their own; the last of each are in ``result.json``, too.
        """

    def end(self, result: Figures | None) -> None:
        """Take note of the end: what ``result.json`` holds, or None if the run has stopped before it."""


class Several(Observer):
    """Observers that are told one after another; each hears of figures what those before it have added."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def start(self, run: Begun) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.start(run)

    def evaluation(self, figures: Figures) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.evaluation(figures)

    def round(self, figures: Figures) -> dict[str, float]:
        """Tell all, and return what they have added together."""
        added: dict[str, float] = {}
        for observer in self._observers:
            added |= observer.round(figures | added) or {}
        return added

    def end(self, result: Figures | None) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.end(result)


class Outside(Observer):
    """One that ``run.observers`` names: what it raises does not end the run, which goes on without it.

    An error of fedsplit's own is meant, and ends the run as any other does.

    Parameters
    ----------
    reference : str
        ``module:Class``.

    Raises
    ------
    ConfigError
        If there is no such class, it is no :class:`Observer`, or cannot be made.
    """

    def __init__(self, reference: str) -> None:
        self._name = reference
        kind = resolve_function(reference, "run.observers", "class")
        if not (isinstance(kind, type) and issubclass(kind, Observer)):
            raise ConfigError(f"run.observers {reference!r} must be derived from fedsplit.Observer")
        try:
            self._observer: Observer | None = kind()
        except Exception as error:
            raise ConfigError(f"run.observers {reference!r}: making one raised {_said(error)}") from None

    def start(self, run: Begun) -> None:
        """Tell it."""
        self._tell("start", run)

    def evaluation(self, figures: Figures) -> None:
        """Tell it."""
        self._tell("evaluation", figures)

    def round(self, figures: Figures) -> dict[str, float]:
        """Tell it, and return what it adds."""
        added = self._tell("round", figures)
        if added is None:
            return {}
        if not _can_join(added, figures):
            self._drop("its round must return numbers by names that are not taken")
            return {}
        return dict(added)

    def end(self, result: Figures | None) -> None:
        """Tell it."""
        self._tell("end", result)

    def _tell(self, what: str, told: object) -> Any:
        if self._observer is None:
            return None
        try:
            return getattr(self._observer, what)(copy.deepcopy(told))
        except FedsplitError:
            raise
        except Exception as error:
            self._drop(f"its {what} raised {_said(error)}")
            return None

    def _drop(self, why: str) -> None:
        self._observer = None
        log.warning("observer %s is told nothing more: %s", self._name, why)


def _said(error: Exception) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _can_join(added: object, figures: Figures) -> bool:
    if not isinstance(added, Mapping):
        return False
    return all(isinstance(k, str) and k not in figures and is_number(v) for k, v in added.items())


class Checkpoint(Observer):
    """Writes the checkpoint after each round.

    Parameters
    ----------
    folder : RunFolder
    strategy : SplitStrategy
    seconds : callable
        Returns how long the run has trained.
    """

    def __init__(self, folder: RunFolder, strategy: SplitStrategy, seconds: Callable[[], float]) -> None:
        self.done = 0
        """The round of the last checkpoint."""
        self._folder, self._strategy, self._seconds = folder, strategy, seconds

    def start(self, run: Begun) -> None:
        """Note how many rounds are done."""
        self.done = run.done

    def round(self, figures: Figures) -> None:
        """Write it."""
        with self.writing():
            save_checkpoint(self._folder.checkpoint, self._strategy, self._seconds())
        self.done = figures["round"]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raise RunError where a file cannot be written: with what there is to go on from."""
        try:
            yield
        except OSError as error:
            left = f"the checkpoint of round {self.done} is the last" if self.done else "no round is done"
            raise RunError(f"{self._folder.path} cannot be written ({error.strerror}): {left}") from None


class Lines(Observer):
    """Writes a line of JSON for each round."""

    def __init__(self, folder: RunFolder, checkpoint: Checkpoint) -> None:
        self._path, self._checkpoint = folder.metrics, checkpoint

    def start(self, run: Begun) -> None:
        """Cut off rounds after the checkpoint: they will be written again."""
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            put(self._path, "".join(lines[: run.done]))

    def round(self, figures: Figures) -> None:
        """Write its line."""
        with self._checkpoint.writing(), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")


class Nodes(Observer):
    """Writes what the server has seen of each node, as they come and after each round."""

    def __init__(self, folder: RunFolder, strategy: SplitStrategy, checkpoint: Checkpoint) -> None:
        self._path, self._strategy, self._checkpoint = folder.nodes, strategy, checkpoint

    def note(self) -> None:
        """Write it as it is now."""
        with self._checkpoint.writing():
            put(self._path, json.dumps(self._strategy.roster.rows(), indent=2) + "\n")

    def round(self, figures: Figures) -> None:
        """Write it."""
        self.note()


class Curves(Observer):
    """Draws the run's curves at its end."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def end(self, result: Figures | None) -> None:
        """Draw them, of a run that has come to its end."""
        if result is not None:
            with self._folder.writing():
                draw_curves(self._folder)


class Reporting(Observer):
    """Calls a function after every round that is saved; what it raises ends the run."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def round(self, figures: Figures) -> None:
        """Call it."""
        self._report(figures)
