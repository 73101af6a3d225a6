"""All folds, attacks and cases."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fedsplit.common.errors import ConfigError
from fedsplit.common.seeds import seed_of
from fedsplit.data import wearables
from fedsplit.model.zoo import build_model
from simulations.health.cases import bleeding, tumours
from simulations.health.data import CELLS, KNOWN, POLICIES, PRIVATE, TRAINING, Windows, split_model
from simulations.health.detectors import (
    Method,
    Releases,
    autoencoder,
    classifier,
    neighbours,
    recordings,
    released,
    svdd,
)
from simulations.health.leakage import leakage
from simulations.health.measures import measured
from simulations.health.report import LIBRARY
from simulations.shared.options import option
from simulations.shared.results import Results

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Who is held out, what is new, and how often."""

    seeds: tuple[int, ...] = option((0, 1, 2), quick=(0,))
    held_out: tuple[int, ...] = option(tuple(wearables.HELD_OUT), help="people, two or more: 6 7 to choose by")
    novel: tuple[int, ...] = option(tuple(range(KNOWN + 1)), quick=(6,), help="numbers of exercises")
    rounds: int = option(40, quick=4, help="of the server's training")
    targets: int = option(100, quick=10, help="of the attacks")
    rivals: tuple[str, ...] = option(("none", PRIVATE), quick=(), help="policies under which other methods are tried")


def study(options: Options) -> Results:
    """Run all folds, attacks and cases."""
    if len(options.held_out) < 2:
        raise ConfigError("--held-out must name two people or more: a threshold comes from the others")
    torch.set_num_threads(1)
    windows, err = Windows(), Console(stderr=True)
    found = cases(options.seeds)
    if not any(case["case"] == "bleeding" for case in found):
        err.print("left out: the recorded series, for which the package aeon 1.6.0 is not there")
    folds: list[Row] = []
    leaked: list[Row] = []
    for (layer, policy), every in CELLS.items():
        for seed, novel in product(options.seeds, options.novel):
            folds += Fold(windows, novel, layer, policy, seed).rows(options)
            spent = f"{time.process_time() / 60:.1f} CPU minutes so far"
            err.print(f"{layer}, {policy}: seed {seed}, {wearables.CLASSES[novel]} is new ({spent})")
        attacked = options.seeds if every else options.seeds[:1]
        leaked += [leakage(windows, layer, policy, seed, options.targets) for seed in attacked]
    return {"folds": folds, "leakage": leaked, "cases": found}


def cases(seeds: tuple[int, ...]) -> list[Row]:
    """Return what is found in the two small cases, where their data are there."""
    found = []
    for case, policy, seed in product((tumours, bleeding), ("none", PRIVATE), seeds):
        if scores := case(POLICIES[policy].dropping, POLICIES[policy].width, seed):
            found.append({"case": case.__name__, "policy": policy, "seed": seed, **scores})
    return found


@dataclass(frozen=True)
class Fold:
    """One novelty, first layer, policy and seed."""

    windows: Windows
    novel: int
    layer: str
    policy: str
    seed: int

    def rows(self, options: Options) -> list[Row]:
        """Return the measures of each method and held-out person."""
        releases, rows = self.releases(options.held_out), []
        named = {"seed": self.seed, "layer": self.layer, "policy": self.policy, "novel": self.novel}
        rivals = self.layer == "donors" and self.policy in options.rivals
        for name, method in methods(releases, options.rounds, rivals=rivals):
            for own in (True, False) if method.own else (False,):
                watching = own and name == LIBRARY
                found = measured(method, self.windows, releases, options.held_out, own=own, watching=watching)
                rows += [{**named, "method": name, "calibrated": own, **person} for person in found]
        return rows

    def releases(self, held_out: tuple[int, ...]) -> Releases:
        """Return what devices release, and how a trunk for it is drawn."""
        windows, targets = self.windows, self.windows.targets(self.novel)
        first = split_model(windows, self.novel, self.layer, POLICIES[self.policy], self.seed).first_layer
        training = np.isin(windows.person, TRAINING) & ~np.isin(windows.person, held_out) & (targets < KNOWN)

        def trunk(outputs: int) -> torch.nn.Module:
            torch.manual_seed(seed_of(self.seed, "model"))
            return build_model("sensor-cnn", windows.x.shape[1:], outputs, first.cut_shape[0], "relu").trunk

        return Releases(
            released(first, POLICIES[self.policy].dropping, windows.x, windows.device, targets, self.seed),
            recording=KNOWN * windows.device + targets,
            training=np.flatnonzero(training),
            trunk=trunk,
            cut_shape=first.cut_shape,
            outputs=KNOWN,
            seed=self.seed,
        )


def methods(releases: Releases, rounds: int, *, rivals: bool) -> Iterator[tuple[str, Method]]:
    """Yield the library's method, and if asked for all others."""
    yield LIBRARY, recordings(releases, rounds)
    if rivals:
        yield f"{LIBRARY}, untrained", recordings(releases, 0)
        yield from classifier(releases, rounds).items()
        yield "neighbours, releases", neighbours(releases)
        yield "Deep SVDD", svdd(releases)
        yield "autoencoder", autoencoder(releases)
