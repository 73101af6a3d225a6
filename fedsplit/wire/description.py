"""What a device needs of a model besides weights: the first layer, the policy, the wire format, scaling and task.

Prediction keeps it in a file (:mod:`fedsplit.device.bundle`), training sends it (:mod:`fedsplit.wire.terms`). Whoever
reads it trusts nothing of it: a layer is first built without memory, so that its size is known before any is taken.
"""

import math
from collections.abc import Collection
from reprlib import repr as shortened
from typing import Annotated, Any, Literal, Self, cast

import numpy as np
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)
from torch import nn

from fedsplit.common.errors import ConfigError
from fedsplit.common.plugins import resolve_function
from fedsplit.data import Scaling
from fedsplit.model.activations import ACTIVATIONS
from fedsplit.model.kinds import kind_named
from fedsplit.model.layer import FirstLayer
from fedsplit.model.split import SplitModel
from fedsplit.model.tasks import TASKS, is_task_name
from fedsplit.release.chosen import built_in, from_outside, numbers_of, with_noise
from fedsplit.release.policies import BUILT_IN
from fedsplit.release.policy import Policy

LARGEST = 2**26
"""The most numbers that a record, a first layer's parameters or its outputs of a record may have."""
_TOLD = 300  # characters of an error's text
Level = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = Annotated[int, Field(ge=0, lt=2**31)]
Sizes = Annotated[tuple[int, ...], Field(max_length=8)]
Word = Annotated[str, Field(min_length=1, max_length=200)]
Slope = Annotated[float, Field(ge=-1e6, le=1e6)]


class Strict(BaseModel):
    """A frozen table that refuses unknown keys; infinite numbers are words in its JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    @classmethod
    def made(cls, **fields: Any) -> Self:
        """Return a table of these fields; raises ConfigError in one line."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise refusal(error) from None


def refusal(error: ValidationError) -> ConfigError:
    """Say the first field that is not as it must be in one short line, whatever the text holds."""
    first = error.errors(include_url=False)[0]
    said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {shortened(first['input'])}"
    return ConfigError(f"the run's terms: {' '.join(said.split())[:_TOLD]}")


