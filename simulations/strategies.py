"""What hostile devices do to the first layer under each strategy, and what poisoned labels do to the trunk.

    python simulations/strategies.py

Small digits on 15 devices, each a node of its own, and 3 that test. Three of the 15 are hostile, and send in place of
what their node would: their gradient turned round (`flipped`), turned round and ten times as large (`scaled`), noise
ten times as large (`random`); or, with honest gradients, labels one class too high (`labels`). Devices hold records
alike (`iid`) or mostly of few classes (`skewed`, Dirichlet 0.1); training is pipelined or single-pass. In the row
`trimmed trunk` the trunk leaves out the fifth of each mini-batch with the largest loss. A run that stops because
something is not finite counts as a guess, 0.1. Writes a table (mean and standard deviation over seeds),
`strategies.json` and `strategies.png` to `simulations/results/strategies`.
"""

import argparse
import gc
import json
import logging
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fedsplit.common.arrays import FloatArray, IntArray
from fedsplit.common.errors import RunError
from fedsplit.common.seeds import seed_of
from fedsplit.flower.grid import InProcessGrid
from fedsplit.flower.record import from_record, to_record
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings, check_settings
from fedsplit.runs.assembly import split_strategy
from fedsplit.runs.client_app import client_app
from fedsplit.server.batches import Batches
from fedsplit.server.trunk import Trunk
from fedsplit.wire.exchange import Upload

RESULTS = Path(__file__).parent / "results" / "strategies"
DEVICES, HOSTILE, TEST, ROUNDS, CLASSES = 15, 3, 3, 20, 10
FACTOR = 10.0  # of hostile gradients that are larger than honest ones
ATTACKS = ("none", "flipped", "scaled", "random", "labels")
PARTITIONS = {"iid": {"partition": "iid"}, "skewed": {"partition": "dirichlet", "alpha": 0.1}}
MODES = {"pipelined": {"chunk": "epoch"}, "single-pass": {"chunk": "spread"}}
# learning rates that were good without an attack: for Adam, and for a plain step
ADAM, PLAIN = {"pipelined": 0.01, "single-pass": 0.001}, {"pipelined": 0.03, "single-pass": 0.003}
ARGS: dict[str, dict[str, Any]] = {
    "FedTrimmedAvg": {"beta": 0.25},
    "MultiKrum": {"num_malicious_nodes": HOSTILE, "num_nodes_to_select": 9},
    "Bulyan": {"num_malicious_nodes": HOSTILE},
}
TRIM = 0.2
ROWS = {name: (name, False) for name in ("frozen", "FedAvg", "FedAdam", "FedMedian", *ARGS)}
ROWS["FedAdam, trimmed trunk"] = ("FedAdam", True)
"""By row: the first layer's strategy, and whether the trunk is trimmed."""
ON_TRUNK = ("none", "labels")  # attacks that tell something of rows whose first layer is not what is looked at
Job = tuple[int, str, str, str, str]  # seed, mode, partition, row, attack


