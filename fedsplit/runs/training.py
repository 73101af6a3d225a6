"""One training run on any Grid: the run folder, its checkpoints, metrics and result."""

import json
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flwr
import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid

from fedsplit.audit.transcript import Subjects
from fedsplit.common.errors import ConfigError, RunError
from fedsplit.common.files import replacing
from fedsplit.flower.grid import PollingGrid
from fedsplit.guard.accountant import epsilon
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from fedsplit.runs.assembly import split_strategy
from fedsplit.runs.folder import RunFolder
from fedsplit.server.checkpoint import load_checkpoint, save_checkpoint
from fedsplit.server.roster import Owners
from fedsplit.server.rounds import SplitStrategy
from fedsplit.server.virtual.strategy import VirtualStrategy
from fedsplit.server.warmup import PublicOnly, WarmUp, public_release, warm_up

DELTA = 1e-5  # of the epsilon that results tell
_SO_FAR = ("exchanges", "bytes_up", "bytes_down", "exposures_max")  # totals that each round's metrics hold
Report = Callable[[dict[str, Any]], None]


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

    Raises
    ------
    FedsplitError
        If the settings do not fit together or the data.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        report: Report | None = None,
        *,
        owners: Owners | None = None,
        real: bool = False,
    ) -> None:
        self.settings = settings
        self.folder = RunFolder(folder)
        self.experiment = experiment = Experiment(settings)
        self.source, self.model, self.public = experiment.source, experiment.model, experiment.public
        run = secrets.randbits(62)
        self.strategy: SplitStrategy = split_strategy(experiment, run, owners, secret_noise=real)
        self.rounds_done = 0
        self.result: dict[str, Any] | None = None
        self.guard_mode = "by each owner" if real else settings.guard.mode
        self._report = report
        self._created = time.perf_counter()
        self._training = self._round_start = 0.0
        self._registered = self._created

    def again(self) -> "TrainingRun":
        """Return the run as it began; its :meth:`train` goes on from the last checkpoint."""
        run = TrainingRun(self.settings, self.folder.path, self._report)
        run.strategy.progress.run = self.strategy.progress.run
        run._created = self._created
        return run

    def check_startable(self) -> None:
        """Refuse what would end a simulation half-way: read every device's records once, look at the clock's settings.

        Raises
        ------
        FedsplitError
        """
        records = {device: len(self.source.device(device).train) for device in range(self.source.count)}
        if isinstance(self.strategy, VirtualStrategy):
            donors = self.settings.donors
            self.strategy.check_startable({d: n for d, n in records.items() if n and d not in donors})
        elif self.settings.protocol.deadline is not None:
            raise ConfigError("protocol.deadline needs a [devices.profile] in a simulation: without it no time passes")
        elif self.settings.devices.over_sampling > 1:
            raise ConfigError("devices.over-sampling needs a [devices.profile] in a simulation: nobody is slower")

    def train(self, grid: Grid) -> dict[str, Any]:
        """Train (from the last checkpoint, if there is one) and return what ``result.json`` holds."""
        self._choose_subjects()
        self._learn_from_public_records()
        before = load_checkpoint(self.folder.checkpoint, self.strategy)
        self._training = before or 0.0
        done = self.rounds_done = self.strategy.progress.round_number
        self._keep_metrics(done)
        grid = PollingGrid(grid, self.strategy.over)
        if done < self.settings.run.rounds:
            self.strategy.register(grid, self._note_nodes)
        self._registered = self._round_start = time.perf_counter()
        self.strategy.start(
            grid,
            ArrayRecord(),
            num_rounds=self.settings.run.rounds - done,
            timeout=self.settings.protocol.timeout,
            evaluate_fn=self._after_round,
        )
        self.result = self._result()
        if isinstance(self.strategy, VirtualStrategy):
            self.result["simulated"] = self.strategy.clock.summary()
            self.strategy.clock.save_table(self.folder.devices)
        with replacing(self.folder.result) as new:
            new.write_text(json.dumps(self.result, indent=2) + "\n", encoding="utf-8")
        return self.result

    def _choose_subjects(self) -> None:
        """Note the originals of the records that an audit will attack."""
        targets, folder = self.settings.audit.targets, self.folder.recordings
        if targets and not Subjects.are_in(folder):
            donors = self.settings.donors
            Subjects.choose(self.source, self.public, donors, targets, self.settings.run.seed).save(folder)

    def _learn_from_public_records(self) -> None:
        """Warm both halves up; in a resumed run again, since the public-only model begins there."""
        chosen, settings = self.settings.public, self.settings
        if chosen is None or self.public is None or not chosen.epochs:
            return
        seed, policy, strategy = settings.run.seed, self.experiment.policy, self.strategy
        options = WarmUp(chosen.epochs, chosen.lr, settings.protocol.batch_size, chosen.penalty)
        warm_up(self.model, self.public, self.source.task, policy, options, seed)
        public = public_release(self.model, self.public, policy, settings.protocol.dtype, seed)
        if strategy.first_layer:
            strategy.first_layer.weights = self.model.first_layer.initial_weights()
        if settings.protocol.mode == "release-once":
            most = strategy.options.replay_bytes
            if most is not None and public.nbytes > most:
                raise ConfigError(
                    f"trunk.replay-mb must be at least {public.nbytes / 1e6:.3g}, which public records take"
                )
            strategy.progress.replay = {0: public}
        strategy.compare = PublicOnly(strategy.trunk, public, settings.run.rounds).compare

    def _after_round(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Flower's server-side evaluation hook, called after each round: note its metrics and write a checkpoint."""
        if server_round == 0:
            return None
        now = time.perf_counter()
        self._training += now - self._round_start
        so_far = {name: getattr(self.strategy.progress.totals, name) for name in _SO_FAR}
        metrics = {**self.strategy.metrics, **so_far, "seconds": round(now - self._round_start, 4)}
        self._round_start = now
        with self._writing():
            with self.folder.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
            save_checkpoint(self.folder.checkpoint, self.strategy, self._training)
        self.rounds_done = self.strategy.progress.round_number
        self._note_nodes()
        if self._report:
            self._report(metrics)
        return None

    def _note_nodes(self) -> None:
        with self._writing(), replacing(self.folder.nodes) as new:
            new.write_text(json.dumps(self.strategy.roster.rows(), indent=2) + "\n", encoding="utf-8")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            left = f"the checkpoint of round {self.rounds_done} is the last" if self.rounds_done else "no round is done"
            raise RunError(f"{self.folder.path} cannot be written ({error.strerror}): {left}") from None

    def _keep_metrics(self, rounds: int) -> None:
        """Cut off metrics of rounds after the checkpoint: they will be written again."""
        path = self.folder.metrics
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            with replacing(path) as new:
                new.write_text("".join(lines[:rounds]), encoding="utf-8")

    def _result(self) -> dict[str, Any]:
        progress = self.strategy.progress
        evaluation = progress.evaluation or {"test_accuracy": None, "test_loss": None}
        finished = time.perf_counter()
        totals = {**vars(progress.totals)}
        ledger, refused, test_refused = (totals.pop(key) for key in ("ledger", "refused", "test_refused"))
        return {
            "name": self.settings.run.name,
            **evaluation,
            "rounds": progress.round_number,
            "devices": self.source.count,
            "nodes": len(self.strategy.nodes) or self.experiment.nodes,
            **totals,
            "samples_per_second": round(totals["samples"] / self._training, 1) if self._training else None,
            "seconds": {
                "startup": round(self._registered - self._created, 3),
                "training": round(self._training, 3),
                "total": round(finished - self._created, 3),
            },
            "ledger": _ledger(ledger),
            "guard": {"mode": self.guard_mode, "refused": refused, "test_refused": test_refused},
            "seed": self.settings.run.seed,
            "versions": {
                "fedsplit": version("fedsplit"),
                "flwr": flwr.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }


def _ledger(most: dict[str, float]) -> dict[str, Any]:
    """Return the most that has left of any training record, for people: what has no bound says so."""
    precision, fisher, leverage = (most.get(key, 0.0) for key in ("precision", "fisher", "leverage"))
    return {
        "releases": int(most.get("releases", 0)),
        "equations": int(most.get("equations", 0)),
        "bits": int(most.get("bits", 0)),
        "gradient_leverage": most.get("gradient", 0.0),
        "leverage": None if np.isnan(leverage) else leverage,
        "epsilon": "unbounded" if np.isinf(precision) else epsilon(precision, DELTA),
        "delta": DELTA,
        "dfil": "unbounded" if np.isinf(fisher) else fisher,
    }
