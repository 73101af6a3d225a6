"""A user's own data and models, as a user would write them: small, with unequal devices."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedsplit import DeviceData, SplitModel

SHAPES = {"linear": (12,), "conv1d": (2, 16), "conv2d": (1, 8, 8)}


def _records(shape: tuple[int, ...], device: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes: one mean each, the same on all devices."""
    means = np.random.default_rng(99).normal(size=(3, *shape))
    rng = np.random.default_rng(device)
    y = rng.integers(0, 3, count)
    return (means[y] + rng.normal(size=(count, *shape))).astype(np.float32), y


def _device(kind: str, device: int, count: int) -> DeviceData:
    size = 7 + 3 * device
    x, y = _records(SHAPES[kind], device, size + 6)
    return DeviceData(train=(x[:size], y[:size]), test=(x[size:], y[size:]))


def linear(device_id: int, num_devices: int) -> DeviceData:
    return _device("linear", device_id, num_devices)


def _in_an_actor() -> bool:
    """Whether this is neither the test's process nor its child: it says who it is, and actors inherit that."""
    return int(os.environ["OWN_TEST"]) not in (os.getpid(), os.getppid())


def deadly(device_id: int, num_devices: int) -> DeviceData:
    """A loader that takes its process with it, as one does that needs too much memory: in Ray's actors alone."""
    if _in_an_actor():
        os.kill(os.getpid(), signal.SIGKILL)
    return linear(device_id, num_devices)


def sleepy(device_id: int, num_devices: int) -> DeviceData:
    """A loader that takes very long: in Ray's actors alone, after leaving a sign."""
    if _in_an_actor():
        Path(os.environ["SLEEPY_SIGN"]).touch()
        time.sleep(300)
    return linear(device_id, num_devices)


def few(device_id: int, num_devices: int) -> DeviceData:
    x, y = _records(SHAPES["linear"], device_id, 2 + device_id % 5 + 1)
    return DeviceData(train=(x[1:], y[1:]), test=(x[:1], y[:1]))


def conv1d(device_id: int, num_devices: int) -> DeviceData:
    return _device("conv1d", device_id, num_devices)


def conv2d(device_id: int, num_devices: int) -> DeviceData:
    return _device("conv2d", device_id, num_devices)


def regression(device_id: int, num_devices: int) -> DeviceData:
    rng = np.random.default_rng(device_id)
    x = rng.normal(size=(60, 5)).astype(np.float32)
    y = (x @ np.array([[1.0], [-2.0], [0.5], [0.0], [3.0]]) + 0.1 * rng.normal(size=(60, 1))).astype(np.float32)
    return DeviceData(train=(x[:40], y[:40]), test=(x[40:], y[40:]))


def linear_model() -> SplitModel:
    net = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))
    return SplitModel.from_sequential(net, input_shape=(12,))


def tanh_model() -> SplitModel:
    net = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))
    return SplitModel.from_sequential(net, input_shape=(12,))


def identity_model() -> SplitModel:
    net = nn.Sequential(nn.Linear(12, 10), nn.Identity(), nn.Linear(10, 3))
    return SplitModel.from_sequential(net, input_shape=(12,))


def gelu_model() -> SplitModel:
    net = nn.Sequential(nn.Linear(12, 10, bias=False), nn.GELU(), nn.Linear(10, 3))
    return SplitModel.from_sequential(net, input_shape=(12,))


def conv1d_model() -> SplitModel:
    first = nn.Conv1d(2, 6, kernel_size=5, stride=2, padding=2)
    net = nn.Sequential(first, nn.ReLU(), nn.Conv1d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    return SplitModel.from_sequential(net, input_shape=(2, 16))


def conv2d_model() -> SplitModel:
    first = nn.Conv2d(1, 5, kernel_size=3, stride=2, padding=1)
    net = nn.Sequential(first, nn.LeakyReLU(0.1), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    return SplitModel.from_sequential(net, input_shape=(1, 8, 8))


def regression_model() -> SplitModel:
    net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1))
    return SplitModel.from_sequential(net, input_shape=(5,))


def random_model() -> SplitModel:
    """With layers that draw numbers and see the whole batch."""
    trunk = [nn.Linear(10, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3)]
    return SplitModel.from_sequential(nn.Sequential(nn.Linear(12, 10), nn.ReLU(), *trunk), input_shape=(12,))


def not_a_model() -> torch.Tensor:
    return torch.zeros(1)
