"""The two ways to a prediction: the whole network on the server, and a device's half of it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsplit.data import Scaling
from fedsplit.device.bundle import Bundle
from fedsplit.device.home import Home
from fedsplit.guard.releaser import Releaser
from fedsplit.model.layer import FirstLayer
from fedsplit.plan.experiment import Experiment
from fedsplit.release.making import Chunk
from fedsplit.runs.folder import run_settings
from fedsplit.service.served import Served
from fedsplit.wire.exchange import weights_digest
from fedsplit.wire.query import Query
from simulations.shared.settings import tested

Raw = NDArray[Any]


class Whole:
    """The whole network on the server, from raw bytes."""

    def __init__(self, served: Served, like: Raw) -> None:
        self._layer: FirstLayer = served.bundle.layer
        self._weights = self._layer.initial_weights()
        self._trunk, self._scaling = served.trunk, served.bundle.scaling
        self._dtype, self._shape = like.dtype, like.shape[1:]

    def __call__(self, plain: bytes) -> NDArray[np.float32]:
        """Return the outputs."""
        x = self.scaled(np.frombuffer(plain, self._dtype).reshape(-1, *self._shape))
        with torch.no_grad():
            cut = self._layer.activation(self._layer.pre_activations(self._weights, x))
            found: NDArray[np.float32] = self._trunk(cut).numpy()
        return found

    def scaled(self, raw: Raw) -> NDArray[np.float32]:
        """Return what the network takes."""
        return self._scaling.apply(raw.astype(np.float64))


class Split:
    """The device's half without guard and ledger: scaling, first layer, dropping, packing."""

    def __init__(self, bundle: Bundle, home: Home) -> None:
        secret = home.device_secret(home.devices[0])
        self._releaser = Releaser(bundle.layer, bundle.dropping, bundle.dtype, lambda _: secret)
        self._scaling, self._weights = bundle.scaling, bundle.weights
        self._layer = weights_digest(self._weights)

    def __call__(self, raw: Raw) -> bytes:
        """Return a packed query."""
        n = len(raw)
        x = self._scaling.apply(raw.astype(np.float64)).astype(np.float64)
        index, nothing = np.arange(n), np.zeros(n, np.int64)
        chunk = Chunk(np.array([0]), np.array([n]), index, index[:, None], x, nothing)
        return Query(self._layer, self._releaser.unguarded(chunk, self._weights, "study")).to_bytes()


def records_of(run: Path, served: Served) -> Raw:
    """Return the raw test records of a run."""
    return raw_records(served.bundle.scaling, tested(Experiment(run_settings(run)).source).x)


def raw_records(scaling: Scaling, x: NDArray[np.float32]) -> Raw:
    """Return raw numbers: bytes if they are whole and fit, else float32."""
    raw = scaling.undo(x)
    whole = np.rint(raw)
    fits = np.abs(whole - raw).max() < 1e-3 and whole.min() >= 0 and whole.max() <= 255
    return whole.astype(np.uint8) if fits else raw.astype(np.float32)
