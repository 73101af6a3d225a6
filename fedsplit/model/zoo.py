"""Built-in models by name."""

import math

import torch
from torch import nn

from fedsplit.common.errors import ConfigError
from fedsplit.model.activations import ACTIVATIONS
from fedsplit.model.layer import FirstLayer
from fedsplit.model.split import SplitModel


def _sensor_cnn(shape: tuple[int, ...], outputs: int, width: int, activation: nn.Module) -> SplitModel:
    """Conv1d over time (kernel 9, stride 2), two more convolutions with batch norm, mean over time, a linear layer."""
    first = nn.Conv1d(shape[0], width, kernel_size=9, stride=2, padding=4)
    trunk = nn.Sequential(
        nn.Conv1d(width, 64, kernel_size=5, stride=2, padding=2),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Conv1d(64, 64, kernel_size=5, stride=2, padding=2),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(64, outputs),
    )
    return SplitModel(FirstLayer(first, activation, shape), trunk)


def _image_cnn(shape: tuple[int, ...], outputs: int, width: int, activation: nn.Module) -> SplitModel:
    """Conv2d (kernel 5, stride 2), one more convolution, one linear layer."""
    first = FirstLayer(nn.Conv2d(shape[0], width, kernel_size=5, stride=2, padding=2), activation, shape)
    body = nn.Sequential(nn.Conv2d(width, 32, kernel_size=3, stride=2, padding=1), nn.ReLU(), nn.Flatten())
    features = body(torch.zeros(1, *first.cut_shape)).shape[1]
    trunk = nn.Sequential(*body, nn.Linear(features, outputs))
    return SplitModel(first, trunk)


def _mlp(shape: tuple[int, ...], outputs: int, width: int, activation: nn.Module) -> SplitModel:
    """Linear first layer on flattened records, then one hidden layer of 128 units."""
    first = FirstLayer(nn.Linear(math.prod(shape), width), activation, shape)
    trunk = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, outputs))
    return SplitModel(first, trunk)


BUILT_IN = {"sensor-cnn": (_sensor_cnn, 2), "image-cnn": (_image_cnn, 3), "mlp": (_mlp, 0)}
"""Built-in models by name: for sensor windows ``(channels, time)``, images ``(channels, height, width)`` and
tables of any shape; the number is how many axes a record must have (0: any)."""


def build_model(name: str, input_shape: tuple[int, ...], outputs: int, width: int, activation: str) -> SplitModel:
    """Build one of :data:`BUILT_IN`; seed torch before the call, the weights are drawn in it.

    Parameters
    ----------
    width : int
        Output channels (convolution) or units (linear) of the first layer.

    Raises
    ------
    ConfigError
        If a record of the data has another number of axes than the model takes.
    """
    build, axes = BUILT_IN[name]
    if axes and len(input_shape) != axes:
        raise ConfigError(f"model {name!r} takes records of {axes} axes, the data's have shape {input_shape}")
    return build(input_shape, outputs, width, ACTIVATIONS[activation]())