class Layer(Strict):
    """What a first layer is, besides its weights.

    ``arguments`` are those that the kind is built of; ``numbers`` those of the activation where they are unusual.
    """

    kind: Word
    arguments: dict[Word, int | Sizes]
    bias: bool
    activation: Word
    numbers: dict[Word, Slope | Word] | None = None
    input_shape: Sizes

    @classmethod
    def of(cls, layer: FirstLayer) -> Self:
        """Return what a layer is, besides its weights; raises ConfigError if its kind cannot be exported."""
        return cls.made(
            kind=layer.kind.name,
            arguments=layer.kind.describe(),
            bias="bias" in layer.shapes,
            activation=layer.nonlinearity.name,
            numbers=layer.nonlinearity.numbers or None,
            input_shape=layer.input_shape,
        )

    @property
    def outside(self) -> str | None:
        """There is no code in it."""
        return None

    def build(self, allow: Collection[str] = ()) -> FirstLayer:
        """Return the layer, with weights of 0: those to use come from elsewhere.

        Raises
        ------
        ConfigError
            If there is no such layer, or it is too large.
        """
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"layer: activation {self.activation!r} is not known here")
        if not all(0 < size <= LARGEST for size in self.input_shape) or math.prod(self.input_shape) > LARGEST:
            raise ConfigError(f"layer: input_shape must be of 1..{LARGEST} numbers")
        kind = kind_named(self.kind)
        try:
            with torch.device("meta"):  # parameters without memory
                module = kind.build(self._checked(), bias=self.bias)
            activation = ACTIVATIONS[self.activation](**(self.numbers or {}))
            activation(torch.zeros(1))
            outputs = _most_outputs(module, self.input_shape)
        except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError):
            raise ConfigError(f"layer: a {self.kind} with these arguments cannot be built") from None
        largest = max(outputs, *(p.numel() for p in module.parameters()))
        if largest > LARGEST:
            raise ConfigError(f"layer: must be of at most {LARGEST} numbers, got {largest}")
        module = module.to_empty(device="cpu")
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
        return FirstLayer(module, activation, self.input_shape)

    def _checked(self) -> dict[str, Any]:
        if "device" in self.arguments or "dtype" in self.arguments:  # which torch's modules take, too
            raise ValueError
        return dict(self.arguments)

    @model_serializer(mode="wrap")
    def _plain(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _given(whole(self))


class BuiltLayer(Strict):
    """A first layer that no description says: ``builder`` is the ``module:function`` that returns the whole model."""

    builder: Word
    input_shape: Sizes

    @property
    def outside(self) -> str | None:
        """The builder."""
        return self.builder

    def build(self, allow: Collection[str] = ()) -> FirstLayer:
        """Return the layer of the model that the builder returns; raises ConfigError. Only allowed code runs."""
        if self.builder not in allow:
            raise ConfigError(f"model.builder {self.builder!r} is code from outside, and not allowed")
        model = resolve_function(self.builder, "model.builder")()
        if not isinstance(model, SplitModel) or model.first_layer.input_shape != self.input_shape:
            raise ConfigError(f"model.builder {self.builder!r} must return a SplitModel of shape {self.input_shape}")
        return model.first_layer


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is not given, so that files are as they were when there was no such key."""
    return {key: value for key, value in values.items() if value is not None}


def _most_outputs(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Return how many outputs a record has at most: those of a convolution with a stride of 1."""
    if isinstance(module, nn.Linear):
        return module.out_features * math.prod(shape[:-1])
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return 0  # of a kind from outside, whose code is here
    padding = cast(tuple[int, ...], module.padding)
    return module.out_channels * math.prod(n + 2 * p for n, p in zip(shape[1:], padding, strict=True))


class Dropping(Strict):
    """A policy and its numbers; ``fields`` are those of one that does not come with fedsplit."""

    policy: Word
    keep: Level = 1.0
    k: Number = 0
    bits: Number = 0
    clip: Level = 0.0
    noise: Level = 0.0
    fields: dict[Word, bool | int | float | Word] | None = None

    @classmethod
    def of(cls, policy: Policy) -> Self:
        """Return what stands for a policy."""
        name, numbers = numbers_of(policy)
        if name in BUILT_IN:
            return cls.made(policy=name, **numbers)
        noise = {key: numbers.pop(key) for key in ("clip", "noise") if key in numbers}
        return cls.made(policy=name, fields=numbers, **noise)

    @property
    def outside(self) -> str | None:
        """The ``module:Name`` of a policy that does not come with fedsplit."""
        return None if self.fields is None else self.policy

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


class Description(Strict):
    """What a device needs of a model, besides the first layer's weights.

    Attributes
    ----------
    task : str
        As in :func:`fedsplit.model.tasks.task_of`.
    outputs : int
        As in :class:`fedsplit.data.Source`.
    layer : Layer or BuiltLayer
    dropping : Dropping
    dtype : str
        Of activations on the wire.
    scaling : Scaling
        From raw numbers to records.
    """

    task: Word
    outputs: Annotated[int, Field(ge=1, lt=2**31)]
    layer: Layer | BuiltLayer
    dropping: Dropping
    dtype: Literal["float16", "float32"]
    scaling: Scaling

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        if not is_task_name(task):
            raise ValueError("there is no such task")
        return task

    def named(self) -> dict[str, str]:
        """Return the code that it names as ``module:name``, by setting."""
        task = None if self.task in TASKS else self.task
        found = {"data.task": task, "dropping.policy": self.dropping.outside, "model.builder": self.layer.outside}
        return {setting: name for setting, name in found.items() if name is not None}

    def build(self, policy: Policy, allow: Collection[str] = ()) -> FirstLayer:
        """Return the first layer, which policy and scaling fit, not yet with its weights; raises ConfigError."""
        layer, scaling = self.layer.build(allow), self.scaling
        policy.fits(layer)
        lengths = {len(scaling.subtract), len(scaling.divide)} - {1, layer.input_shape[0]}
        if 0.0 in scaling.divide or lengths or not np.isfinite([*scaling.subtract, *scaling.divide]).all():
            raise ConfigError(f"scaling does not fit records of shape {layer.input_shape}")
        return layer
