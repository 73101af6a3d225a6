"""A first layer's activation: derivative and inverse, from the module's own numbers.

An attacker inverts what was sent. Each output is known within an error (the wire's rounding, or noise); where it has
one preimage that error, times the inverse's slope, is the preimage's; where it has two, or a range, there are bounds.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedsplit.common.errors import ConfigError
from fedsplit.model.kinds.base import Graph

Array = NDArray[np.float64]
_HALVINGS = 60  # of an interval in which a preimage is sought: to the last bit of a float64
_WIDE = 40.0  # pre-activations beyond it are as good as infinite
_BY_TYPE: dict[type[nn.Module], "type[Activation]"] = {}
ACTIVATIONS: dict[str, type[nn.Module]] = {}
"""The modules of all activations, by their names in settings and in ``device.json``."""


@dataclass(frozen=True)
class Preimage:
    """Where pre-activations lie; float64 arrays of the outputs' shape.

    Attributes
    ----------
    point : array
        The most likely one, finite.
    deviation : array
        Standard deviation of ``point``; infinite where there is not one preimage that the output could be told from.
    low, high : array
        Bounds; infinite where there are none.
    """

    point: Array
    deviation: Array
    low: Array
    high: Array


class Activation(ABC):
    """An activation function and what is known of it, by default of one that increases strictly.

    Attributes
    ----------
    positive_only : bool
        Whether outputs are not negative, and one of zero means a derivative of zero, as for relu.
    unit_slope : bool
        Whether the derivative is 1 at every output but zero.
    """

    name: ClassVar[str]
    positive_only: ClassVar[bool] = False
    unit_slope: ClassVar[bool] = False

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @property
    def numbers(self) -> dict[str, float | str]:
        """The module's own numbers, by the names of its arguments, where they are not the usual ones."""
        return {}

    def derivative(self, pre_activations: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return the derivative at each value, any shape, in the values' dtype."""
        z = torch.from_numpy(pre_activations).requires_grad_()
        with torch.enable_grad():
            total = self.module(z).sum()
        return cast(NDArray[np.floating], torch.autograd.grad(total, z)[0].numpy())

    @abstractmethod
    def inverse(self, outputs: Array) -> Array:
        """Return the largest pre-activation that gives at most each output: infinite beyond the function's range."""

    def preimage(self, outputs: Array, error: Array, least: Array, most: Array) -> Preimage:
        """Return where pre-activations lie, of outputs that are known within an error.

        Parameters
        ----------
        outputs : float64 array
            The most likely ones.
        error : float64 array
            Standard deviation of each; infinite where only bounds are known.
        least, most : float64 arrays
            Bounds on each.
        """
        point, half = self.inverse(outputs), (self.inverse(outputs + error) - self.inverse(outputs - error)) / 2
        low, high = self.inverse(least), self.inverse(most)
        known = np.isfinite(point) & np.isfinite(half)
        return Preimage(_finite(point, low, high), np.where(known, half, np.inf), low, high)

    def within(self, limit: Array) -> tuple[Array, Array]:
        """Return bounds on pre-activations whose outputs are of a magnitude of at most ``limit``."""
        return self.inverse(-limit), self.inverse(limit)

    @abstractmethod
    def onnx(self, graph: Graph, x: str) -> str:
        """Add the function to an ONNX graph and return the output's name."""


def activation_of(module: nn.Module) -> Activation:
    """Return what is known of a module's function, by its very type; raises ConfigError."""
    if type(module) not in _BY_TYPE:
        raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {type(module).__name__}")
    return _BY_TYPE[type(module)](module)


def register_activation(module: type[nn.Module]) -> Callable[[type[Activation]], type[Activation]]:
    """Register a class as what is known of a torch module's function."""

    def registered(kind: type[Activation]) -> type[Activation]:
        _BY_TYPE[module] = kind
        ACTIVATIONS[kind.name] = module
        return kind

    return registered


@register_activation(nn.ReLU)
class Relu(Activation):
    """max(z, 0): an output of zero tells that z is not positive."""

    name, positive_only, unit_slope = "relu", True, True

    def inverse(self, outputs: Array) -> Array:
        """Return the output itself."""
        return outputs

    def preimage(self, outputs: Array, error: Array, least: Array, most: Array) -> Preimage:
        """Return the outputs themselves. An output of exactly zero, which noise never gives, has only bounds.

        Parameters
        ----------
        outputs, error, least, most : float64 arrays
            As in :meth:`Activation.preimage`.
        """
        found = super().preimage(outputs, error, least, most)
        low = np.where(least >= 0, found.low, -np.inf)
        return Preimage(outputs, np.where(outputs == 0, np.inf, found.deviation), low, found.high)

    def within(self, limit: Array) -> tuple[Array, Array]:
        """Return the limit alone."""
        return np.full(limit.shape, -np.inf), limit

    def onnx(self, graph: Graph, x: str) -> str:
        """Add Relu."""
        return graph.node("Relu", x)


@register_activation(nn.LeakyReLU)
class LeakyRelu(Activation):
    """Z, times the module's own slope where z is negative; a slope that is not positive makes outputs ambiguous."""

    name = "leaky_relu"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        if not np.isfinite(self.slope):
            raise ConfigError(f"the slope of {module} must be finite")

    @property
    def slope(self) -> float:
        """The module's ``negative_slope``."""
        return float(self.module.negative_slope)

    @property
    def numbers(self) -> dict[str, float | str]:
        """The slope."""
        return {} if self.slope == nn.LeakyReLU().negative_slope else {"negative_slope": self.slope}

    def inverse(self, outputs: Array) -> Array:
        """Return the output over the slope of its side."""
        if self.slope <= 0:
            return outputs
        return np.where(outputs < 0, outputs / self.slope, outputs)

    def preimage(self, outputs: Array, error: Array, least: Array, most: Array) -> Preimage:
        """Return the preimage; its bounds depend on the slope.

        With a slope below 0 an output has two preimages, and the bounds enclose both. With a slope of 0 it is as for
        relu.

        Parameters
        ----------
        outputs, error, least, most : float64 arrays
            As in :meth:`Activation.preimage`.
        """
        found = super().preimage(outputs, error, least, most)
        if self.slope > 0:
            return found
        if self.slope == 0:
            low = np.where(least >= 0, found.low, -np.inf)
            return Preimage(outputs, np.where(outputs == 0, np.inf, found.deviation), low, found.high)
        low = np.minimum(most / self.slope, least)
        return Preimage(outputs, np.full(outputs.shape, np.inf), low, found.high)

    def within(self, limit: Array) -> tuple[Array, Array]:
        """Return both sides' bounds."""
        low = np.full(limit.shape, -np.inf) if self.slope == 0 else -limit / abs(self.slope)
        return low, limit

    def onnx(self, graph: Graph, x: str) -> str:
        """Add LeakyRelu."""
        return graph.node("LeakyRelu", x, alpha=self.slope)


@register_activation(nn.Tanh)
class Tanh(Activation):
    """The hyperbolic tangent: an output that rounds to 1 bounds z from below alone."""

    name = "tanh"

    def inverse(self, outputs: Array) -> Array:
        """Return the area tangent."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.arctanh(np.clip(outputs, -1, 1)))

    def onnx(self, graph: Graph, x: str) -> str:
        """Add Tanh."""
        return graph.node("Tanh", x)


@register_activation(nn.Sigmoid)
class Sigmoid(Activation):
    """1 / (1 + exp(-z))."""

    name = "sigmoid"

    def inverse(self, outputs: Array) -> Array:
        """Return the logit."""
        inside = np.clip(outputs, 0, 1)
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(inside) - np.log1p(-inside))

    def onnx(self, graph: Graph, x: str) -> str:
        """Add Sigmoid."""
        return graph.node("Sigmoid", x)


@register_activation(nn.GELU)
class Gelu(Activation):
    """Z Phi(z): it falls to its least value and then increases, so negative outputs have two preimages."""

    name = "gelu"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        z = np.linspace(-1.5, 0, 15001)
        self._turn = float(z[np.argmin(self._function(z))])
        self._least = float(self._function(np.array([self._turn]))[0])

    @property
    def numbers(self) -> dict[str, float | str]:
        """Whether it is the approximation by tanh."""
        return {} if self.module.approximate == "none" else {"approximate": str(self.module.approximate)}

    def inverse(self, outputs: Array) -> Array:
        """Return the preimage right of the least value, by halving."""
        low, high = np.full(outputs.shape, self._turn), np.maximum(outputs, 0) + 1
        return self._halved(np.maximum(outputs, self._least), low, high, rising=True)

    def _left(self, outputs: Array) -> Array:
        """Return the preimage left of the least value, minus infinity of outputs that are not negative."""
        low, high = np.full(outputs.shape, -_WIDE), np.full(outputs.shape, self._turn)
        found = self._halved(np.clip(outputs, self._least, 0), low, high, rising=False)
        return np.where(outputs >= self._function(np.array([-_WIDE / 4]))[0], -np.inf, found)

    def preimage(self, outputs: Array, error: Array, least: Array, most: Array) -> Preimage:
        """Return the preimage of positive outputs, and bounds around both preimages of all others.

        Parameters
        ----------
        outputs, error, least, most : float64 arrays
            As in :meth:`Activation.preimage`.
        """
        found, positive = super().preimage(outputs, error, least, most), outputs > 0
        low = np.where(least > 0, found.low, self._left(most))
        return Preimage(found.point, np.where(positive, found.deviation, np.inf), low, found.high)

    def within(self, limit: Array) -> tuple[Array, Array]:
        """Return the bound from above: far below zero outputs are small, too."""
        return np.full(limit.shape, -np.inf), self.inverse(limit)

    def _function(self, z: Array) -> Array:
        return cast(Array, self.module(torch.from_numpy(z)).numpy())

    def _halved(self, outputs: Array, low: Array, high: Array, *, rising: bool) -> Array:
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            right = (self._function(middle) <= outputs) == rising
            low, high = np.where(right, middle, low), np.where(right, high, middle)
        return (low + high) / 2

    def onnx(self, graph: Graph, x: str) -> str:
        """Add z / 2 (1 + erf(z / sqrt 2)) or its approximation, of nodes that older runtimes have, too."""
        one, half = graph.constant("one", 1.0), graph.constant("half", 0.5)
        if self.module.approximate == "none":
            bend = graph.node("Erf", graph.node("Div", x, graph.constant("root", 2**0.5)))
        else:
            cube = graph.node("Mul", graph.node("Mul", x, x), graph.node("Mul", x, graph.constant("cubic", 0.044715)))
            scaled = graph.node("Mul", graph.node("Add", x, cube), graph.constant("scale", (2 / np.pi) ** 0.5))
            bend = graph.node("Tanh", scaled)
        return graph.node("Mul", x, graph.node("Mul", graph.node("Add", bend, one), half))


@register_activation(nn.Identity)
class Identity(Activation):
    """None."""

    name, unit_slope = "identity", True

    def inverse(self, outputs: Array) -> Array:
        """Return the output itself."""
        return outputs

    def onnx(self, graph: Graph, x: str) -> str:
        """Add Identity."""
        return graph.node("Identity", x)


def _finite(point: Array, low: Array, high: Array) -> Array:
    """Return points, where they are infinite the bound that is not."""
    nearest = np.where(np.isfinite(low), low, np.where(np.isfinite(high), high, 0.0))
    return np.where(np.isfinite(point), point, nearest)
