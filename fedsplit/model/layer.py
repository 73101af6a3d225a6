"""The network on both sides of the cut: the devices' first layer and the whole model it is cut from."""

import copy
import math
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsplit.common.errors import ConfigError
from fedsplit.model.activations import activation_of
from fedsplit.model.kinds import kind_of

Number = TypeVar("Number", bound=np.floating[Any])
Weights = dict[str, NDArray[np.float32]]
_FEW = 64  # rows; the kernels seen differ below 4 per thread


class FirstLayer:
    """The part of the network that devices hold: one linear layer of whatever kind and its activation.

    Parameters
    ----------
    layer : nn.Module
        Linear, Conv1d, Conv2d or any other module that is linear in a record; see :mod:`fedsplit.model.kinds`.
        Its parameters are the *initial* weights; every call takes the weights to use as an argument, because a
        node gets them anew with each message.
    activation : nn.Module
        One of ReLU, LeakyReLU, Tanh, Sigmoid, GELU, Identity.
    input_shape : tuple[int, ...]
        Shape of one record. A linear layer with as many inputs as a record has numbers takes it flattened.

    Attributes
    ----------
    kind : LayerKind
        All that is known of the layer.
    nonlinearity : Activation
        All that is known of the activation.

    Raises
    ------
    ConfigError
        If the layer or activation is not supported, or a record does not fit the layer.
    """

    def __init__(self, layer: nn.Module, activation: nn.Module, input_shape: tuple[int, ...]) -> None:
        self.kind = kind_of(layer, input_shape)
        self.layer = layer
        self.activation = copy.deepcopy(activation)
        if hasattr(self.activation, "inplace"):
            self.activation.inplace = False  # type: ignore[assignment]  # pre-activations are needed after it
        self.nonlinearity = activation_of(self.activation)
        self.input_shape = input_shape
        self.cut_shape = self._cut_shape()
        self.width = math.prod(self.cut_shape)
        self.shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}

    def _cut_shape(self) -> tuple[int, ...]:
        try:
            with torch.no_grad():
                return tuple(self.outputs(torch.zeros(1, *self.input_shape)).shape[1:])
        except RuntimeError:
            raise ConfigError(f"records of shape {self.input_shape} do not fit the first layer {self.layer}") from None

    @property
    def description(self) -> str:
        """All that decides the outputs besides weights and record: of a module of one's own its buffers, too."""
        buffers = [f"{name}={_digest(values)}" for name, values in self.layer.named_buffers()]
        return " ".join([str(self.layer), *buffers, str(self.activation), str(self.input_shape)])

    def unrolled(self) -> Tensor:
        """Return the layer's linear map as a matrix ``(width, numbers of a record)`` that gradients flow through."""
        n = math.prod(self.input_shape)
        ones = torch.eye(n).reshape(n, *self.input_shape)
        bias = self.outputs(torch.zeros(1, *self.input_shape))
        return (self.outputs(ones) - bias).reshape(n, -1).T

    def outputs(self, x: Tensor) -> Tensor:
        """Run the layer on ``(batch, *input_shape)`` with its own parameters, without the activation."""
        return cast(Tensor, self.layer(self.kind.inputs(x)))

    def initial_weights(self) -> Weights:
        """Return a copy of the layer's parameters as float32 arrays by name."""
        return {n: p.detach().numpy().astype(np.float32, copy=True) for n, p in self.layer.named_parameters()}

    def load_weights(self, weights: Mapping[str, NDArray[np.float32]]) -> None:
        """Make some parameters the initial ones."""
        own = {name: torch.from_numpy(np.array(w)) for name, w in weights.items()}
        self.layer.load_state_dict({**dict(self.layer.named_buffers()), **own})

    @property
    def positive_only(self) -> bool:
        """Whether an output of zero means a derivative of zero, as for relu: then no pattern bit is needed."""
        return self.nonlinearity.positive_only

    @property
    def unit_slope(self) -> bool:
        """Whether the derivative is 1 at every output that is sent."""
        return self.nonlinearity.unit_slope

    def pre_activations(self, weights: Mapping[str, NDArray[np.float32]], x: NDArray[Number]) -> Tensor:
        """Return Wx + b ``(records, *cut_shape)`` in the dtype of the records, float32 or float64."""
        # Matrix kernels choose by the number of rows when these are few: rows to spare keep a record's outputs the
        # same to the last bit, whatever other records it is computed with.
        spare = np.zeros((max(0, _FEW - len(x)), *self.input_shape), x.dtype)
        with torch.no_grad():
            return self.run(
                {name: torch.from_numpy(np.ascontiguousarray(w, x.dtype)) for name, w in weights.items()},
                torch.from_numpy(np.concatenate([x, spare])),
            )[: len(x)]

    def derivative(self, pre_activations: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the activation's derivative at each value, any shape, float32."""
        return cast(NDArray[np.float32], self.nonlinearity.derivative(pre_activations))

    def gradient(self, x: NDArray[Number], delta: NDArray[Number]) -> NDArray[Number]:
        """Return dW of the summed loss, all parameters in one flat vector of the arguments' dtype.

        Parameters
        ----------
        x : float32 or float64 array (records, *input_shape)
        delta : array (records, *cut_shape)
            Gradient of the summed loss at the pre-activations; for a linear layer dW = delta^T x.
        """
        parts = self.kind.gradient(torch.from_numpy(x), torch.from_numpy(delta))
        return cast(NDArray[Number], torch.cat([part.flatten() for part in parts]).numpy())

    def flatten(self, weights: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Join the parameters into one float32 vector, in the layer's own order."""
        return np.concatenate([np.asarray(weights[n], dtype=np.float32).ravel() for n in self.shapes])

    def unflatten(self, vector: NDArray[Number]) -> dict[str, NDArray[Number]]:
        """Undo :meth:`flatten`; the vector's length must be :attr:`size`."""
        ends = np.cumsum([math.prod(s) for s in self.shapes.values()])
        pieces = np.split(vector, ends[:-1])
        return {n: p.reshape(s) for (n, s), p in zip(self.shapes.items(), pieces, strict=True)}

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def run(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Run the layer with some parameters on ``(batch, *input_shape)``, without the activation."""
        return self.kind.run(parameters, x)


def _digest(values: Tensor) -> str:
    array = values.detach().contiguous().numpy()
    return sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).hexdigest()
