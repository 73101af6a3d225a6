"""One training run on any Grid: the experiment, its rounds, and who is told of them."""

import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid

from fedsplit.common.files import put
from fedsplit.flower.grid import PollingGrid
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from fedsplit.runs.assembly import split_strategy
from fedsplit.runs.beginning import check_startable, choose_subjects, learn_from_public_records
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.observing import (
    Begun,
    Checkpoint,
    Curves,
    Figures,
    Lines,
    Nodes,
    Observer,
    Outside,
    Report,
    Reporting,
    Several,
)
from fedsplit.runs.outcome import Stopwatch, outcome
from fedsplit.server.checkpoint import load_checkpoint
from fedsplit.server.roster import Owners
from fedsplit.server.rounds import SplitStrategy

_SO_FAR = ("exchanges", "bytes_up", "bytes_down", "exposures_max")  # totals that each round's metrics hold


class TrainingRun:
    """A run between settings and result.

    Parameters
    ----------
    settings : Settings
    folder : Path
        The run folder, opened by :meth:`fedsplit.runs.folder.RunFolder.open`.
    report : callable, optional
        Called after every round with its metrics.
    owners : callable, optional
        Which devices each node's key has; see :class:`fedsplit.server.roster.Roster`.
    real : bool
        Whether the nodes are real ones, which go by their owners' limits, whatever the settings say.
    clock : callable
        Returns the time in seconds.

    Raises
    ------
    FedsplitError
        If the settings do not fit together or the data, or name an observer that cannot be made.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        report: Report | None = None,
        *,
        owners: Owners | None = None,
        real: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.settings, self.folder = settings, RunFolder(folder)
        self.experiment = experiment = Experiment(settings)
        self.source, self.model, self.public = experiment.source, experiment.model, experiment.public
        self.strategy: SplitStrategy = split_strategy(experiment, secrets.randbits(62), owners, secret_noise=real)
        self.result: Figures | None = None
        self._report, self._guard_mode = report, "by each owner" if real else settings.guard.mode
        self._watch, self._added = Stopwatch(clock), dict[str, float]()
        self._checkpoint = Checkpoint(self.folder, self.strategy, lambda: self._watch.training)
        self._nodes = Nodes(self.folder, self.strategy, self._checkpoint)
        self._observers = Several([*map(Outside, settings.run.observers), *self._own_observers()])

    def _own_observers(self) -> list[Observer]:
        told = [Lines(self.folder, self._checkpoint), self._checkpoint, self._nodes, Curves(self.folder)]
        return [*told, *([Reporting(self._report)] if self._report else [])]

    @property
    def rounds_done(self) -> int:
        """How many rounds are saved."""
        return self._checkpoint.done

    def again(self) -> "TrainingRun":
        """Return the run as it began; its :meth:`train` goes on from the last checkpoint."""
        run = TrainingRun(self.settings, self.folder.path, self._report, clock=self._watch.clock)
        run.strategy.progress.run = self.strategy.progress.run
        run._watch = Stopwatch(self._watch.clock, self._watch.created)
        return run

    def check_startable(self) -> None:
        """Refuse what would end a simulation half-way; raises FedsplitError."""
        check_startable(self.experiment, self.strategy)

    def train(self, grid: Grid) -> Figures:
        """Train (from the last checkpoint, if there is one) and return what ``result.json`` holds.

        Observers hear of the end by :meth:`finish`, or here if there is none.
        """
        choose_subjects(self.experiment, self.folder)
        learn_from_public_records(self.experiment, self.strategy)
        self._watch.training = load_checkpoint(self.folder.checkpoint, self.strategy) or 0.0
        done, settings = self.strategy.progress.round_number, self.settings
        try:
            begun = Begun(settings.run.name, self.folder.path, settings.flat(), settings.run.rounds, done)
            self._observers.start(begun)
            self._run_rounds(PollingGrid(grid, self.strategy.over), settings.run.rounds - done)
        except BaseException:
            self._observers.end(None)
            raise
        self.result = self._write_result()
        return self.result

    def finish(self) -> None:
        """Tell the observers of the end, when nobody waits for them any more: they may take their time."""
        self._observers.end(self.result)

    def _run_rounds(self, grid: Grid, rounds: int) -> None:
        if rounds:
            self.strategy.register(grid, self._nodes.note)
        self._watch.begin()
        self.strategy.start(
            grid,
            ArrayRecord(),
            num_rounds=rounds,
            timeout=self.settings.protocol.timeout,
            evaluate_fn=self._after_round,
        )

    def _after_round(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Flower's server-side evaluation hook, called after each round: tell of it."""
        if server_round == 0:
            return None
        progress, metrics = self.strategy.progress, self.strategy.metrics
        so_far = {name: getattr(progress.totals, name) for name in _SO_FAR}
        figures = {**metrics, **so_far, "seconds": round(self._watch.lap(), 4)}
        if scores := {name: value for name, value in progress.evaluation.items() if name in metrics}:
            self._observers.evaluation({"round": metrics["round"], **scores})
        self._added |= self._observers.round(figures)
        return None

    def _write_result(self) -> Figures:
        settings, strategy = self.settings, self.strategy
        result: dict[str, Any] = outcome(
            strategy.progress,
            self._watch,
            self._guard_mode,
            name=settings.run.name,
            devices=self.source.count,
            nodes=len(strategy.nodes) or self.experiment.nodes,
            seed=settings.run.seed,
        )
        result |= self._added | strategy.pace.result()
        strategy.pace.save_table(self.folder.devices)
        put(self.folder.result, json.dumps(result, indent=2) + "\n")
        return result
