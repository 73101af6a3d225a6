"""One trial: the same settings run with some seeds, each attacked, and what it comes to."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fedsplit.common.errors import FedsplitError, RunError
from fedsplit.common.figures import AUDITED, figure
from fedsplit.common.files import put
from fedsplit.plan.settings import Settings
from fedsplit.runs.folder import RunFolder
from fedsplit.tuning.folder import seed_folder

Values = Mapping[str, float]


@dataclass(frozen=True)
class Plan:
    """What a trial is asked to find.

    Attributes
    ----------
    objectives : tuple of str
    constraints : dict
        By objective, the most it may be (the least, if more of it is better).
    seeds : int
    """

    objectives: tuple[str, ...]
    constraints: Values
    seeds: int

    @property
    def names(self) -> tuple[str, ...]:
        """All that has to be known of a run."""
        return tuple(dict.fromkeys([*self.objectives, *self.constraints]))

    def excess(self, name: str, value: float) -> float:
        """Return by how much a value goes beyond its constraint: 0 or less if it does not."""
        return (value - self.constraints[name]) * figure(name).sign

    def hopeless(self, found: Values, others: Sequence[Values]) -> str | None:
        """Return why further seeds would not help a trial, or None: a constraint or another trial is out of reach.

        Out of reach is what is better by more than seeds usually change: 3 points of accuracy or AUC, 1 dB, 0.1 of the
        records identified, a tenth of anything else.
        """
        for name, bound in self.constraints.items():
            if self.excess(name, found[name]) > _margin(name, found[name]):
                return f"{name} {found[name]:.4g} is far from {bound:g}"
        for other in others:
            if all(_worse(name, found[name], other[name]) > _margin(name, found[name]) for name in self.objectives):
                return "another trial is better in everything"
        return None


def _worse(name: str, value: float, other: float) -> float:
    return (value - other) * figure(name).sign


def _margin(name: str, value: float) -> float:
    return figure(name).usual_change(value)


@dataclass(frozen=True)
class Outcome:
    """What a trial came to.

    Attributes
    ----------
    values : dict or None
        Means over the seeds of everything in :attr:`Plan.names`; None if no seed ran to its end.
    seeds : list of dict
        The same of every seed.
    stopped : str or None
        Why it did not run with all seeds.
    failed : bool
        Whether that is a mistake in the settings or of the run.
    """

    values: dict[str, float] | None
    seeds: list[dict[str, float]]
    stopped: str | None = None
    failed: bool = False

    @classmethod
    def of(cls, seeds: list[dict[str, float]], stopped: str | None = None, *, failed: bool = False) -> "Outcome":
        """Average over the seeds.

        Parameters
        ----------
        seeds : list of dict
            What each seed's run came to, by name.
        stopped : str, optional
            Why not all seeds have run.
        failed : bool
            Whether the cause is a mistake in the settings or an error of the run.
        """
        means = {name: fmean(found[name] for found in seeds) for name in seeds[0]} if seeds else None
        return cls(means, seeds, stopped, failed)


class _OutOfReachError(Exception):
    """A run has already gone beyond a constraint."""


def run_trial(settings_json: str, folder: Path, plan: Plan, others: Sequence[Values]) -> Outcome:
    """Run a trial in this process, with one thread; what a seed has come to before is not run again.

    Parameters
    ----------
    settings_json : str
        See :meth:`fedsplit.plan.settings.Settings.to_json`.
    folder : Path
        Of the trial; each seed's run folder is made in it.
    plan : Plan
    others : sequence of dict
        What the front's trials came to.
    """
    import torch

    torch.set_num_threads(1)
    settings, seeds = Settings.from_json(settings_json), list[dict[str, float]]()
    try:
        for i in range(plan.seeds):
            seeds.append(_run_seed(with_seed(settings, i), seed_folder(folder, i), plan, seeds))
            if i + 1 < plan.seeds and (why := plan.hopeless(Outcome.of(seeds).values or {}, others)):
                return Outcome.of(seeds, why)
    except _OutOfReachError as error:  # whatever earlier seeds came to: the mean is known to break a constraint
        return Outcome.of([], str(error))
    except FedsplitError as error:
        return Outcome.of([], str(error), failed=True)
    return Outcome.of(seeds)


def with_seed(settings: Settings, i: int) -> Settings:
    """Return the settings of a trial's run number ``i``."""
    run = settings.run.model_copy(update={"seed": settings.run.seed + i, "engine": "inline", "ray_address": None})
    return settings.model_copy(update={"run": run})


def audited(folder: Path, settings: Settings, *, quick: bool) -> dict[str, float]:
    """Audit a seed's run, and return the objectives in :data:`fedsplit.common.figures.AUDITED`.

    Parameters
    ----------
    folder : Path
        The run folder of the seed.
    settings : Settings
        The run's; the audit takes its seed.
    quick : bool
        As in :func:`fedsplit.audit.audit.audit`.

    Raises
    ------
    FedsplitError
        If the audit fails, or its negative control does not hold.
    """
    from fedsplit.runs.auditing import audit_run

    report = audit_run(folder, seed=settings.run.seed, quick=quick)
    if not report["control"]["holds"]:
        raise RunError("the audit's negative control does not hold")
    most = max(scores["identification"] for scores in (report["attacks"] or {"": report["strongest"]}).values())
    return {"strongest_psnr": report["strongest"]["psnr"], "identification": most}


def _run_seed(settings: Settings, folder: Path, plan: Plan, before: Sequence[Values]) -> dict[str, float]:
    from fedsplit.runs.simulation import simulate

    done = RunFolder(folder).objectives
    if done.exists():
        found: dict[str, float] = json.loads(done.read_text(encoding="utf-8"))
        return found
    shutil.rmtree(folder, ignore_errors=True)  # what a killed process has left

    def watch(metrics: dict[str, Any]) -> None:
        for name, bound in plan.constraints.items():
            if figure(name).grows:
                least = (sum(found[name] for found in before) + metrics[name]) / plan.seeds
                if plan.excess(name, least) > 0:
                    raise _OutOfReachError(f"{name} would be more than {bound:g}")

    result = simulate(settings, out=folder, report=watch)
    known = {name: figure(name).of(result) for name in plan.names}
    if set(AUDITED) & set(plan.names):
        known |= audited(folder, settings, quick=True)
    if missing := [name for name in plan.names if known[name] is None]:
        raise RunError(f"the run gave no {missing[0]}")
    found = {name: float(known[name] or 0.0) for name in plan.names}
    put(done, json.dumps(found) + "\n")
    return found
