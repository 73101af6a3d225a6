"""Rivals of the task `novelty`: other ways to say how new a release is, all from the same releases.

A method turns every release into a row, and some rows into what is normal: those of all training devices (as usual), or
those of a device's own normal windows (calibrated), where the method can. An episode of windows is judged by its mean
row, or by its mean score where there are no rows to average. Settings were chosen on people 1..7 (`--held-out 6 7`),
for every method alike.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsplit.guard.releaser import Releaser
from fedsplit.model.layer import FirstLayer
from fedsplit.model.tasks import task_of
from fedsplit.release.making import Chunk
from fedsplit.release.policy import Policy
from fedsplit.release.streams import simulation_secret
from fedsplit.server.batches import Batches, minibatches
from fedsplit.server.novelty.space import Features, Normal, Space, features
from fedsplit.server.novelty.trunk import NoveltyTrunk
from fedsplit.server.trunk import Trunk, TrunkOptions

Rows = NDArray[np.int64]
OPTIONS = TrunkOptions("adam", 0.002, 0.0, 0.0, "cosine", 64, 1, thinning=0.5)  # as in wearables-novelty.toml
_POINTS, _CODE = 32, 128  # numbers that Deep SVDD and the autoencoder make of a release
_LR, _BATCH = 1e-3, 64  # of these two
_OWN_STEPS = 200  # of the autoencoder on a device's own windows


class Scorer(Protocol):
    """What is normal, as :func:`fedsplit.server.novelty.trunk.judge` asks for it."""

    def scores(self, rows: Features) -> Features:
        """Return how new each window is."""

    def episode_score(self, rows: Features) -> float:
        """Return how new some windows are together."""


@dataclass(frozen=True)
class Releases:
    """What a server has: releases of all windows, and which of them are the training devices' normal ones.

    Attributes
    ----------
    batches : Batches
        Targets are the device's recording, as in a task ``novelty``.
    recording : int64 array (windows,)
    training : int64 array
        Rows.
    trunk : Callable
        Draws a module anew, for so many outputs.
    cut_shape : tuple[int, ...]
    outputs, seed : int
        Known exercises, of which each device has one recording; what decides all that is drawn.
    """

    batches: Batches
    recording: Rows
    training: Rows
    trunk: Callable[[int], nn.Module]
    cut_shape: tuple[int, ...]
    outputs: int
    seed: int

    @property
    def dense(self) -> Features:
        """The releases ``(windows, width)``, made unit vectors."""
        dense = self.batches.dense(np.arange(len(self.batches)))[0].astype(np.float64)
        return units(dense)


def units(rows: Features) -> Features:
    """Return rows made unit vectors."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6))


def released(
    layer: FirstLayer, dropping: Policy, x: NDArray[np.floating], device: Rows, targets: Rows, seed: int
) -> Batches:
    """Return what devices release of all their records, which come device by device."""
    devices, counts = np.unique(device, return_counts=True)
    index = np.concatenate([np.arange(n) for n in counts])
    chunk = Chunk(devices, counts, index, index[:, None], x, targets)
    weights = layer.flatten(layer.initial_weights())
    releaser = Releaser(layer, dropping, "float16", partial(simulation_secret, seed))
    return Batches.join([releaser.unguarded(chunk, weights, "health")])


@dataclass(frozen=True)
class Method:
    """A row of every window, and what some windows' rows say is normal; whether a device's own can."""

    rows: Features
    normal: Callable[[Rows], Scorer]
    own: Callable[[Rows], Scorer] | None


@dataclass(frozen=True)
class Nearest:
    """Distances to the nearest of some rows."""

    known: Features

    def scores(self, rows: Features) -> Features:
        """Return squared distances."""
        return np.asarray(np.square(rows).sum(axis=1) + (self._squares - 2 * rows @ self.known.T).min(axis=1))

    @cached_property
    def _squares(self) -> Features:
        return np.asarray(np.square(self.known).sum(axis=1))

    def episode_score(self, rows: Features) -> float:
        """Judge the mean row."""
        return float(self.scores(rows.mean(axis=0, keepdims=True))[0])


@dataclass(frozen=True)
class Score:
    """Any function of rows; an episode has the mean of its windows' scores."""

    scores: Callable[[Features], Features]

    def episode_score(self, rows: Features) -> float:
        """Average."""
        return float(self.scores(rows).mean())


def recordings(releases: Releases, rounds: int) -> Method:
    """Return the library's: a trunk that tells recordings apart, centres of recordings in its whitened features.

    With 0 rounds the trunk stays as it was drawn: what whitening and calibration find when it learns nothing.
    """
    r = releases
    known = r.batches.take(r.training)
    trunk = NoveltyTrunk(
        r.trunk(int(r.batches.devices.max() + 1) * r.outputs),
        r.cut_shape,
        task_of("novelty"),
        r.outputs,
        OPTIONS,
        rounds,
        r.seed,
    )
    for round_number in range(1, rounds + 1):
        trunk.train(known, 0, round_number)
    found = features(trunk.module, r.cut_shape, r.batches)
    units = Space.of(found[r.training], r.recording[r.training]).units(found)

    def normal(rows: Rows) -> Scorer:
        return Normal.of(units[rows], r.recording[rows])

    return Method(units, normal, normal)


