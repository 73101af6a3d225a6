"""What a device needs of a model besides weights: the first layer, the policy, the wire format, scaling and task.

Prediction keeps it in a file (:mod:`fedsplit.device.bundle`), training sends it (:mod:`fedsplit.wire.terms`). Whoever
reads it trusts nothing of it: a layer is first built without memory, so that its size is known before any is taken.
"""

import math
from collections.abc import Collection
from reprlib import repr as shortened
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer
from torch import nn

from fedsplit.common.errors import ConfigError
from fedsplit.data import Scaling
from fedsplit.model.layer import ACTIVATIONS, FirstLayer
from fedsplit.release.chosen import built_in, from_outside, numbers_of, with_noise
from fedsplit.release.policies import BUILT_IN
from fedsplit.release.policy import Policy

LARGEST = 2**26
"""The most numbers that a record, a first layer's parameters or its outputs of a record may have."""
_LAYERS: dict[str, type[nn.Module]] = {"Linear": nn.Linear, "Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d}
_TOLD = 300  # characters of an error's text
_OF_LINEAR = ("in_features", "out_features")
_OF_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_OF_ACTIVATIONS = {"leaky_relu": ("negative_slope",), "gelu": ("approximate",)}
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

    ``arguments`` are those of the torch module ``kind``; ``numbers`` those of the activation that differ from usual.
    """

    kind: Literal["Linear", "Conv1d", "Conv2d"]
    arguments: dict[str, int | Sizes]
    bias: bool
    activation: Literal["relu", "leaky_relu", "tanh", "sigmoid", "gelu", "identity"]
    numbers: dict[Literal["negative_slope", "approximate"], Slope | Literal["none", "tanh"]] = Field(
        default_factory=dict
    )
    input_shape: Sizes

    @classmethod
    def of(cls, layer: FirstLayer) -> Self:
        """Return what a layer is, besides its weights; raises ConfigError if its activation is a class of one's own."""
        module: Any = layer.layer
        names = _OF_LINEAR if isinstance(module, nn.Linear) else _OF_CONVOLUTION
        found = [name for name, kind in ACTIVATIONS.items() if type(layer.activation) is kind]
        if not found:
            raise ConfigError(f"activation {type(layer.activation).__name__} cannot be described to devices")
        (activation,) = found
        usual = ACTIVATIONS[activation]()
        given = {name: getattr(layer.activation, name) for name in _OF_ACTIVATIONS.get(activation, ())}
        return cls.made(
            kind=type(module).__name__,
            arguments={name: getattr(module, name) for name in names},
            bias=module.bias is not None,
            activation=activation,
            numbers={name: value for name, value in given.items() if value != getattr(usual, name)},
            input_shape=layer.input_shape,
        )

    def build(self) -> FirstLayer:
        """Return the layer, with weights of 0: those to use come from elsewhere.

        Raises
        ------
        ConfigError
            If there is no such layer, or it is too large.
        """
        self._check_arguments()
        try:
            with torch.device("meta"):  # parameters without memory
                module = self._module()
            activation = ACTIVATIONS[self.activation](**self.numbers)
            activation(torch.zeros(1))
            outputs = self._most_outputs(module)
        except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError):
            raise ConfigError(f"layer: a {self.kind} with these arguments cannot be built") from None
        largest = max(outputs, *(p.numel() for p in module.parameters()))
        if largest > LARGEST:
            raise ConfigError(f"layer: must be of at most {LARGEST} numbers, got {largest}")
        module = module.to_empty(device="cpu")
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
        return FirstLayer(module, activation, self.input_shape)

    def _check_arguments(self) -> None:
        taken = _OF_LINEAR if self.kind == "Linear" else _OF_CONVOLUTION
        if set(self.arguments) != set(taken):
            raise ConfigError(f"layer: a {self.kind} takes {', '.join(taken)}, and nothing else")
        if unknown := set(self.numbers) - set(_OF_ACTIVATIONS.get(self.activation, ())):
            raise ConfigError(f"layer: activation {self.activation} takes no {min(unknown)}")
        if not all(0 < size <= LARGEST for size in self.input_shape) or math.prod(self.input_shape) > LARGEST:
            raise ConfigError(f"layer: input_shape must be of 1..{LARGEST} numbers")

    def _most_outputs(self, module: Any) -> int:
        """Return how many outputs a record has at most: those of a convolution with a stride of 1."""
        if self.kind == "Linear":
            return int(module.out_features * math.prod(self.input_shape[:-1]))
        wide = (n + 2 * p for n, p in zip(self.input_shape[1:], module.padding, strict=True))
        return int(module.out_channels * math.prod(wide))

    def _module(self) -> nn.Module:
        arguments: dict[str, Any] = {**self.arguments}
        return _LAYERS[self.kind](**arguments, bias=self.bias)


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
        return {key: value for key, value in whole(self).items() if value is not None}


class Description(Strict):
    """What a device needs of a model, besides the first layer's weights.

    Attributes
    ----------
    task : str
        One of :data:`fedsplit.data.TASKS`.
    outputs : int
        As in :class:`fedsplit.data.Source`.
    layer : Layer
    dropping : Dropping
    dtype : str
        Of activations on the wire.
    scaling : Scaling
        From raw numbers to records.
    """

    task: Literal["classification", "binary", "regression", "novelty"]
    outputs: Annotated[int, Field(ge=1, lt=2**31)]
    layer: Layer
    dropping: Dropping
    dtype: Literal["float16", "float32"]
    scaling: Scaling

    def build(self, policy: Policy) -> FirstLayer:
        """Return the first layer, which policy and scaling fit, with weights of 0; raises ConfigError."""
        layer, scaling = self.layer.build(), self.scaling
        policy.fits(layer)
        lengths = {len(scaling.subtract), len(scaling.divide)} - {1, layer.input_shape[0]}
        if 0.0 in scaling.divide or lengths or not np.isfinite([*scaling.subtract, *scaling.divide]).all():
            raise ConfigError(f"scaling does not fit records of shape {layer.input_shape}")
        return layer
