"""What a kind of first layer is, and which kind a torch module is of.

A device computes the layer; its owner's guard needs its linear map and what sums of its gradients tell; the server
needs its gradient's attacks for an audit. All of that is one object, made once for a layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fedsplit.common.errors import ConfigError

Parameters = Mapping[str, Tensor]
Kind = TypeVar("Kind", bound="type[LayerKind]")
_REGISTERED: dict[type[nn.Module], "type[LayerKind]"] = {}


class Graph(Protocol):
    """An ONNX graph that is being built."""

    def constant(self, name: str, value: Any) -> str:
        """Add a float32 constant and return its name."""

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add a node and return the name of its output."""


class LayerKind(ABC):
    """A first layer ``z = A x + b`` without its activation; ``A`` and ``b`` depend on the parameters alone.

    Parameters
    ----------
    module : nn.Module
    input_shape : tuple[int, ...]
        Of one record; it has ``n`` numbers.

    Attributes
    ----------
    name : str
        In ``device.json``.
    dense : bool
        Whether a sum of the weights' gradients is ``delta' X``, delta ``(records, outputs)``: then records are
        determined one by one, and no number of one before another.

    Raises
    ------
    ConfigError
        If the module is of this kind but with something that the kind does not do, or records do not fit it.
    """

    name: ClassVar[str]
    dense: ClassVar[bool] = False

    def __init__(self, module: nn.Module, input_shape: tuple[int, ...]) -> None:
        self.module = module
        self.input_shape = input_shape

    def inputs(self, x: Tensor) -> Tensor:
        """Return records ``(records, *input_shape)`` as the module takes them."""
        return x

    def run(self, parameters: Parameters, x: Tensor) -> Tensor:
        """Return z ``(records, *cut_shape)`` under some parameters."""
        return torch.func.functional_call(self.module, dict(parameters), (self.inputs(x),))  # type: ignore[no-any-return]

    @abstractmethod
    def linear(self, parameters: Parameters) -> Parameters:
        """Return parameters of the same rows A, and no more than decide them; :meth:`apply` and others take these."""

    @abstractmethod
    def apply(self, linear: Parameters, x: Tensor) -> Tensor:
        """Return A x ``(records, *cut_shape)``."""

    @abstractmethod
    def transpose(self, linear: Parameters, d: Tensor) -> Tensor:
        """Return A' d, of as many numbers as x, for ``d (records, *cut_shape)``."""

    @abstractmethod
    def norms(self, linear: Parameters) -> Tensor:
        """Return the norm of every row of A, ``(width,)``."""

    @abstractmethod
    def kernels(self, linear: Parameters) -> Tensor:
        """Return the distinct rows of A without what is zero by construction, ``(rows, numbers)``."""

    @abstractmethod
    def gradient(self, x: Tensor, d: Tensor) -> list[Tensor]:
        """Return the gradients of ``sum(d * z)`` by the parameters, in their order."""

    @abstractmethod
    def of_records(self, gradient: Tensor, deltas: Tensor) -> Tensor:
        """Return the part ``(p,)`` of a flat sum of gradients that is linear in the records: ``sum_i G_i' x_i``.

        Parameters
        ----------
        gradient : Tensor (parameters,)
        deltas : Tensor (records, *cut_shape)
            Gradients at the outputs of the records that the sum is over.
        """

    @abstractmethod
    def operator(self, delta: Tensor) -> Tensor:
        """Return G ``(n, p)`` of a record, float64, for ``delta (*cut_shape)``."""

    @abstractmethod
    def spread(self, delta: Tensor) -> Tensor:
        """Return ``(groups, N, positions, q)``: what a position's numbers are multiplied by in the q gradients.

        Those of one position, one for each input channel of the group, have the same factors, each in its own part of
        the gradient. ``delta`` is ``(N, width)``, float64.
        """

    @property
    def describes(self) -> bool:
        """Whether the kind says with :meth:`describe` what it is."""
        return type(self).describe is not LayerKind.describe

    def describe(self) -> dict[str, Any]:
        """Return what :meth:`build` needs besides the parameters; raises ConfigError if the kind cannot be exported."""
        raise ConfigError(f"first layer {type(self.module).__name__} cannot be exported: its kind does not say how")

    @classmethod
    def build(cls, arguments: Mapping[str, Any], *, bias: bool) -> nn.Module:
        """Undo :meth:`describe`; raises ConfigError, TypeError or ValueError."""
        raise ConfigError(f"a first layer of kind {cls.name} cannot be built")

    def onnx(self, graph: Graph, x: str) -> str:
        """Add A x + b to a graph and return the output's name; raises ConfigError if the kind cannot."""
        raise ConfigError(f"first layer {type(self.module).__name__} has no form in ONNX: its kind does not say how")

    @abstractmethod
    def control(self, count: int) -> tuple[nn.Module, int]:
        """Return a fresh module whose raw gradient decides some records, and of how many: the audit's control.

        ``count`` is how many records there are. It is of this kind, and may be wider: a narrow one would not do.
        """


def register_layer_kind(*types: type[nn.Module]) -> Callable[[Kind], Kind]:
    """Register a class as the kind of some torch modules, by their very type."""

    def registered(kind: Kind) -> Kind:
        _REGISTERED.update(dict.fromkeys(types, kind))
        return kind

    return registered


def kind_of(module: nn.Module, input_shape: tuple[int, ...]) -> LayerKind:
    """Return what a first layer is, of the registered kinds or any other linear module; raises ConfigError."""
    from fedsplit.model.kinds.general import General

    return _REGISTERED.get(type(module), General)(module, input_shape)


def kind_named(name: str) -> type[LayerKind]:
    """Return a registered kind by its name in ``device.json``; raises ConfigError."""
    known = {kind.name: kind for kind in _REGISTERED.values()}
    if name not in known:
        raise ConfigError(f"first layers of kind {name!r} are not known here: {', '.join(known)}")
    return known[name]


def flat_weight(parameters: Parameters) -> Tensor:
    """Return a module's ``weight`` as rows ``(outputs, numbers)``."""
    return parameters["weight"].flatten(1)


def without_bias(module: nn.Module, parameters: Parameters) -> Parameters:
    """Return parameters with the ``weight`` alone, all others zero."""
    weight = parameters["weight"]
    zeros = {name: torch.zeros(p.shape, dtype=weight.dtype) for name, p in module.named_parameters()}
    return {**zeros, "weight": weight}


def double(array: Any) -> Tensor:
    """Return a float64 tensor, sharing memory where it can."""
    return torch.from_numpy(np.require(array, np.float64, ["C", "W"]))  # torch warns of arrays that cannot be written
