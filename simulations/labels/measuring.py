"""Trains with labels shared and at home, and attacks the latter."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fedsplit import simulate
from fedsplit.plan.settings import load_settings
from simulations.labels.attacks import Seen, from_clusters, from_head, from_linked, from_sums
from simulations.labels.watching import watched
from simulations.shared.options import option
from simulations.shared.results import Results
from simulations.shared.study import CONFIGS
from simulations.shared.workers import progress, quiet

CLUSTERED = 20  # rounds whose messages are clustered, from the first to the last
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What is trained, and with how much noise."""

    configs: tuple[Path, ...] = option(
        (CONFIGS / "wearables.toml", CONFIGS / "digits.toml"), quick=(CONFIGS / "digits.toml",), positional=True
    )
    seeds: tuple[int, ...] = option((1, 2, 3), quick=(1,))
    rounds: int = option(100, quick=4)
    chunk: int = option(16, help="records of each device in a round")
    noise: tuple[float, ...] = option((1.0, 4.0), quick=(4.0,), help="over the gradients' own size")


@dataclass(frozen=True)
class Run:
    """A configuration with a seed."""

    config: Path
    seed: int
    rounds: int
    chunk: int

    def result(self, labels: str) -> Row:
        """Train with labels ``shared`` or ``at-home``."""
        changes = [
            f"run.seed={self.seed}",
            f"run.rounds={self.rounds}",
            "run.engine=inline",
            "protocol.mode=synchronous",
            f"protocol.labels={labels}",
            f"protocol.chunk={self.chunk}",
            "protocol.batch-size=1000000",
        ]
        with TemporaryDirectory() as folder:
            return simulate(load_settings(self.config, changes), out=Path(folder) / "run")

    def row(self, labels: str, noise: float, accuracy: float) -> Row:
        """Return what a row has in any case."""
        return {"data": self.config.stem, "seed": self.seed, "labels": labels, "noise": noise, "accuracy": accuracy}


def study(options: Options) -> Results:
    """Return a row for each configuration, seed, and way to keep labels."""
    quiet()
    for config in options.configs:
        load_settings(config)  # what is wrong with one is said before the first is trained
    runs = [Run(config, seed, options.rounds, options.chunk) for config in options.configs for seed in options.seeds]
    return {"rows": [row for run in progress(runs, "training and attacking") for row in rows_of(run, options.noise)]}


def rows_of(run: Run, noises: tuple[float, ...]) -> Iterator[Row]:
    """Train with labels shared, at home, and at home with noise; attack the latter."""
    shared = run.result("shared")
    yield {**run.row("shared", 0.0, shared["test_accuracy"]), "head": 1.0}
    for noise in (0.0, *noises):
        seen: list[Seen] = []
        rng = np.random.default_rng([run.seed, round(1000 * noise)])
        with watched(seen, noise, rng):
            home = run.result("at-home")
        yield {
            **run.row("at-home", noise, home["test_accuracy"]),
            **attacked(seen, run.rounds, rng),
            "bytes": {name: r["bytes_up"] + r["bytes_down"] for name, r in (("shared", shared), ("at-home", home))},
            "exchanges": {"shared": shared["exchanges"], "at-home": home["exchanges"]},
            "refused": home["failures"],
        }


def attacked(seen: list[Seen], rounds: int, rng: np.random.Generator) -> Row:
    """Return the share of labels that each attack finds out."""
    nodes = len(seen) // rounds
    some = [seen[i : i + nodes] for i in range(0, len(seen), nodes)][:: max(1, rounds // CLUSTERED)]
    y = np.concatenate([s.y for s in seen])
    return {
        "chance": float(np.bincount(y).max() / len(y)),
        "head": from_head(seen),
        "linked": from_linked(seen),
        "sum": from_sums(seen),
        "clusters": from_clusters(some, lambda s: s.gradients, rng),
        "features": from_clusters(some, lambda s: s.features, rng),
        "records_of_a_node": float(np.mean([len(s.y) for s in seen])),
        "numbers_of_the_head": int(seen[0].head.size),
    }
