"""The search: which trials are run, on how many cores, what has come of them, and what none of the others beats.

The study is an SQLite file that only this process writes. A trial that is running when the process is killed is run
again, under the same number, when the study goes on.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import ray
import tomli_w
from optuna.trial import FrozenTrial, Trial, TrialState
from ray.exceptions import RayError

from fedsplit.common.errors import ConfigError, RunError
from fedsplit.common.figures import AUDITED, figure
from fedsplit.common.files import alone, put
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.learning import TuneSettings
from fedsplit.plan.settings import INCIDENTAL, Settings, check_settings, flattened
from fedsplit.runs.engine import running_ray
from fedsplit.runs.folder import RunFolder
from fedsplit.tuning.fitting import check_fit
from fedsplit.tuning.folder import StudyFolder, seed_folder
from fedsplit.tuning.space import Space, usual_space
from fedsplit.tuning.trial import Outcome, Plan, audited, run_trial, with_seed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """A trial that none of the others beats in every objective.

    Attributes
    ----------
    number : int
    values : dict
        Objectives and constrained values, means over the seeds.
    seeds : list of dict
        The same of every seed.
    parameters : dict
        What was drawn for it.
    audit : dict
        Of the audit in full, means over the seeds; empty if nothing asked for an audit.
    config : Path or None
        The file with its settings, in the end.
    """

    number: int
    values: dict[str, float]
    seeds: list[dict[str, float]]
    parameters: dict[str, Any]
    audit: dict[str, float]
    config: Path | None = None


Report = Callable[["Study"], None]


class Study:
    """A search in a folder.

    Parameters
    ----------
    settings : Settings
        With a section ``tune``, or what it would be by default.
    folder : Path
        Made if it is not there.
    resume : bool
        Go on with the study in the folder.

    Raises
    ------
    FedsplitError
        If the space, the objectives and the settings do not fit together, or the folder holds something else.
    """

    def __init__(self, settings: Settings, folder: Path, *, resume: bool) -> None:
        self.settings, self.folder, self.files = settings, folder, StudyFolder(folder)
        self.tune = settings.tune or TuneSettings()
        self.plan = Plan(
            tuple(self.tune.objectives), {str(k): v for k, v in self.tune.constraints.items()}, self.tune.seeds
        )
        self.space = self._checked_space()
        self._study = self._open(resume=resume)

    @property
    def trials(self) -> list[FrozenTrial]:
        """Those that are through, as Optuna has them, the latest last."""
        found = [trial for trial in self._study.get_trials(deepcopy=False) if "outcome" in trial.user_attrs]
        through = [trial for trial in found if trial.state.is_finished()]
        return sorted(through, key=lambda trial: (trial.datetime_complete or datetime.max, trial.number))

    @property
    def address(self) -> str:
        """Where Optuna finds the study."""
        return f"sqlite:///{self.files.database.resolve()}"

    def front(self) -> list[Point]:
        """Return the Pareto front of the points within the constraints, best of the first objective first.

        Trials with the same figures give one point.
        """
        signs = [figure(name).sign for name in self.plan.objectives]
        costs: dict[tuple[float, ...], FrozenTrial] = {}
        for trial in sorted(self.trials, key=lambda trial: -trial.number):  # the first of those that are alike stays
            values = Outcome(**trial.user_attrs["outcome"]).values
            if values is not None and all(self.plan.excess(n, values[n]) <= 0 for n in self.plan.constraints):
                costs[tuple(s * values[n] for s, n in zip(signs, self.plan.objectives, strict=True))] = trial
        best = [c for c in costs if not any(o != c and all(a <= b for a, b in zip(o, c, strict=True)) for o in costs)]
        full = self._study.user_attrs
        return [_point(costs[cost], full.get(_full(costs[cost].number), {})) for cost in sorted(best)]

    def run(self, parallel: int, report: Report = lambda study: None) -> list[Point]:
        """Run the trials that are still to be run, so many at a time; return the front.

        Raises
        ------
        ConfigError
            If another process works in the folder.
        RunError
            If no trial ran to its end within the constraints.
        """
        busy = f"another process works in {self.folder}"
        with alone(self.files.lock, busy), running_ray(cpus=parallel):
            self._run_trials(parallel, report)
            self._check_feasible()
            self._audit_front()
        return self.front()

    # ------------------------------------------------------------------- opening

    def _checked_space(self) -> Space:
        settings, tune = self.settings, self.tune
        if tune.space is None:
            tables = usual_space(settings, Experiment(settings).model.first_layer)
        else:
            tables = tune.space
        space = Space.of(settings, tables)
        space.check(lambda trial: check_fit(trial, self.plan))
        return space

    def _open(self, *, resume: bool) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        folder, there = self.folder, self.files.database.exists()
        if odd := sorted(set("?%#") & set(str(folder.resolve()))):
            raise ConfigError(f"out folder {folder}: SQLite's address cannot hold {odd[0]!r}")
        if resume and not there:
            raise ConfigError(f"nothing to resume: {self.files.database} does not exist")
        place = RunFolder(folder)
        with place.writing():
            folder.mkdir(parents=True, exist_ok=True)
            if there and not resume:
                raise ConfigError(f"out folder {folder} holds a study: --resume goes on with it")
            if not resume:
                place.check_fresh()
        directions: list[Any] = ["maximize" if figure(n).sign < 0 else "minimize" for n in self.plan.objectives]
        try:
            study = optuna.create_study(
                storage=self.address,
                study_name="fedsplit",
                directions=directions,
                load_if_exists=resume,
            )
        except Exception as error:  # SQLAlchemy's, SQLite's or Optuna's own
            raise ConfigError(f"{self.files.database} is damaged or no study: {type(error).__name__}") from None
        self._check_same(study)
        # another seed each time, or the study would draw again what it drew before it was stopped
        study.sampler = optuna.samplers.TPESampler(seed=(self.settings.run.seed + len(study.trials)) % 2**32)
        return study

    def _check_same(self, study: optuna.Study) -> None:
        """Refuse a study of other settings; only the number of trials may be another."""
        tune = {"tune": self.tune.model_dump(by_alias=True, exclude={"trials"})}
        new: dict[str, Any] = json.loads(json.dumps(flattened({**self.settings.tables(), **tune})))
        for key in ("run.name", *INCIDENTAL):  # which no trial depends on
            new.pop(key, None)
        old = study.user_attrs.get("settings")
        if old is None:
            study.set_user_attr("settings", new)
            tune = {"tune": self.tune.model_dump(by_alias=True, exclude_none=True)}
            put(self.files.settings, tomli_w.dumps({**self.settings.tables(), **tune}))
            return
        if differing := sorted(key for key in old | new if old.get(key) != new.get(key)):
            key = differing[0]
            raise ConfigError(
                f"{self.folder} is a study of other settings: {key} was {old.get(key)!r}, is {new.get(key)!r}"
            )

    # ------------------------------------------------------------------- running

    def _run_trials(self, parallel: int, report: Report) -> None:
        remote = ray.remote(num_cpus=1, max_retries=1)(run_trial)
        running = [t.number for t in self._study.get_trials(deepcopy=False) if not t.state.is_finished()]
        busy: dict[Any, Trial] = {}
        while True:
            while len(busy) < parallel and (running or len(self._study.trials) < self.tune.trials):
                trial = self._again(running.pop(0)) if running else self._study.ask()
                try:
                    settings = check_settings(self.space.draw(trial))
                except ConfigError as error:  # of a combination
                    self._tell(trial, Outcome.of([], str(error), failed=True))
                    report(self)
                    continue
                if (same := self._same(trial)) is not None:
                    self._tell(trial, same)
                    report(self)
                    continue
                others = [point.values for point in self.front()]
                task = remote.remote(settings.to_json(), self.files.trial(trial.number), self.plan, others)
                busy[task] = trial
            if not busy:
                return
            ready, _ = ray.wait(list(busy), num_returns=1)
            self._tell(busy.pop(ready[0]), _outcome(ready[0]))
            self._tidy()
            report(self)

    def _same(self, trial: Trial) -> Outcome | None:
        """Return what a trial with the same settings came to, unless it failed: it would come to that again."""
        found = [Outcome(**other.user_attrs["outcome"]) for other in self.trials if other.params == trial.params]
        return next((outcome for outcome in found if not outcome.failed), None)

    def _again(self, number: int) -> Trial:
        """Return a trial that was running when the study was stopped: it is run again with what was drawn for it."""
        (found,) = (t for t in self._study.get_trials(deepcopy=False) if t.number == number)
        return Trial(self._study, found._trial_id)  # noqa: SLF001  Optuna has no public name for it

    def _tell(self, trial: Trial, outcome: Outcome) -> None:
        trial.set_user_attr("outcome", asdict(outcome))
        if outcome.values is None:
            self._study.tell(trial, state=TrialState.FAIL if outcome.failed else TrialState.PRUNED)
            return
        for name in self.plan.constraints:
            trial.set_constraint(name, self.plan.excess(name, outcome.values[name]))
        self._study.tell(trial, [outcome.values[name] for name in self.plan.objectives])

    def _tidy(self) -> None:
        """Delete what only an audit would need of trials that are beaten."""
        kept = {point.number for point in self.front()}
        for trial in self.trials:
            if trial.number not in kept:
                for folder in self.files.runs(trial.number):
                    for heavy in (folder.recordings, folder.checkpoint, folder.releases):
                        shutil.rmtree(heavy, ignore_errors=True)

    def _check_feasible(self) -> None:
        if self.front():
            return
        outcomes = [Outcome(**trial.user_attrs["outcome"]) for trial in self.trials]
        for name, bound in self.plan.constraints.items():
            if values := [outcome.values[name] for outcome in outcomes if outcome.values]:
                best = min(values, key=lambda value: value * figure(name).sign)
                if self.plan.excess(name, best) > 0:
                    said = f"{name} must be at {figure(name).bound} {bound:g}, the best had {best:.4g}"
                    raise RunError(f"no trial keeps the constraints: {said}")
        why = next((outcome.stopped for outcome in outcomes if outcome.stopped), "no trial keeps all constraints")
        raise RunError(f"none of {len(outcomes)} trials is of use; the first: {why}")

    # ------------------------------------------------------------------- results

    def _audit_front(self) -> None:
        """Attack the front's runs in full, those that have not been yet."""
        if not set(AUDITED) & set(self.plan.names):
            return
        remote = ray.remote(num_cpus=1, max_retries=1)(_audit_in_full)
        tasks = {}
        for point in self.front():
            if not point.audit:
                settings, trial = self.settings_of(point), self.files.trial(point.number)
                seeds = [(with_seed(settings, i), seed_folder(trial, i)) for i in range(len(point.seeds))]
                tasks[point.number] = [remote.remote(s.to_json(), f) for s, f in seeds]
        for number, waiting in tasks.items():
            try:
                found = ray.get(waiting)
            except RayError as error:
                log.warning("trial %d could not be attacked in full: %s", number, _reason(error))
                continue
            self._study.set_user_attr(_full(number), {name: fmean(f[name] for f in found) for name in AUDITED})

    def settings_of(self, point: Point) -> Settings:
        """Return a point's settings."""
        (found,) = (t for t in self.trials if t.number == point.number)
        return check_settings(self.space.draw(optuna.trial.FixedTrial(found.params)))


def _full(number: int) -> str:
    """Return the study's attribute for a trial's audit in full: a trial that is through takes no more."""
    return f"audit of {number}"


def _point(trial: FrozenTrial, audit: dict[str, float]) -> Point:
    outcome = Outcome(**trial.user_attrs["outcome"])
    assert outcome.values is not None
    return Point(trial.number, outcome.values, outcome.seeds, trial.params, audit)


def _outcome(task: Any) -> Outcome:
    try:
        found: Outcome = ray.get(task)
    except RayError as error:  # a user's own code raised, or a process died
        return Outcome.of([], _reason(error), failed=True)
    return found


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {(str(cause).splitlines() or ['no reason given'])[0]}"[:200]


def _audit_in_full(settings_json: str, folder: Path) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    return audited(folder, Settings.from_json(settings_json), quick=False)
