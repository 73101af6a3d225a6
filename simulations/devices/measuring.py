"""All ways of training on all kinds of devices."""

from dataclasses import dataclass
from typing import Any

import torch

from fedsplit.plan.settings import Settings, load_settings, presets
from simulations.devices.exchanges import Cost, measured
from simulations.devices.rows import ROWS, Row
from simulations.devices.runs import run
from simulations.shared.options import option
from simulations.shared.results import Results
from simulations.shared.settings import changed
from simulations.shared.study import CONFIGS
from simulations.shared.workers import side_by_side

Runs = dict[str, dict[str, list[dict[str, Any]]]]


@dataclass(frozen=True)
class Options:
    """Which devices, and how often."""

    seeds: int = option(3, quick=1)
    presets: tuple[str, ...] = option(tuple(presets()), quick=("phones-4g",), choices=tuple(presets()))
    rows: tuple[str, ...] = option(
        tuple(ROWS), quick=("pipelined", "release-once"), choices=tuple(ROWS), help="ways of training"
    )
    rounds: int = option(0, quick=2, help="of each run; 0: as the row says")


def study(options: Options) -> Results:
    """Run all rows."""
    rows = {name: ROWS[name] for name in options.rows}
    return {"runs": measure(rows, options.presets, range(options.seeds), options.rounds)}


def measure(rows: dict[str, Row], kinds: tuple[str, ...], seeds: range, rounds: int) -> Runs:
    """Return runs by preset and row, in the order of seeds; ``rounds`` 0: as many as the row says."""
    torch.set_num_threads(1)
    base = load_settings(CONFIGS / "wearables.toml", ["run.engine=inline"])
    fewer = {"run": {"rounds": rounds}} if rounds else {}
    settings = {name: changed(changed(base, row.changes), fewer) for name, row in rows.items()}
    costs = costs_of(rows, settings)
    places = [(kind, name, seed) for kind in kinds for name in rows for seed in seeds]
    jobs = [(rows[name], _on(settings[name], costs[name], kind, seed), costs[name]) for kind, name, seed in places]
    found: Runs = {kind: {name: [] for name in rows} for kind in kinds}
    for (kind, name, _), result in zip(places, side_by_side(run, jobs, "training"), strict=True):
        found[kind][name].append(result)
    return found


def costs_of(rows: dict[str, Row], settings: dict[str, Settings]) -> dict[str, Cost]:
    """Return what a record costs in each row, measured once for all that are alike."""
    known: dict[tuple[str, str], Cost] = {}
    costs = {}
    for name, row in rows.items():
        key = (row.kind, settings[name].dropping.policy)
        costs[name] = known[key] = known.get(key) or measured(row, settings[name])
    return costs


def _on(settings: Settings, cost: Cost, preset: str, seed: int) -> Settings:
    """Return the settings on devices of a preset."""
    release, gradient = cost.seconds
    profile = {"preset": preset, "release-seconds": release, "gradient-seconds": gradient}
    return changed(settings, {"run": {"seed": seed}, "devices": {"profile": profile}})
