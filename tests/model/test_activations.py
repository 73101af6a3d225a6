"""What activations say of themselves: preimages hold the truth, from the module's own numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsplit.common.errors import ConfigError
from fedsplit.model.activations import activation_of
from fedsplit.release.codes import Code
from fedsplit.wire.coding import dequantise, quantise

MODULES = [
    nn.ReLU(), nn.Identity(), nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.GELU("tanh"),
    nn.LeakyReLU(), nn.LeakyReLU(0.3), nn.LeakyReLU(2.0), nn.LeakyReLU(0.0), nn.LeakyReLU(-0.5),
]  # fmt: skip
ROUNDINGS = pytest.mark.parametrize("dtype", ["float16", "float32"])


def wired(values: np.ndarray, dtype: str) -> np.ndarray:
    codes, exponents = quantise(values, np.array([len(values)]), dtype)
    return dequantise(codes, np.array([len(values)]), exponents).astype(np.float64)


@pytest.mark.parametrize("module", MODULES, ids=repr)
@ROUNDINGS
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32))
def test_preimages_hold_the_truth(module: nn.Module, dtype: str, seed: int) -> None:
    """As sent by a float32 device: within the bounds, and at most a few deviations off where there is one preimage."""
    rng = np.random.default_rng(seed)
    z = np.concatenate([rng.normal(size=50) * 10.0 ** rng.integers(-3, 2), np.zeros(1)]).astype(np.float32)
    sent = wired(module(torch.from_numpy(z)).numpy(), dtype)
    found = activation_of(module).preimage(sent, Code().error(sent, dtype), *Code().bounds(sent, dtype))
    assert np.isfinite(found.point).all() and (found.low <= found.high).all()
    slack = 1e-5 * (1 + np.abs(z))
    assert (found.low <= z + slack).all() and (z - slack <= found.high).all()
    known = np.isfinite(found.deviation)
    assert (np.abs(found.point - z) <= 3 * found.deviation + slack)[known].all()


@pytest.mark.parametrize("module", MODULES, ids=repr)
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_bounds_on_small_outputs_hold(module: nn.Module, seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=50) * 10.0 ** rng.integers(-3, 2)
    limit = np.full(z.shape, float(rng.exponential()))
    low, high = activation_of(module).within(limit)
    small = np.abs(module(torch.from_numpy(z)).numpy()) <= limit
    assert ((low <= z + 1e-9) & (z - 1e-9 <= high))[small].all()


@pytest.mark.parametrize("module", MODULES[2:5] + MODULES[6:9], ids=repr)
def test_most_outputs_have_one_preimage(module: nn.Module) -> None:
    """All of them but saturated ones, of GELU the positive half: bounds alone would be true, and tell little."""
    z = np.linspace(-3, 3, 601)
    sent = module(torch.from_numpy(z)).numpy()
    found = activation_of(module).preimage(sent, np.full(sent.shape, 1e-9), sent - 1e-9, sent + 1e-9)
    known = z > 0.01 if isinstance(module, nn.GELU) else np.abs(z) > 0.01
    assert np.isfinite(found.deviation[known]).all()
    np.testing.assert_allclose(found.point[known], z[known], atol=1e-6)
    slope = activation_of(module).derivative(z)[known]
    np.testing.assert_allclose(found.deviation[known], 1e-9 / np.abs(slope), rtol=0.02)  # the inverse's slope


def test_a_saturated_output_bounds_from_one_side() -> None:
    sent, error = np.array([1.0, -1.0]), np.full(2, 2.0**-12)
    found = activation_of(nn.Tanh()).preimage(sent, error, sent - error, sent + error)
    assert np.isinf(found.deviation).all()
    assert found.low[0] == -found.high[1] == pytest.approx(np.arctanh(1 - 2.0**-12))
    assert found.high[0] == np.inf and found.low[1] == -np.inf


def test_a_negative_gelu_output_lies_between_its_two_preimages() -> None:
    found = activation_of(nn.GELU()).preimage(sent := np.array([-0.1]), np.zeros(1), sent, sent)
    gelu = nn.GELU()(torch.tensor([found.low[0], found.high[0]])).numpy()
    assert gelu == pytest.approx([-0.1, -0.1]) and found.low[0] < -0.75 < found.high[0] < 0
    assert np.isinf(found.deviation[0])


def test_a_slope_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be finite"):
        activation_of(nn.LeakyReLU(float("nan")))


def test_a_relu_of_ones_own_is_not_taken_for_relu() -> None:
    class Odd(nn.ReLU):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input.sin()

    with pytest.raises(ConfigError, match=r"activation must be one of relu, .*, got Odd"):
        activation_of(Odd())
