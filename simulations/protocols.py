"""Compare the protocols on one data set: accuracy with interval, exchanges, bytes, exposures per record.

    python -m simulations protocols configs/wearables.toml --seeds 5

Every row trains the same model on the same devices and is tested on the same held-out devices, once as the settings
drop activations and once without dropping. The rows:

centralised     plain PyTorch with all records in one place (dropping included): what the others are measured against
frozen          the first layer stays random, only the trunk learns: what every protocol must beat
synchronous     one small batch per round and two exchanges, no staleness
pipelined       one exchange per round with whole epochs as chunks, first-layer gradients one round late
single-pass     every record leaves its device once

A frozen first layer and pipelined training get the same number of passes over the records as centralised training.
"""

import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from fedsplit import simulate
from fedsplit.common.seeds import scheduled
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings, load_settings
from fedsplit.release.streams import KEYED_ROUND, simulation_secret
from fedsplit.server.batches import minibatches
from simulations.shared.options import option
from simulations.shared.results import Results
from simulations.shared.settings import Changes, changed, joined, tested, training
from simulations.shared.statistics import between, interval
from simulations.shared.study import CONFIGS
from simulations.shared.tables import markdown, megabytes, page
from simulations.shared.workers import side_by_side

CENTRALISED = "centralised"
ROWS = (CENTRALISED, "frozen", "synchronous", "pipelined", "single-pass")
VARIANTS: dict[str, Changes] = {
    "dropping": {},
    "no dropping": {"dropping": {"policy": "none", "keep": None, "k": None}},
}
COLUMNS = ("", "accuracy", "to centralised", "exchanges", "MB up", "MB down", "exposures", "s")
Run = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What is trained, and how often."""

    config: Path = option(CONFIGS / "wearables.toml", quick=CONFIGS / "digits.toml", positional=True)
    seeds: int = option(5, quick=1)
    epochs: int = option(20, quick=2, help="passes over the records, but for single-pass")
    only: tuple[str, ...] = option(
        ROWS, quick=(CENTRALISED, "frozen", "single-pass"), choices=ROWS, help="rows; centralised is always one"
    )
    set: tuple[str, ...] = option((), help="KEY=VALUE, as in fedsplit simulate")


def study(options: Options) -> Results:
    """Run all rows for all seeds, with and without dropping."""
    settings = load_settings(options.config, options.set)
    rows = [row for row in ROWS if row in (CENTRALISED, *options.only)]
    jobs = [(variant, row, seed) for variant in VARIANTS for row in rows for seed in range(options.seeds)]
    work = [
        (row, changed(settings, {**VARIANTS[variant], "run": {"seed": seed, "engine": "inline"}}), options.epochs)
        for variant, row, seed in jobs
    ]
    runs: dict[str, dict[str, list[Run]]] = {variant: {row: [] for row in rows} for variant in VARIANTS}
    for (variant, row, _), found in zip(jobs, side_by_side(run, work, "training"), strict=True):
        runs[variant][row].append(found)
    return {"runs": runs}


def run(row: str, settings: Settings, epochs: int) -> Run:
    """Run one row with one seed and note its time; for a process of its own."""
    start = time.perf_counter()
    if row == CENTRALISED:
        found = {**centralised(settings, epochs), "exposures_max": epochs}
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = simulate(changed(settings, changes_for(row, settings, epochs)), out=folder)
    kept = ("test_accuracy", "exchanges", "bytes_up", "bytes_down", "exposures_max")
    return {**{key: found.get(key, 0) for key in kept}, "wall": time.perf_counter() - start}


def changes_for(row: str, settings: Settings, epochs: int) -> Changes:
    """Return a row's changes; single-pass runs with the settings' own rounds and learning rates."""
    pipelined = {"mode": "pipelined", "chunk": "epoch"}
    if row == "synchronous":
        return synchronous(settings, epochs)
    changes: dict[str, Changes] = {
        "frozen": {
            "run": {"rounds": epochs},
            "protocol": pipelined,
            "first-layer": {"strategy": "frozen", "args": None},
        },
        "pipelined": {"run": {"rounds": epochs}, "protocol": pipelined, "first-layer": {"lr": 0.01}},
        "single-pass": {"protocol": {"mode": "single-pass", "chunk": "spread"}},
    }
    return changes[row]


def synchronous(settings: Settings, epochs: int) -> Changes:
    """Return the changes of the row ``synchronous``: of each device the fewest records that make a mini-batch."""
    sizes = [len(records) for records in training(Experiment(settings).source)]
    chunk = max(1, round(settings.protocol.batch_size / len(sizes)))
    return {
        "run": {"rounds": epochs * math.ceil(mean(sizes) / chunk)},
        "protocol": {"mode": "synchronous", "chunk": chunk, "batch-size": 10**6},
        "first-layer": {"lr": settings.trunk.lr},
    }


class Central:
    """The whole network in one place, with the same dropping between first layer and trunk."""

    def __init__(self, settings: Settings) -> None:
        experiment = Experiment(settings)
        self.source, self.model = experiment.source, experiment.model
        self.optimizer = torch.optim.Adam([*self.model.first_layer.layer.parameters(), *self.model.trunk.parameters()])
        self._policy, self._secret = experiment.policy, simulation_secret(settings.run.seed, 0)

    def forward(self, records: torch.Tensor, number: int, rows: np.ndarray[Any, Any]) -> torch.Tensor:
        """Return outputs; masks are those of the round ``number`` and of the records' numbers ``rows``."""
        first = self.model.first_layer
        outputs = first.activation(first.layer(records))
        mask = self._policy.mask(outputs.detach().flatten(1).numpy(), self._secret, number, rows)
        dropped: torch.Tensor = self.model.trunk(outputs * torch.from_numpy(mask).reshape(outputs.shape))
        return dropped