def classifier(releases: Releases, rounds: int) -> dict[str, Method]:
    """Return what is made of a trunk that learns to classify the known exercises, by name.

    Largest logit (Hendrycks et al., ICML 2022), energy (Liu et al., NeurIPS 2020), Mahalanobis distance to the classes
    (Lee et al., NeurIPS 2018) and nearest neighbours (Sun et al., ICML 2022) of its features.
    """
    r = releases
    trunk = Trunk(r.trunk(r.outputs), r.cut_shape, task_of("classification"), r.outputs, OPTIONS, rounds, r.seed)
    known = r.batches.take(r.training)
    for round_number in range(1, rounds + 1):
        trunk.train(known, 0, round_number)
    logits = trunk.predict(r.batches).astype(np.float64)
    found, classes = features(trunk.module, r.cut_shape, r.batches), r.batches.targets
    space = Space.of(found[r.training], classes[r.training])
    return {
        "largest logit": Method(logits, lambda _: Score(_largest), None),
        "energy": Method(logits, lambda _: Score(_energy), None),
        "Mahalanobis": _of_means((found - space.mean) @ space.whitening, classes),
        "neighbours, classifier": _of_neighbours(units(found)),
    }


def _largest(logits: Features) -> Features:
    return np.asarray(-logits.max(axis=1))


def _energy(logits: Features) -> Features:
    return np.asarray(-np.logaddexp.reduce(logits, axis=1))


def neighbours(releases: Releases) -> Method:
    """Return nearest neighbours of the releases themselves."""
    return _of_neighbours(releases.dense)


def _of_means(rows: Features, groups: Rows) -> Method:
    def normal(chosen: Rows) -> Scorer:
        return Nearest(np.stack([rows[chosen][groups[chosen] == g].mean(axis=0) for g in np.unique(groups[chosen])]))

    return Method(rows, normal, normal)


def _of_neighbours(rows: Features) -> Method:
    def normal(chosen: Rows) -> Scorer:
        return Score(Nearest(rows[chosen]).scores)

    return Method(rows, normal, normal)


def svdd(releases: Releases) -> Method:
    """Return Deep SVDD (Ruff et al., ICML 2018): distances to the centre that all normal windows are drawn to.

    Calibrated, the centres are those of the device's own recordings instead.
    """
    r = releases
    torch.manual_seed(r.seed)
    net = _without_constants(r.cut_shape)
    dense = torch.from_numpy(r.dense.astype(np.float32))
    with torch.no_grad():
        centre = net(dense[r.training]).mean(dim=0)
    _fit(net, dense[r.training], lambda x: (net(x) - centre).square().sum(dim=1).mean(), 15, r.seed)
    with torch.no_grad():
        rows = net.eval()(dense).double().numpy()
    own = _of_means(rows, r.batches.targets).normal
    return Method(rows, lambda _: Nearest(centre.double().numpy()[None]), own)


def _without_constants(cut_shape: tuple[int, ...]) -> nn.Sequential:
    """Return the trunk's layers, none of which adds a constant: with one all windows could be made the centre."""
    return nn.Sequential(
        nn.Unflatten(1, cut_shape),
        nn.Conv1d(cut_shape[0], 64, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm1d(64, affine=False),
        nn.ReLU(),
        nn.Conv1d(64, 64, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm1d(64, affine=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(64, _POINTS, bias=False),
    )


def autoencoder(releases: Releases) -> Method:
    """Return how badly an autoencoder of releases brings them back; calibrated, it goes on with the device's own."""
    torch.manual_seed(releases.seed)
    rows = releases.dense
    shared = Autoencoder(rows.shape[1])
    known = torch.from_numpy(rows[releases.training].astype(np.float32))
    _fit(shared.net, known, lambda x: shared.errors(x).mean(), 40, releases.seed)
    return Method(rows, lambda _: Score(shared.scores), lambda chosen: Score(shared.calibrated(rows[chosen]).scores))


class Autoencoder:
    """Brings releases of some width back from fewer numbers."""

    def __init__(self, width: int) -> None:
        sizes = (width, 128, _CODE, 128, width)
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*layers[:-1])

    def errors(self, x: Tensor) -> Tensor:
        """Return the squared distance of each release from what is brought back."""
        found: Tensor = (self.net(x) - x).square().sum(dim=1)
        return found

    def scores(self, rows: Features) -> Features:
        """Return the same of float64 rows."""
        with torch.no_grad():
            return np.asarray(self.errors(torch.from_numpy(rows.astype(np.float32))).double().numpy())

    def calibrated(self, rows: Features) -> "Autoencoder":
        """Return another one that has learned from some rows, too."""
        mine = copy.deepcopy(self)
        x, optimizer = torch.from_numpy(rows.astype(np.float32)), torch.optim.Adam(mine.net.parameters(), _LR)
        for _ in range(_OWN_STEPS):
            _step(optimizer, mine.errors(x).mean())
        return mine


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _fit(net: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], epochs: int, seed: int) -> None:
    optimizer = torch.optim.Adam(net.parameters(), _LR)
    net.train()
    for epoch in range(epochs):
        for rows in minibatches(np.random.default_rng([seed, epoch]).permutation(len(x)), _BATCH):
            _step(optimizer, loss(x[rows]))
