"""Any other linear first layer: all that is needed of it by automatic differentiation."""

import math
from collections.abc import Iterator
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from fedsplit.common.errors import ConfigError
from fedsplit.model.kinds.base import LayerKind, Parameters

_SCALES = (1e-2, 1.0, 1e3)  # of the parameters that the module is tried with: the server may send any
_CLOSE = 1e-9  # relative error of float64 outputs
_BLOCK = 2**21  # numbers of a block of rows
_CONTROL_UNITS = 4


class General(LayerKind):
    """A module that is linear in the record, up to a bias, and in its parameters; this is tried with some.

    (Were it not linear in these, gradients would depend on which weights they are of.)

    Where there is a closed form, a kind of its own is quicker: here a transposed product is a backward pass, and what
    sums of gradients tell takes ``n`` of them for each record.
    """

    name = "general"

    def __init__(self, module: nn.Module, input_shape: tuple[int, ...]) -> None:
        super().__init__(module, input_shape)
        if not any(True for _ in module.parameters()):
            raise ConfigError(f"first layer {type(module).__name__} has no parameters: nothing of it could be learned")
        if problem := self._unfit():
            raise ConfigError(f"first layer {type(module).__name__} {problem}")

    def run(self, parameters: Parameters, x: Tensor) -> Tensor:
        """Return z under some parameters, and the module's own buffers."""
        buffers = {n: b.to(x.dtype) if b.is_floating_point() else b for n, b in self.module.named_buffers()}
        return torch.func.functional_call(self.module, {**buffers, **parameters}, (x,))  # type: ignore[no-any-return]

    def linear(self, parameters: Parameters) -> Parameters:
        """Return all parameters: which of them are a bias is not known."""
        return parameters

    def apply(self, linear: Parameters, x: Tensor) -> Tensor:
        """Return what is left of z without that of a record of zeros."""
        return self.run(linear, x) - self.run(linear, torch.zeros_like(x[:1]))

    def transpose(self, linear: Parameters, d: Tensor) -> Tensor:
        """Return the vector-Jacobian product."""
        zeros = torch.zeros(len(d), *self.input_shape, dtype=d.dtype)
        back = torch.func.vjp(lambda x: self.run(linear, x), zeros)[1]
        return cast(Tensor, back(d)[0])

    def norms(self, linear: Parameters) -> Tensor:
        """Return the norms of the rows, a block of rows at a time."""
        return torch.cat([rows.square().sum(1).sqrt() for rows in self._rows(linear)])

    def kernels(self, linear: Parameters) -> Tensor:
        """Return all rows."""
        return torch.cat(list(self._rows(linear)))

    def gradient(self, x: Tensor, d: Tensor) -> list[Tensor]:
        """Return the vector-Jacobian product by the parameters."""
        return self._by_parameters({name: p.to(x.dtype) for name, p in self._own.items()}, x, d)

    def of_records(self, gradient: Tensor, deltas: Tensor) -> Tensor:
        """Return what is left without the gradient of records of zeros."""
        zeros = torch.zeros(len(deltas), *self.input_shape, dtype=torch.float64)
        constant = self.gradient(zeros, deltas.to(torch.float64).reshape(-1, *self._cut_shape))
        return gradient - torch.cat([part.flatten() for part in constant])

    def operator(self, delta: Tensor) -> Tensor:
        """Return the gradients of all records of a single 1, without those of a record of zeros."""
        n, own = math.prod(self.input_shape), self._own
        d = delta.to(torch.float64).reshape(1, *self._cut_shape)

        def one(x: Tensor) -> Tensor:
            return torch.cat([part.flatten() for part in self._by_parameters(own, x[None], d)])

        ones = torch.eye(n, dtype=torch.float64).reshape(n, *self.input_shape)
        return torch.stack([one(x) for x in ones]) - one(torch.zeros(self.input_shape, dtype=torch.float64))

    def spread(self, delta: Tensor) -> Tensor:
        """Return the operators: every number is a position of its own."""
        return torch.stack([self.operator(d.reshape(self._cut_shape)) for d in delta])[None]

    def control(self, count: int) -> tuple[nn.Module, int]:
        """Return a dense module that is taken for any other, of units enough to decide 2 records."""
        return _Flattened(math.prod(self.input_shape), _CONTROL_UNITS), min(2, count)

    @cached_property
    def _own(self) -> dict[str, Tensor]:
        return {name: p.detach().to(torch.float64) for name, p in self.module.named_parameters()}

    @cached_property
    def _cut_shape(self) -> tuple[int, ...]:
        return tuple(self.run(self._own, torch.zeros(1, *self.input_shape, dtype=torch.float64)).shape[1:])

    def _rows(self, linear: Parameters) -> Iterator[Tensor]:
        """Yield all rows, a block at a time."""
        width = math.prod(self._cut_shape)
        step = max(1, _BLOCK // (math.prod(self.input_shape) + width))
        for start in range(0, width, step):
            rows = torch.arange(start, min(start + step, width))
            d = torch.zeros(len(rows), width, dtype=torch.float64)  # never all of them: a wide layer's do not fit
            d[torch.arange(len(rows)), rows] = 1
            yield self.transpose(linear, d.reshape(-1, *self._cut_shape)).flatten(1)

    def _by_parameters(self, parameters: Parameters, x: Tensor, d: Tensor) -> list[Tensor]:
        back = torch.func.vjp(lambda p: self.run(p, x), dict(parameters))[1]
        found = back(d.reshape(-1, *self._cut_shape))[0]
        return [found[name] for name in parameters]

    def _unfit(self) -> str:
        """Return why the module is no linear first layer, or nothing."""
        draw = torch.Generator().manual_seed(0)
        for scale in _SCALES:
            one, other = ({name: scale * _drawn(p.shape, draw) for name, p in self._own.items()} for _ in range(2))
            x = 3 * _drawn((4, *self.input_shape), draw)
            x[2], x[3] = x[0] + 2 * x[1], 0
            try:
                with torch.no_grad():
                    problem = self._differs(one, other, x)
            except Exception:  # somebody's own code: it is tried with what it may not be made for
                return f"does not take records of shape {self.input_shape}, or no float64"
            if problem:
                return problem
        return ""

    def _differs(self, one: Parameters, other: Parameters, x: Tensor) -> str:
        """Return what is not linear for two sets of parameters and records of which one is 0, one a combination."""
        z, z_other, nothing = (self.run(p, x) for p in (one, other, {name: 0 * p for name, p in one.items()}))
        if z.ndim < 2 or len(z) != len(x) or z.dtype != torch.float64 or not z.isfinite().all():
            return "must return finite outputs, as many rows as it is given records, in the dtype that they have"
        size = _CLOSE * (1 + float(z.abs().max()) + 2 * float(z_other.abs().max()))

        def near(a: Tensor, b: Tensor) -> bool:
            return bool((a - b).abs().max() <= size)

        if not (near(z, self.run(one, x)) and near(z, torch.cat([self.run(one, row[None]) for row in x]))):
            return "must give a record the same outputs whenever and beside whichever others it is run"
        if not near(z[2] - z[3], z[0] - z[3] + 2 * (z[1] - z[3])):
            return "must be linear in the record, up to a bias, for whatever parameters"
        both = self.run({name: p + 2 * other[name] for name, p in one.items()}, x)
        if not near(both - nothing, z - nothing + 2 * (z_other - nothing)):
            return "must be linear in its parameters, too"
        return ""


def _drawn(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float64)


class _Flattened(nn.Module):
    """An ``nn.Linear`` of flattened records in a module of another type."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, outputs)
        nn.init.constant_(self.inner.bias, 1e3)  # every unit is active

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(records, outputs)``."""
        return self.inner(x.flatten(1))  # type: ignore[no-any-return]
