"""What a search has found, for people: table, pictures, and all trials as JSON."""

import json
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table

from fedsplit.config import MAXIMISED
from fedsplit.state import replacing
from fedsplit.tuning.study import Point, Study
from fedsplit.tuning.trial import Outcome

_FEW = 4  # trials, of which nothing can be said


def front_table(study: Study, points: list[Point]) -> RenderableType:
    """Return the front for a terminal: a table, and below it what was drawn for each point."""
    done = len(study.trials)
    table = Table(title=f"{done} of {study.tune.trials} trials: what no other beats", title_justify="left")
    table.add_column("point", justify="right")
    for name in [*study.plan.names, *(f"{name}, in full" for name in (points[0].audit if points else ()))]:
        table.add_column(name, justify="right")
    for point in points:
        values = [point.values[name] for name in study.plan.names] + list(point.audit.values())
        table.add_row(_label(point), *(f"{value:.4g}" for value in values))
    return Group(table, *(Padding(f"{_label(point)}: {_told(point.parameters)}", (0, 0, 0, 1)) for point in points))


def _label(point: Point) -> str:
    """Return the name of its settings file, or while there is none the trial's number."""
    return point.config.stem if point.config else f"trial {point.number}"


def _told(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in parameters.items())


def write_results(study: Study, points: list[Point]) -> None:
    """Write ``tune.json``, ``front.png`` and ``importance.png`` into the study's folder."""
    trials = [
        {"number": t.number, "state": t.state.name.lower(), "parameters": t.params, **t.user_attrs["outcome"]}
        for t in study.trials
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
    with replacing(study.folder / "tune.json") as new:
        new.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    _draw_front(study, points, study.folder / "front.png")
    _draw_importance(matters, study.folder / "importance.png")


def importance(study: Study) -> dict[str, dict[str, float]]:
    """Return by objective how much each parameter matters, summing to 1 (PED-ANOVA, Watanabe et al., IJCAI 2023)."""
    found = {}
    complete = [t for t in study.trials if t.state == TrialState.COMPLETE]
    for place, name in enumerate(study.plan.objectives):
        if len(complete) < _FEW:
            continue
        sign = -1 if name in MAXIMISED else 1  # it looks at what makes a value small
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
    figure = Figure(figsize=(5 * len(pairs), 4), layout="constrained")
    for axis, (down, across) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
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
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


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