def centralised(settings: Settings, epochs: int) -> dict[str, float]:
    """Train the whole network in one place, and test it."""
    central, seed = Central(settings), settings.run.seed
    records = joined(training(central.source))
    x, y = torch.from_numpy(records.x), torch.from_numpy(records.y)
    for epoch in range(1, epochs + 1):
        for group in central.optimizer.param_groups:
            group["lr"] = scheduled(settings.trunk.lr, settings.trunk.schedule, epoch, epochs)
        for rows in minibatches(np.random.default_rng([seed, epoch]).permutation(len(x)), settings.protocol.batch_size):
            loss = central.source.task.loss(central.forward(x[rows], epoch, rows), y[rows]) / len(rows)
            central.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            central.optimizer.step()
    central.model.trunk.eval()
    held = tested(central.source)
    with torch.no_grad():
        outputs = central.forward(torch.from_numpy(held.x), KEYED_ROUND, np.arange(len(held))).numpy()
    return central.source.task.score(outputs, held.y)


def tables(results: Results) -> str:
    """Return a table of each variant."""
    return page(*(markdown(COLUMNS, _rows(rows), variant) for variant, rows in results["runs"].items()))


def _rows(rows: dict[str, list[Run]]) -> Iterator[list[str]]:
    base = [run["test_accuracy"] for run in rows[CENTRALISED]]
    for name, runs in rows.items():
        accuracies = [run["test_accuracy"] for run in runs]
        gaps = [own - other for own, other in zip(accuracies, base, strict=True)]
        exchanges, up, down, seconds = (
            median(run[key] for run in runs) for key in ("exchanges", "bytes_up", "bytes_down", "wall")
        )
        costs = [f"{exchanges:,.0f}", megabytes(up), megabytes(down)] if exchanges else ["-"] * 3
        exposures = str(max(run["exposures_max"] for run in runs))
        yield [name, between(accuracies), between(gaps, sign="+"), *costs, exposures, f"{seconds:.1f}"]


def draw(results: Results, path: Path) -> None:
    """Plot accuracies with intervals, one panel per variant."""
    from matplotlib.figure import Figure

    figure, variants = Figure(figsize=(9, 3), layout="constrained"), results["runs"]
    for axis, (variant, rows) in zip(figure.subplots(1, len(variants), sharex=True), variants.items(), strict=True):
        found = [interval([run["test_accuracy"] for run in runs]) for runs in rows.values()][::-1]
        accuracies, halves = zip(*found, strict=True)
        axis.errorbar(accuracies, list(rows)[::-1], xerr=halves, fmt="o", capsize=3)
        axis.set(title=variant, xlabel="accuracy on held-out devices")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
