"""A network as linear layers that the server computes and activations that the device applies."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedsplit.model.layer import FirstLayer

BOUND = 1e-3  # largest error of an output that is taken for rounding
Vector = NDArray[np.float64]
Row = dict[str, Any]
T = TypeVar("T")


class LeftOut(Exception):
    """A scheme cannot be measured; the text says why."""


@dataclass(frozen=True)
class Stage:
    """A linear layer, of the server, and what the device applies to its outputs."""

    weight: Vector
    bias: Vector
    activation: nn.Module

    def activated(self, outputs: Vector) -> Vector:
        """Return the activation of outputs."""
        return np.asarray(self.activation(torch.from_numpy(outputs)).numpy())


def stages(first: FirstLayer, trunk: nn.Module) -> list[Stage]:
    """Return a network's linear layers, each with what follows it; raises LeftOut if there is anything else in it."""
    if not isinstance(first.layer, nn.Linear) or len(first.cut_shape) > 1:
        raise LeftOut(f"the first layer is {first.layer}, which is not one product with the flat record")
    found: list[tuple[nn.Linear, list[nn.Module]]] = [(first.layer, [first.activation])]
    for module in trunk if isinstance(trunk, nn.Sequential) else [trunk]:
        if isinstance(module, nn.Linear):
            found.append((module, []))
        elif isinstance(module, nn.ReLU):
            found[-1][1].append(nn.ReLU())  # in place, it would change what it is given
        else:
            raise LeftOut(f"the trunk has {type(module).__name__}, and these protocols know Linear and ReLU alone")
    return [Stage(*_parameters(layer), nn.Sequential(*after)) for layer, after in found]


def _parameters(layer: nn.Linear) -> tuple[Vector, Vector]:
    weight = layer.weight.detach().numpy().astype(np.float64)
    bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().numpy().astype(np.float64)
    return weight, bias


class Meter:
    """What both sides spend on a record."""

    def __init__(self) -> None:
        self.seconds = {"device": 0.0, "server": 0.0}
        self.up = self.down = 0

    def on(self, side: str, work: Callable[..., T], *arguments: Any) -> T:
        """Do some work of one side."""
        began = time.perf_counter()
        found = work(*arguments)
        self.seconds[side] += time.perf_counter() - began
        return found

    def row(self) -> Row:
        """Return it as a row of the table."""
        spent = {f"{side}_us": 1e6 * seconds for side, seconds in self.seconds.items()}
        return {**spent, "bytes_up": self.up, "bytes_down": self.down}


def checked(scheme: str, found: Vector, expected: Vector) -> float:
    """Return the largest error of outputs; raises RuntimeError where it is no rounding."""
    error = float(np.abs(found - expected).max())
    if not error <= BOUND:
        raise RuntimeError(f"{scheme}: another prediction, by {error:g}")
    return error
