"""What a device needs to ask for predictions, and nothing more: the first layer, the policy, the scaling of its input.

A folder with ``device.json`` and ``first_layer.safetensors``, whose SHA-256 the former holds. The trunk is not in it.
Other files in it, such as ``first_layer.onnx``, are not read.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedsplit.common.arrays import FloatArray
from fedsplit.common.errors import ConfigError, DataError
from fedsplit.common.files import replacing
from fedsplit.data import Scaling
from fedsplit.model.layer import FirstLayer
from fedsplit.model.tasks import TASKS, task_of
from fedsplit.model.tasks.base import Task
from fedsplit.release.policy import Policy
from fedsplit.wire.description import Description, Dropping, Layer
from fedsplit.wire.exchange import weights_digest

DESCRIPTION, WEIGHTS = "device.json", "first_layer.safetensors"


class _File(Description):
    """What ``device.json`` holds: the description, and the weights that belong to it."""

    format: Literal[1]
    layer: Layer
    model: str
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """A device's half of a trained model.

    Attributes
    ----------
    layer : FirstLayer
        With the trained weights.
    dropping : Policy
    dtype : str
        Of activations on the wire.
    scaling : Scaling
        From raw numbers to records.
    task : Task
    outputs : int
    """

    layer: FirstLayer
    dropping: Policy
    dtype: str
    scaling: Scaling
    task: Task
    outputs: int

    @property
    def weights(self) -> FloatArray:
        """The first layer's parameters, flat."""
        return self.layer.flatten(self.layer.initial_weights())

    @property
    def model(self) -> str:
        """The name of the model: 16 hexadecimal digits of its first layer's parameters."""
        return model_name(self.weights)

    def files(self) -> dict[str, bytes]:
        """Return the contents of the folder's files by their names; raises ConfigError if they cannot hold it."""
        weights = save(self.layer.initial_weights())
        description = _File(
            format=1,
            model=self.model,
            task=self.task.name,
            outputs=self.outputs,
            layer=Layer.of(self.layer),
            dropping=Dropping.of(self.dropping),
            dtype=self.dtype,  # type: ignore[arg-type]
            scaling=self.scaling,
            sha256=sha256(weights).hexdigest(),
        )
        return {WEIGHTS: weights, DESCRIPTION: (description.model_dump_json(indent=2) + "\n").encode()}

    def save(self, folder: Path, others: Mapping[str, bytes] = MappingProxyType({})) -> None:
        """Write the folder, with other files by name; raises ConfigError if it is not empty, or cannot be written."""
        files = {**others, **self.files()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise ConfigError(f"folder {folder} is not empty: choose another")
            for name, content in files.items():
                with replacing(folder / name) as new:
                    new.write_bytes(content)
        except OSError as error:
            raise ConfigError(f"folder {folder} cannot be written: {error.strerror}") from None

    @classmethod
    def load(cls, folder: Path, allow: Collection[str] = ()) -> "Bundle":
        """Read a folder.

        Parameters
        ----------
        folder : Path
        allow : collection of str
            The policies and tasks from outside, as ``module:Name``, whose code the device's owner lets run.

        Raises
        ------
        DataError
            If it is missing or damaged, its two files do not belong together, or it names code that is not allowed.
        """
        try:
            found = _File(**json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")))
            content = (folder / WEIGHTS).read_bytes()
        except OSError as error:
            raise DataError(f"{folder} holds no model for devices: {error.strerror}; see fedsplit export") from None
        except (ValueError, TypeError, ConfigError):
            raise DataError(f"{folder / DESCRIPTION} is damaged, or of another version of fedsplit") from None
        if sha256(content).hexdigest() != found.sha256:
            raise DataError(f"{folder / WEIGHTS} is damaged: its SHA-256 is not the one in {DESCRIPTION}")
        try:
            dropping, task = found.dropping.built(allow), _task(found.task, allow)
        except ConfigError as error:
            raise DataError(f"{folder / DESCRIPTION}: {error}") from None
        try:
            layer = found.build(dropping)
            layer.load_weights(load(content))
        except (ConfigError, SafetensorError, RuntimeError, TypeError, ValueError, KeyError):
            raise DataError(f"{folder / DESCRIPTION} does not describe a model that can be built") from None
        bundle = cls(layer, dropping, found.dtype, found.scaling, task, found.outputs)
        if not np.isfinite(bundle.weights).all():
            raise DataError(f"{folder / WEIGHTS} is damaged: weights must be finite")
        if bundle.model != found.model:
            raise DataError(f"{folder / WEIGHTS} is not of the model {found.model}")
        return bundle


def _task(name: str, allow: Collection[str]) -> Task:
    if name not in TASKS and name not in allow:
        raise ConfigError(f"task {name!r} is not among what the device's owner allows (allow in node.toml)")
    return task_of(name)


def model_name(weights: FloatArray) -> str:
    """Return the name of a model, from its first layer's flat parameters."""
    return f"{weights_digest(weights):016x}"
