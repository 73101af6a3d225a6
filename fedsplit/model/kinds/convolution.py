"""Convolutional first layers."""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold
from torch.nn.grad import conv1d_input, conv1d_weight, conv2d_input, conv2d_weight

from fedsplit.common.errors import ConfigError
from fedsplit.model.kinds.base import Graph, LayerKind, Parameters, flat_weight, register_layer_kind, without_bias

_ARGUMENTS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_ENOUGH = 1.4  # equations of the control's gradient over its records' numbers


class _Convolution(LayerKind):
    """A convolution that pads with zeros."""

    module: nn.Conv2d
    of: type[nn.Conv1d] | type[nn.Conv2d]
    axes: int

    def __init__(self, module: nn.Module, input_shape: tuple[int, ...]) -> None:
        super().__init__(module, input_shape)
        if isinstance(self.module.padding, str) or self.module.padding_mode != "zeros":
            raise ConfigError("first layer must pad with zeros by a number, not by 'same' or another mode")
        # torch would take records without a channel axis for one record without a batch axis
        if len(input_shape) != self.axes:
            raise ConfigError(f"records of shape {input_shape} do not fit the first layer {module}")

    @property
    def _steps(self) -> tuple[Any, ...]:
        c = self.module
        return c.stride, c.padding, c.dilation, c.groups

    def linear(self, parameters: Parameters) -> Parameters:
        """Return the weight, and no bias."""
        return without_bias(self.module, parameters)

    def apply(self, linear: Parameters, x: Tensor) -> Tensor:
        """Run the module without its bias."""
        return self.run(linear, x)

    def transpose(self, linear: Parameters, d: Tensor) -> Tensor:
        """Return the transposed convolution."""
        rule = conv1d_input if self.axes == 2 else conv2d_input
        return cast(Tensor, rule((len(d), *self.input_shape), linear["weight"], d, *self._steps))  # type: ignore[no-untyped-call]

    def norms(self, linear: Parameters) -> Tensor:
        """Return the norms of the rows; at the edges some of a kernel's weights meet padding."""
        squares = linear["weight"].square()
        return self.run({**linear, "weight": squares}, torch.ones(1, *self.input_shape, dtype=squares.dtype)).sqrt()[0]

    def kernels(self, linear: Parameters) -> Tensor:
        """Return the kernels."""
        return flat_weight(linear)

    def gradient(self, x: Tensor, d: Tensor) -> list[Tensor]:
        """Return the correlation of x with d, and for a bias the sum of d by channel."""
        rule = conv1d_weight if self.axes == 2 else conv2d_weight
        weight = rule(x, self.module.weight.shape, d, *self._steps)  # type: ignore[no-untyped-call]
        return [weight] if self.module.bias is None else [weight, d.sum(dim=[0, *range(2, d.ndim)])]

    def of_records(self, gradient: Tensor, deltas: Tensor) -> Tensor:
        """Return the weight's part."""
        return gradient[: self.module.weight.numel()]

    def _seen(self, numbers: Tensor) -> Tensor:
        """Return which of some numbered values ``(1, channels, *places)`` each position sees: 0 is padding."""
        c = self.module
        kernel, dilation, stride = ((1, *v)[-2:] for v in (c.kernel_size, c.dilation, c.stride))
        padding = (0, *cast(tuple[int, ...], c.padding))[-2:]
        flat = numbers.reshape(*numbers.shape[:2], -1, numbers.shape[-1])  # a Conv1d is a Conv2d of height 1
        return unfold(flat, kernel, dilation, padding, stride)[0].long()

    def operator(self, delta: Tensor) -> Tensor:
        """Return the factors of each number in every element of the weight's gradient."""
        c, n = self.module, math.prod(self.input_shape)
        seen = self._seen(torch.arange(1.0, n + 1, dtype=torch.float64).reshape(1, *self.input_shape))
        seen = seen.reshape(c.groups, -1, seen.shape[1])  # (groups, channels x kernel, positions)
        d = delta.reshape(c.groups, -1, seen.shape[2])  # (groups, filters, positions)
        g = torch.zeros(n + 1, *d.shape[:2], seen.shape[1], dtype=torch.float64)
        for group in range(c.groups):
            for weight, places in enumerate(seen[group]):
                g[places, group, :, weight] = d[group].T
        return g[1:].flatten(1)

    def spread(self, delta: Tensor) -> Tensor:
        """Return the delta unfolded over positions, for every weight of a kernel and filter of a group."""
        c, places = self.module, math.prod(self.input_shape[1:])
        seen = self._seen(torch.arange(1, places + 1, dtype=torch.float64).reshape(1, 1, *self.input_shape[1:]))
        steps = delta.reshape(len(delta), c.groups, -1, seen.shape[1]).permute(1, 0, 3, 2)
        size = (c.groups, len(delta), places + 1, steps.shape[-1], len(seen))
        spread = torch.zeros(size, dtype=torch.float64)  # steps: (groups, N, steps, outputs)
        for k, place in enumerate(seen):
            spread[:, :, place, :, k] = steps
        return spread[:, :, 1:].flatten(3)

    def describe(self) -> dict[str, Any]:
        """Return channels, kernel and steps."""
        return {name: getattr(self.module, name) for name in _ARGUMENTS}

    @classmethod
    def build(cls, arguments: Mapping[str, Any], *, bias: bool) -> nn.Module:
        """Build a convolution."""
        return cls.of(**arguments, bias=bias)

    def onnx(self, graph: Graph, x: str) -> str:
        """Add a Conv."""
        c = self.module
        weight = graph.constant("weight", c.weight.detach().numpy())
        bias = [] if c.bias is None else [graph.constant("bias", c.bias.detach().numpy())]
        padding = cast(tuple[int, ...], c.padding) * 2  # at the beginnings, then at the ends
        numbers = {"kernel_shape": c.kernel_size, "strides": c.stride, "pads": padding, "dilations": c.dilation}
        return graph.node("Conv", x, weight, *bias, **numbers, group=c.groups)

    def control(self, count: int) -> tuple[nn.Module, int]:
        """Return a convolution that reaches every number, with filters enough to decide 2 records."""
        c, records = self.module, min(2, count)
        equations = _ENOUGH * records * math.prod(self.input_shape)
        channels = math.ceil(equations / c.weight[0].numel() / c.groups) * c.groups
        padding: Any = tuple(k // 2 for k in c.kernel_size)
        kernel: Any = c.kernel_size
        return self.of(c.in_channels, channels, kernel, padding=padding, groups=c.groups), records


@register_layer_kind(nn.Conv1d)
class Convolution1d(_Convolution):
    """An ``nn.Conv1d`` on records ``(channels, time)``."""

    name, of, axes = "Conv1d", nn.Conv1d, 2


@register_layer_kind(nn.Conv2d)
class Convolution2d(_Convolution):
    """An ``nn.Conv2d`` on records ``(channels, height, width)``."""

    name, of, axes = "Conv2d", nn.Conv2d, 3