class HostileApp:
    """A ClientApp some of whose devices lie: what their own node answers is changed on its way out.

    Parameters
    ----------
    app : callable
        The honest ClientApp.
    attack : str
        One of :data:`ATTACKS`.
    hostile : set of int
        Devices that lie, each on a node of its own.
    parameters : int
        Of the first layer.
    seed : int
    """

    def __init__(
        self,
        app: Callable[[Message, Context], Message],
        attack: str,
        hostile: set[int],
        parameters: int,
        seed: int,
    ) -> None:
        self._app = app
        self._attack = attack
        self._hostile = hostile
        self._parameters = parameters
        self._rng = np.random.default_rng(seed_of(seed, "hostile"))

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message, honestly or not."""
        reply = self._app(message, context)
        if context.node_config["partition-id"] in self._hostile and message.metadata.message_type == "train":
            upload = Upload.from_bytes(from_record(reply.content), parameters=self._parameters)
            reply.content = to_record(self._lie(upload).to_bytes())
        return reply

    def _lie(self, upload: Upload) -> Upload:
        if self._attack == "labels":
            wrong = (upload.release.targets + 1) % CLASSES
            return replace(upload, release=replace(upload.release, targets=wrong))
        sums = upload.gradients.sums
        if self._attack == "random":
            noise = self._rng.normal(size=sums.shape)
            sizes = np.linalg.norm(sums, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
            return replace(upload, gradients=replace(upload.gradients, sums=FACTOR * sizes * noise))
        factor = {"flipped": -1.0, "scaled": -FACTOR}[self._attack]
        return replace(upload, gradients=replace(upload.gradients, sums=factor * sums))


class TrimmedTrunk(Trunk):
    """Leaves out of each step the fifth of the records with the largest loss, whose cut gradients are then zero.

    Source: Shen and Sanghavi, "Learning with Bad Training Data via Iterative Trimmed Loss Minimization", ICML 2019.
    """

    def _step(self, batches: Batches, rows: IntArray, gradients: FloatArray) -> tuple[float, int]:
        outputs, cells, positions = batches.dense(rows)
        cut = torch.from_numpy(outputs).reshape(-1, *self.cut_shape).requires_grad_()
        targets = torch.from_numpy(batches.targets[rows])
        predictions = self.module(cut)
        each = torch.nn.functional.cross_entropy(predictions, targets, reduction="none")
        kept = each.topk(len(rows) - int(TRIM * len(rows)), largest=False).values
        self.optimizer.zero_grad()
        kept.mean().backward()
        self.optimizer.step()
        gradients[positions] = cut.grad.flatten().numpy()[cells] * len(kept)
        return each.sum().item(), int((predictions.argmax(1) == targets).sum())


def settings_for(seed: int, mode: str, partition: str, row: str) -> Settings:
    """Return the settings of one run."""
    strategy = ROWS[row][0]
    rate = (ADAM if strategy == "FedAdam" else PLAIN)[mode]
    return check_settings(
        {
            "run": {"name": "strategies", "rounds": ROUNDS, "engine": "inline", "seed": seed},
            "data": {"name": "digits"},
            "devices": {"count": DEVICES + TEST, "test": TEST, **PARTITIONS[partition]},
            "model": {"name": "mlp", "width": 24},
            "dropping": {"policy": "top-k", "k": 12},
            "protocol": {"mode": mode, **MODES[mode]},
            "first-layer": {"strategy": strategy, "lr": rate, "args": ARGS.get(strategy, {})},
            "trunk": {"lr": 0.01},
        }
    )


def accuracy(job: Job) -> float:
    """Train once; return the accuracy on the devices that test, who are honest."""
    seed, mode, partition, row, attack = job
    settings = settings_for(seed, mode, partition, row)
    experiment = Experiment(settings)
    source, model = experiment.source, experiment.model
    strategy = split_strategy(experiment, run=1, kind=TrimmedTrunk if ROWS[row][1] else None)
    drawn = np.random.default_rng(seed_of(seed, "hostile devices")).permutation(DEVICES)[:HOSTILE]
    hostile = set(drawn.tolist()) if attack != "none" else set()
    with tempfile.TemporaryDirectory() as folder:
        app = client_app(settings.to_json(), f"{folder}/nodes")
        lying = HostileApp(app, attack, hostile, model.first_layer.size, seed)
        try:
            strategy.start(InProcessGrid(lying, source.count), ArrayRecord(), num_rounds=ROUNDS, timeout=60)
        except RunError:  # something is not finite
            return 1 / CLASSES
    return float(strategy.progress.evaluation["test_accuracy"])


def _start_worker() -> None:
    import flwr.supercore  # noqa: F401  sets its own log level when first imported

    logging.getLogger("flwr").setLevel(logging.ERROR)
    logging.getLogger("fedsplit").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    gc.collect = lambda generation=2: 0  # which Flower's Bulyan does for every contribution


def measure(seeds: int, processes: int) -> dict[Job, float]:
    """Run everything."""
    cells = product(range(seeds), MODES, PARTITIONS, ROWS, ATTACKS)
    jobs = [job for job in cells if job[4] in ON_TRUNK or not (job[3] == "frozen" or ROWS[job[3]][1])]
    # fresh processes, since a fork of one that has used torch's threads can hang
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        results = track(pool.map(accuracy, jobs), "training", len(jobs), console=Console(stderr=True))
        return dict(zip(jobs, results, strict=True))


def summarise(results: dict[Job, float]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return accuracies by (mode and partition), row and attack, in the order of seeds."""
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    for (_, mode, partition, row, attack), found in results.items():
        cell = table.setdefault(f"{mode}, {partition}", {}).setdefault(row, {}).setdefault(attack, [])
        cell.append(found)
    return table


def print_tables(summary: dict[str, dict[str, dict[str, list[float]]]]) -> None:
    """Print a table per mode and partition."""
    for title, rows in summary.items():
        table = Table(title=title, title_justify="left")
        for column in ("first layer", *ATTACKS):
            table.add_column(column, justify="left" if column == "first layer" else "right")
        for name, cells in rows.items():
            said = {a: f"{mean(v):.3f} ± {stdev(v) if len(v) > 1 else 0:.3f}" for a, v in cells.items()}
            table.add_row(name, *(said.get(attack, "") for attack in ATTACKS))
        Console(width=110).print(table)


def draw(summary: dict[str, dict[str, dict[str, list[float]]]], path: Path) -> None:
    """Plot means with the range over seeds: a panel per mode and partition, a colour per attack."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(len(MODES), len(PARTITIONS), sharex=True, sharey=True).flat
    for axis, (title, rows) in zip(panels, summary.items(), strict=False):
        names = list(rows)[::-1]
        for i, attack in enumerate(ATTACKS):
            found = [(place + 0.3 - 0.15 * i, rows[n][attack]) for place, n in enumerate(names) if attack in rows[n]]
            middle = [mean(v) for _, v in found]
            spread = [[m - min(v) for m, (_, v) in zip(middle, found, strict=True)]]
            spread.append([max(v) - m for m, (_, v) in zip(middle, found, strict=True)])
            axis.errorbar(middle, [p for p, _ in found], xerr=spread, fmt="o", markersize=4, capsize=2, label=attack)
        axis.set(title=title, xlabel="accuracy on honest devices that test")
        axis.set_yticks(range(len(names)), names)
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(ATTACKS), frameon=False)
    figure.savefig(path, dpi=120)


def write(results: dict[Job, float], folder: Path) -> None:
    """Print the tables, write JSON and plot."""
    summary = summarise(results)
    print_tables(summary)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "strategies.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    draw(summary, folder / "strategies.png")
    print(f"written to {folder}")


def main() -> None:
    """Run everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    write(measure(options.seeds, options.processes), options.out)


if __name__ == "__main__":
    main()
