"""A model whose trunk is here: what it makes of queries."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from fedsplit.common.arrays import FloatArray
from fedsplit.common.errors import DataError, WireError
from fedsplit.device.bundle import Bundle
from fedsplit.plan.experiment import Experiment
from fedsplit.runs.folder import RunFolder, bundle_of
from fedsplit.server.batches import Batches
from fedsplit.server.novelty.detector import DETECTOR, Detector
from fedsplit.server.novelty.space import Features, features
from fedsplit.server.trunk import TRUNK, trunk_outputs
from fedsplit.wire.coding import dequantise
from fedsplit.wire.query import MOST_RECORDS, Query
from fedsplit.wire.release import Release

_HEAD = 4096  # bytes of a request besides its records


@dataclass(frozen=True)
class Served:
    """A model whose trunk is here.

    Attributes
    ----------
    bundle : Bundle
        The device's half; of its weights only the name is needed.
    trunk : nn.Module
    name : str
    detector : Detector or None
        Of a task that watches: what is known of normal recordings.
    """

    bundle: Bundle
    trunk: nn.Module
    name: str
    detector: Detector | None = None

    @classmethod
    def of_run(cls, folder: Path) -> "Served":
        """Return the model of a run's last checkpoint; raises FedsplitError."""
        run = RunFolder(folder)
        experiment = Experiment(run.trained())
        model, bundle = experiment.model, bundle_of(experiment, run)
        path = run.checkpoint / TRUNK
        try:
            model.trunk.load_state_dict(load(path.read_bytes()))
        except (OSError, SafetensorError, RuntimeError):
            raise DataError(f"{path} is missing or damaged, or of another model") from None
        detector = _detector(run.checkpoint / DETECTOR) if bundle.task.watches else None
        return cls(bundle, model.trunk.eval(), bundle.model, detector)

    @property
    def facts(self) -> dict[str, Any]:
        """What clients are told of it; ``classes`` is 0 where outputs stand for none."""
        task, outputs = self.bundle.task, self.bundle.outputs
        classes = task.targets(outputs).classes
        return {
            "name": self.name,
            "task": task.name,
            "outputs": outputs,
            "classes": classes,
            "watches": task.watches,
        }

    @property
    def most_bytes(self) -> int:
        """How large a request can be."""
        width = self.bundle.layer.width
        return _HEAD + MOST_RECORDS * (4 * width + -(-width // 8) + 8)

    def read(self, payload: bytes) -> Release:
        """Return the release of a query that is for this model; raises WireError."""
        query = Query.from_bytes(payload)
        release, width = query.release, self.bundle.layer.width
        if f"{query.layer:016x}" != self.name:
            raise WireError(f"layer must be {self.name}, got {query.layer:016x}: export the model for the device anew")
        if release.width != width:
            raise WireError(f"width must be {width}, got {release.width}")
        if not 0 < len(release.counts) <= MOST_RECORDS:
            raise WireError(f"records must be 1..{MOST_RECORDS}, got {len(release.counts)}")
        return release

    def answers(self, payloads: Sequence[bytes]) -> Sequence[FloatArray | WireError]:
        """Return the trunk's outputs ``(records, outputs)`` for each of some queries, or why it is none."""
        try:
            return np.split(self.outputs([self.read(Query.join(payloads))]), len(payloads))
        except WireError:  # of one, or they are not alike: each by itself
            found = [self._read_or_why(payload) for payload in payloads]
        good = [release for release in found if isinstance(release, Release)]
        ends = np.cumsum([len(release.counts) for release in good])[:-1]
        parts = iter(np.split(self.outputs(good), ends) if good else [])
        return [why if isinstance(why, WireError) else next(parts) for why in found]

    def _read_or_why(self, payload: bytes) -> Release | WireError:
        try:
            return self.read(payload)
        except WireError as error:
            return error

    def outputs(self, releases: Sequence[Release]) -> FloatArray:
        """Return the trunk's outputs ``(records, outputs)`` for releases behind one another."""
        return trunk_outputs(self.trunk, self.bundle.layer.cut_shape, _batches(releases))

    def units(self, release: Release) -> Features:
        """Return where the records of a release lie in the detector's space, ``(records, features)``.

        Hooks into the trunk, which nothing else may use meanwhile.
        """
        assert self.detector is not None
        return self.detector.space.units(features(self.trunk, self.bundle.layer.cut_shape, _batches([release])))


def _detector(path: Path) -> Detector:
    try:
        return Detector.from_bytes(path.read_bytes())
    except OSError:
        raise DataError(f"{path} is missing: the run has not been evaluated yet") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _batches(releases: Sequence[Release]) -> Batches:
    counts = np.concatenate([release.counts for release in releases])
    nobody = np.zeros(len(counts), dtype=np.int64)
    return Batches(
        devices=nobody,
        targets=nobody,
        starts=np.concatenate([[0], np.cumsum(counts)]),
        bitmap=np.concatenate([release.bitmap for release in releases]),
        values=dequantise(
            np.concatenate([release.codes for release in releases]),  # of one kind that holds all of them exactly
            counts,
            np.concatenate([release.exponents for release in releases]),
        ),
        width=releases[0].width,
    )
