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
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, field_validator, model_serializer
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedsplit.common.arrays import FloatArray
from fedsplit.common.errors import ConfigError, DataError
from fedsplit.common.files import replacing
from fedsplit.data import Scaling
from fedsplit.model.activations import ACTIVATIONS
from fedsplit.model.kinds import kind_named
from fedsplit.model.layer import FirstLayer
from fedsplit.model.tasks import TASKS, is_task_name, task_of
from fedsplit.model.tasks.base import Task
from fedsplit.release.chosen import built_in, from_outside, numbers_of, with_noise
from fedsplit.release.policies import BUILT_IN
from fedsplit.release.policy import Policy
from fedsplit.wire.exchange import weights_digest

DESCRIPTION, WEIGHTS = "device.json", "first_layer.safetensors"


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is not given, so that files are as they were when there was no such key."""
    return {key: value for key, value in values.items() if value is not None}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Layer(_Strict):
    """What a first layer is, besides its weights; ``numbers`` are the activation's own, where they are unusual."""

    kind: str
    arguments: dict[str, int | tuple[int, ...]]
    bias: bool
    activation: str
    numbers: dict[str, float | str] | None = None
    input_shape: tuple[int, ...]

    @model_serializer(mode="wrap")
    def _plain(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _given(whole(self))


class Dropping(_Strict):
    """A policy and its numbers; ``fields`` are those of one that does not come with fedsplit."""

    policy: str
    keep: float = 1.0
    k: int = 0
    bits: int = 0
    clip: float = 0.0
    noise: float = 0.0
    fields: dict[str, bool | int | float | str] | None = None

    @classmethod
    def of(cls, policy: Policy) -> "Dropping":
        """Return what stands for a policy."""
        name, numbers = numbers_of(policy)
        if name in BUILT_IN:
            return cls(policy=name, **numbers)
        noise = {key: numbers.pop(key) for key in ("clip", "noise") if key in numbers}
        return cls(policy=name, fields=numbers, **noise)

    def built(self, allow: Collection[str] = ()) -> Policy:
        """Return the policy; raises ConfigError. Code from outside is imported only if it is allowed."""
        if self.fields is None:
            return built_in(**self.model_dump(exclude={"policy", "fields"}), name=self.policy)
        if self.policy not in allow:
            raise ConfigError(f"policy {self.policy!r} is code from outside, and not allowed")
        return with_noise(from_outside(self.policy, self.fields), self.clip, self.noise)

    @model_serializer(mode="wrap")
    def _plain(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _given(whole(self))


class _Description(_Strict):
    format: Literal[1]
    model: str
    task: str
    outputs: int
    layer: Layer
    dropping: Dropping
    dtype: Literal["float16", "float32"]
    scaling: Scaling
    sha256: str

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        if not is_task_name(task):
            raise ValueError("there is no such task")
        return task


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
        description = _Description(
            format=1,
            model=self.model,
            task=self.task.name,
            outputs=self.outputs,
            layer=described(self.layer),
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
            found = _Description(**json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")))
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
            layer = _built(found.layer)
            layer.load_weights(load(content))
            scaling = found.scaling
            dropping.fits(layer)
            if 0.0 in scaling.divide or scaling.apply(np.zeros((1, *layer.input_shape))).shape[1:] != layer.input_shape:
                raise ValueError
        except (ConfigError, SafetensorError, RuntimeError, TypeError, ValueError, KeyError):
            raise DataError(f"{folder / DESCRIPTION} does not describe a model that can be built") from None
        bundle = cls(layer, dropping, found.dtype, scaling, task, found.outputs)
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


def described(layer: FirstLayer) -> Layer:
    """Return what a layer is, besides its weights; raises ConfigError if its kind cannot be exported."""
    return Layer(
        kind=layer.kind.name,
        arguments=layer.kind.describe(),
        bias="bias" in layer.shapes,
        activation=layer.nonlinearity.name,
        numbers=layer.nonlinearity.numbers or None,
        input_shape=layer.input_shape,
    )


def _built(found: Layer) -> FirstLayer:
    module = kind_named(found.kind).build(found.arguments, bias=found.bias)
    if found.activation not in ACTIVATIONS:
        raise ConfigError(f"activation {found.activation!r} is not known here")
    return FirstLayer(module, ACTIVATIONS[found.activation](**(found.numbers or {})), found.input_shape)
