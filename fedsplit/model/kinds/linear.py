"""Dense first layers."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.common.errors import ConfigError
from fedsplit.model.kinds.base import Graph, LayerKind, Parameters, flat_weight, register_layer_kind, without_bias

_ARGUMENTS = ("in_features", "out_features")


@register_layer_kind(nn.Linear)
class Dense(LayerKind):
    """An ``nn.Linear``: on a record flattened if it has as many inputs, else along its last axis."""

    name = "Linear"
    dense = True
    module: nn.Linear

    def __init__(self, module: nn.Module, input_shape: tuple[int, ...]) -> None:
        super().__init__(module, input_shape)
        if not input_shape:
            raise ConfigError(f"records of shape {input_shape} do not fit the first layer {module}")
        self._flat = self.module.in_features == math.prod(input_shape)

    def inputs(self, x: Tensor) -> Tensor:
        """Return records, flattened if need be."""
        return x.flatten(1) if self._flat else x

    def linear(self, parameters: Parameters) -> Parameters:
        """Return the weight, and no bias."""
        return without_bias(self.module, parameters)

    def apply(self, linear: Parameters, x: Tensor) -> Tensor:
        """Run the module without its bias."""
        return self.run(linear, x)

    def transpose(self, linear: Parameters, d: Tensor) -> Tensor:
        """Return d W."""
        return d @ linear["weight"]

    def norms(self, linear: Parameters) -> Tensor:
        """Return the norms of the weight's rows, for each position."""
        squares = linear["weight"].square()
        return self.run({**linear, "weight": squares}, torch.ones(1, *self.input_shape, dtype=squares.dtype)).sqrt()[0]

    def kernels(self, linear: Parameters) -> Tensor:
        """Return the weight's rows."""
        return flat_weight(linear)

    def gradient(self, x: Tensor, d: Tensor) -> list[Tensor]:
        """Return d' x, and for a bias the sum of d."""
        rows = x.flatten(1) if self._flat else x.flatten(0, -2)
        weight = d.flatten(0, -2).T @ rows
        return [weight] if self.module.bias is None else [weight, d.sum(dim=tuple(range(d.ndim - 1)))]

    def of_records(self, gradient: Tensor, deltas: Tensor) -> Tensor:
        """Return the weight's part."""
        return gradient[: self.module.weight.numel()]

    def operator(self, delta: Tensor) -> Tensor:
        """Return the factors of each number in every element of the weight's gradient."""
        shaped = delta.reshape(-1, self.module.out_features)  # (positions, outputs)
        inputs, one = self.module.in_features, torch.eye(self.module.in_features, dtype=torch.float64)
        return torch.einsum("po,ij->pioj", shaped, one).reshape(len(shaped) * inputs, -1)

    def spread(self, delta: Tensor) -> Tensor:
        """Return the delta, by position: the record's leading axes."""
        return delta.reshape(1, len(delta), -1, self.module.out_features)

    def describe(self) -> dict[str, Any]:
        """Return the sizes."""
        return {name: getattr(self.module, name) for name in _ARGUMENTS}

    @classmethod
    def build(cls, arguments: Mapping[str, Any], *, bias: bool) -> nn.Module:
        """Build an ``nn.Linear``."""
        return nn.Linear(**arguments, bias=bias)

    def onnx(self, graph: Graph, x: str) -> str:
        """Add a product with the weight."""
        weight = self.module.weight.detach().numpy()
        bias = [] if self.module.bias is None else [graph.constant("bias", self.module.bias.detach().numpy())]
        if self._flat:
            flat = graph.node("Flatten", x, axis=1)
            return graph.node("Gemm", flat, graph.constant("weight", weight), *bias, transB=1)
        product = graph.node("MatMul", x, graph.constant("weight", weight.T))
        return graph.node("Add", product, *bias) if bias else product

    def control(self, count: int) -> tuple[nn.Module, int]:
        """Return a layer of 256 units at least, which decides 16 records; 2 if it is for their last axis."""
        wide = nn.Linear(self.module.in_features, max(256, self.module.out_features))
        return wide, min(16 if self._flat else 2, count)
