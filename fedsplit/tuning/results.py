"""What a search has found, for people: table, pictures, and all trials as JSON."""

import json
import shlex
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table

from fedsplit.common.figures import AUDITED, figure
from fedsplit.common.files import put
from fedsplit.plan.named_code import names_code
from fedsplit.plan.settings import Settings
from fedsplit.tuning.study import Point, Study
from fedsplit.tuning.trial import Outcome

_FEW = 4  # trials, of which nothing can be said


def front_table(study: Study, points: list[Point]) -> RenderableType:
    """Return the front for a terminal: a table, and below it what was drawn for each point."""
    done = len(study.trials)
    table = Table(title=f"{done} of {study.tune.trials} trials: what no other beats", title_justify="left")
    table.add_column("point", justify="right")
    full = AUDITED if any(point.audit for point in points) else ()
    for name in [*study.plan.names, *(f"{name}, in full" for name in full)]:
        table.add_column(name, justify="right")
    for point in points:
        audit = [f"{point.audit[name]:.4g}" if point.audit else "-" for name in full]
        table.add_row(_label(point), *(f"{point.values[name]:.4g}" for name in study.plan.names), *audit)
    return Group(table, *(Padding(f"{_label(point)}: {_told(point.parameters)}", (0, 0, 0, 1)) for point in points))


def _label(point: Point) -> str:
    """Return the name of its settings file, or while there is none the trial's number."""
    return point.config.stem if point.config else f"trial {point.number}"


def _told(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in parameters.items())


def export_front(study: Study) -> list[Point]:
    """Write a settings file for every point of the front into the study's folder, and return them."""
    folder = study.files.front
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    points = []
    for place, point in enumerate(study.front(), start=1):
        path, settings = folder / f"{place:02d}.toml", study.settings_of(point)
        run = settings.run.model_copy(update={"name": f"{settings.run.name}-{place:02d}"})
        text = settings.model_copy(update={"run": run}).to_toml()
        put(path, _heading(study, point, path, settings) + text)
        points.append(replace(point, config=path))
    return points


def _heading(study: Study, point: Point, path: Path, settings: Settings) -> str:
    """Return the first lines of a settings file: the commands that show what it comes to, and that."""
    out = f"runs/{settings.run.name}-{path.stem}"
    where = f"PYTHONPATH={shlex.quote(home)} " if (home := _home_of(settings)) else ""
    lines = [f"OMP_NUM_THREADS=1 {where}fedsplit simulate {shlex.quote(str(path))} --out {out}"]
    if set(AUDITED) & set(study.plan.names):
        lines.append(f"OMP_NUM_THREADS=1 {where}fedsplit audit {out} --quick --seed {settings.run.seed}")
    told = ", ".join(f"{name} {point.seeds[0][name]:.6g}" for name in study.plan.names)
    lines += ["", f"Trial {point.number} of a search. With this seed: {told}."]
    if len(point.seeds) > 1:
        means = ", ".join(f"{name} {value:.6g}" for name, value in point.values.items())
        lines.append(f"Mean of {len(point.seeds)} seeds: {means}.")
    if point.audit:
        lines.append("Attacked in full: " + ", ".join(f"{k} {v:.6g}" for k, v in point.audit.items()) + ".")
    lines.append("With more threads torch adds numbers in another order, and the figures differ a little.")
    return "".join(f"# {line}".rstrip() + "\n" for line in lines) + "\n"


def _home_of(settings: Settings) -> str:
    """Return the folder in which a user's own module was found, if the settings name one that is not installed."""
    for reference in names_code(settings).values():
        name = reference.partition(":")[0]
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and "site-packages" not in file:
            return str(Path(file).resolve().parents[name.count(".")])
    return ""


def write_results(study: Study, points: list[Point]) -> None:
    """Write ``tune.json``, ``front.png`` and ``importance.png`` into the study's folder."""
    trials = [
        {"number": t.number, "state": t.state.name.lower(), "parameters": t.params, **t.user_attrs["outcome"]}
        for t in sorted(study.trials, key=lambda trial: trial.number)
    ]
    front = [{**vars(point), "config": str(point.config)} for point in points]
    matters = importance(study)
    found = {
        "objectives": study.plan.objectives,
        "constraints": study.plan.constraints,
        "front": front,
        "importance": matters,
        "trials": trials,
    }
    put(study.files.results, json.dumps(found, indent=2) + "\n")
    _draw_front(study, points, study.files.front_picture)
    _draw_importance(matters, study.files.importance_picture)


def importance(study: Study) -> dict[str, dict[str, float]]:
    """Return by objective how much each parameter matters, summing to 1 (PED-ANOVA, Watanabe et al., IJCAI 2023)."""
    found = {}
    complete = [t for t in study.trials if t.state == TrialState.COMPLETE]
    for place, name in enumerate(study.plan.objectives):
        if len(complete) < _FEW:
            continue
        sign = figure(name).sign  # it looks at what makes a value small
        one = optuna.create_study()
        one.add_trials([_with_value(t, sign * t.values[place]) for t in complete])
        try:
            with warnings.catch_warnings():  # that some settings were tried seldom
                warnings.simplefilter("ignore")
                told = optuna.importance.get_param_importances(one)
        except (ValueError, RuntimeError):  # all values are the same
            continue
        found[name] = {key: float(value) for key, value in told.items()}
    return found


def _with_value(trial: FrozenTrial, value: float) -> FrozenTrial:
    return optuna.trial.create_trial(params=trial.params, distributions=trial.distributions, value=value)


def _draw_front(study: Study, points: list[Point], path: Path) -> None:
    from matplotlib.figure import Figure

    names = study.plan.objectives
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]] or [("trial", names[0])]
    outcomes = [(t.number, Outcome(**t.user_attrs["outcome"])) for t in study.trials]
    on_front = {point.number: point for point in points}
    picture = Figure(figsize=(5 * len(pairs), 4), layout="constrained")
    for axis, (down, across) in zip(picture.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        x, y = (down, across) if down == "trial" else (across, down)
        values = [({"trial": number, **o.values}, number) for number, o in outcomes if o.values]
        others = [(v[x], v[y]) for v, number in values if number not in on_front]
        best = [(v[x], v[y], on_front[number]) for v, number in values if number in on_front]
        if others:
            axis.scatter(*zip(*others, strict=True), s=14, color="0.7", label="other trials")
        axis.scatter([b[0] for b in best], [b[1] for b in best], s=30, color="C0", label="front")
        for at_x, at_y, point in best:
            axis.annotate(_label(point), (at_x, at_y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        for name, line in ((x, axis.axvline), (y, axis.axhline)):
            if name in study.plan.constraints:
                line(study.plan.constraints[name], color="C3", linewidth=1, linestyle=":")
        axis.set(xlabel=figure(x).title, ylabel=figure(y).title)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    picture.savefig(path, dpi=120)


def _draw_importance(found: dict[str, dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    names = sorted({key for told in found.values() for key in told})
    figure = Figure(figsize=(7, 1.2 + 0.25 * max(1, len(names)) * max(1, len(found))), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / max(1, len(found))
    for place, (objective, told) in enumerate(found.items()):
        at = [i + place * height for i in range(len(names))]
        axis.barh(at, [told.get(name, 0.0) for name in names], height=height, label=objective)
    axis.set_yticks([i + 0.4 - height / 2 for i in range(len(names))], names)
    axis.invert_yaxis()
    axis.set(xlabel="importance")
    if found:
        axis.legend(frameon=False)
    else:
        axis.set_title("too few trials to say what matters")
    figure.savefig(path, dpi=120)
