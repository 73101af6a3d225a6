"""Trains and attacks all entries."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fedsplit.audit.audit import audit
from fedsplit.audit.evidence import rehearsed
from fedsplit.audit.transcript import Subjects
from fedsplit.common.errors import ConfigError
from fedsplit.data import Records, Source
from fedsplit.model.split import SplitModel
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings, load_settings
from fedsplit.server.trunk import Trunk, TrunkOptions
from fedsplit.server.warmup import WarmUp, public_release, warm_up
from simulations.frontier.defences import Binarised, Projection, attack_projection
from simulations.frontier.entries import Entry, entries
from simulations.shared.options import option
from simulations.shared.results import Results
from simulations.shared.settings import joined, tested, training
from simulations.shared.study import CONFIGS
from simulations.shared.workers import side_by_side

Scores = dict[str, float | None]


@dataclass(frozen=True)
class Options:
    """What is trained and attacked, and how often."""

    config: Path = option(
        CONFIGS / "mnist-private.toml",
        quick=CONFIGS / "digits.toml",
        help="settings with [public] and an mlp model",
        positional=True,
    )
    set: tuple[str, ...] = option((), quick=("public.devices=[0,1,2]",), help="KEY=VALUE, as in fedsplit simulate")
    seeds: int = option(3, quick=1)
    targets: int = option(100, quick=10, help="in each half")
    epochs: int = option(30, quick=1)
    entries: tuple[str, ...] = option(
        tuple(entry.name for entry in entries()),
        quick=("random 0.25 of 256", "random 0.15 of 256", "8 units"),
        choices=tuple(entry.name for entry in entries()),
    )
    processes: int = option(2)


def study(options: Options) -> Results:
    """Return accuracy and scores of each entry and seed."""
    chosen = [entry for entry in entries() if entry.name in options.entries]
    jobs = [
        (load_settings(options.config, options.set), entry, seed, options.targets, options.epochs)
        for seed in range(options.seeds)
        for entry in chosen
    ]
    rows = []
    found = side_by_side(measure, jobs, "training and attacking", options.processes)
    for (_, entry, seed, *_), row in zip(jobs, found, strict=True):
        rows.append({"name": entry.name, "family": entry.family, "seed": seed, **row})
    return {"rows": rows}


def measure(base: Settings, entry: Entry, seed: int, targets: int, epochs: int) -> dict[str, Any]:
    """Train and attack one entry; return accuracy and scores on both halves of the targets."""
    experiment = Experiment(entry.settings(base, seed))
    settings, source, public = experiment.settings, experiment.source, experiment.public
    if public is None or settings.public is None:
        raise ConfigError("the settings name no public records: [public] must be there")
    subjects = Subjects.choose(source, public, settings.donors, 2 * targets, seed)
    options = WarmUp(epochs, settings.public.lr, settings.protocol.batch_size, entry.penalty)
    model = trained(entry, experiment, joined([public, *training(source, settings.donors)]), options, seed)
    release = public_release(model, tested(source), experiment.policy, settings.protocol.dtype, seed)
    accuracy = _trunk(model, source, seed).evaluate(release)["test_accuracy"]
    halves = (_part(subjects, slice(0, targets)), _part(subjects, slice(targets, None)))
    chosen_on, reported = (strongest(entry, experiment, model, half, seed) for half in halves)
    return {"accuracy": accuracy, "chosen_on": chosen_on, "reported": reported}


def trained(entry: Entry, experiment: Experiment, records: Records, options: WarmUp, seed: int) -> SplitModel:
    """Return the model after it has learned from public and private records."""
    model, task = experiment.model, experiment.source.task
    if entry.projection:
        projected = Projection(model.first_layer.width, entry.projection, seed)
        model = replace(model, trunk=nn.Sequential(projected, model.trunk))
    if entry.binarised:
        Binarised(model).train(records, task, options, seed)
    else:
        warm_up(model, records, task, experiment.policy, options, seed)
    return model


def strongest(entry: Entry, experiment: Experiment, model: SplitModel, subjects: Subjects, seed: int) -> Scores:
    """Return the scores of the strongest attack on one release of some records."""
    policy, dtype = experiment.policy, experiment.settings.protocol.dtype
    if entry.projection:
        basis = Projection(model.first_layer.width, entry.projection, seed).basis.numpy()
        return attack_projection(model.first_layer, policy, dtype, subjects, basis, seed)
    found: Scores = audit(rehearsed(model.first_layer, policy, dtype, subjects, seed), seed=seed).report["strongest"]
    return found


def _trunk(model: SplitModel, source: Source, seed: int) -> Trunk:
    options = TrunkOptions("adam", 1e-3, 0.0, 0.0, "constant", 64, 1)
    return Trunk(model.trunk, model.first_layer.cut_shape, source.task, source.outputs, options, 1, seed)


def _part(subjects: Subjects, rows: slice) -> Subjects:
    chosen = {name: getattr(subjects, name)[rows] for name in ("x", "y", "device", "index", "place")}
    return replace(subjects, **chosen)
