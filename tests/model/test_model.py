"""The first layer's own arithmetic against autograd, and which layers and networks are refused."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedsplit.common.errors import ConfigError
from fedsplit.model.activations import ACTIVATIONS
from fedsplit.model.layer import FirstLayer
from fedsplit.model.split import SplitModel
from fedsplit.model.zoo import build_model

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(6, 4), (6,)),
    (nn.Linear(6, 4, bias=False), (6,)),
    (nn.Linear(6, 4), (3, 6)),
    (nn.Linear(6, 4), (2, 3)),
    (nn.Linear(6, 4, bias=False), (1, 2, 3)),
    (nn.Linear(6, 4), (1, 6)),
    (nn.Conv1d(2, 3, 5), (2, 16)),
    (nn.Conv1d(2, 3, 5, stride=2, padding=2), (2, 16)),
    (nn.Conv1d(2, 3, 3, stride=3, padding=1, bias=False), (2, 17)),
    (nn.Conv1d(4, 6, 3, dilation=2, groups=2), (4, 16)),
    (nn.Conv2d(2, 3, 3), (2, 7, 8)),
    (nn.Conv2d(1, 3, 3, stride=2, padding=1, bias=False), (1, 8, 8)),
    (nn.Conv2d(2, 4, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(2, 1), groups=2), (2, 9, 11)),
    (nn.Conv2d(4, 4, 3, groups=4), (4, 6, 6)),
]
PARTS = pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v).replace(" ", ""))


def inputs(shape: tuple[int, ...], records: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(records, *shape)).astype(np.float32)


def plain(layer: nn.Module, shape: tuple[int, ...], x: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Run the layer as torch does, a linear one on flattened records if these have as many numbers as it has inputs."""
    flat = isinstance(layer, nn.Linear) and math.prod(shape) == layer.in_features
    x = torch.as_tensor(x)
    return layer(x.reshape(len(x), -1) if flat else x)


# --- arithmetic ------------------------------------------------------------------------------------------------


@PARTS
def test_gradient_is_autograds(layer: nn.Module, shape: tuple[int, ...]) -> None:
    first, x = FirstLayer(layer, nn.ReLU(), shape), inputs(shape)
    delta = inputs(first.cut_shape, seed=1)
    total = (plain(layer, shape, x) * torch.from_numpy(delta)).sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(layer.parameters()))]).numpy()
    found = first.gradient(x, delta)
    assert found.dtype == np.float32
    assert found.shape == (first.size,)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected).max() > 0.1


@PARTS
def test_gradient_adds_up_over_records(layer: nn.Module, shape: tuple[int, ...]) -> None:
    first, x = FirstLayer(layer, nn.ReLU(), shape), inputs(shape)
    delta = inputs(first.cut_shape, seed=1)
    parts = first.gradient(x[:2], delta[:2]) + first.gradient(x[2:], delta[2:])
    np.testing.assert_allclose(first.gradient(x, delta), parts, rtol=1e-4, atol=1e-4)


@PARTS
def test_pre_activations_use_the_weights_of_the_call(layer: nn.Module, shape: tuple[int, ...]) -> None:
    first, x = FirstLayer(layer, nn.ReLU(), shape), inputs(shape)
    own = first.initial_weights()
    expected = plain(layer, shape, x).detach()
    torch.testing.assert_close(first.pre_activations(own, x), expected)
    assert expected.shape == (5, *first.cut_shape)
    assert first.width == expected[0].numel()
    doubled = {name: 2 * w for name, w in own.items()}
    torch.testing.assert_close(first.pre_activations(doubled, x), 2 * expected)
    torch.testing.assert_close(plain(layer, shape, x).detach(), expected)  # the layer itself is unchanged


@PARTS
def test_outputs_are_the_layers_own(layer: nn.Module, shape: tuple[int, ...]) -> None:
    first, x = FirstLayer(layer, nn.ReLU(), shape), torch.from_numpy(inputs(shape))
    found = first.outputs(x)
    assert torch.equal(found, plain(layer, shape, x))
    assert (found < 0).any()  # before the activation
    gradients = torch.autograd.grad(found.sum(), list(layer.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)


@PARTS
def test_run_takes_the_parameters_of_the_call_and_passes_their_gradients_on(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    first, x = FirstLayer(layer, nn.ReLU(), shape), torch.from_numpy(inputs(shape))
    own = {name: (p.detach() * 3).requires_grad_() for name, p in layer.named_parameters()}
    found = first.run(own, x)
    torch.testing.assert_close(found, 3 * plain(layer, shape, x))
    got = torch.autograd.grad(found.sum(), list(own.values()))
    expected = torch.autograd.grad(plain(layer, shape, x).sum(), list(layer.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@PARTS
def test_unrolled_is_the_layers_linear_map(layer: nn.Module, shape: tuple[int, ...]) -> None:
    first, x = FirstLayer(layer, nn.ReLU(), shape), torch.from_numpy(inputs(shape))
    matrix = first.unrolled()
    assert matrix.shape == (first.width, math.prod(shape))
    bias = plain(layer, shape, torch.zeros(1, *shape))
    expected = (plain(layer, shape, x) - bias).flatten(1)
    torch.testing.assert_close(x.flatten(1) @ matrix.T, expected, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(matrix.square().sum(), layer.weight)
    (by_columns,) = torch.autograd.grad(
        (plain(layer, shape, torch.eye(math.prod(shape)).reshape(-1, *shape)) - bias).square().sum(), layer.weight
    )
    torch.testing.assert_close(gradient, by_columns)
    assert gradient.abs().sum() > 0


@PARTS
def test_loaded_weights_are_the_initial_ones(layer: nn.Module, shape: tuple[int, ...]) -> None:
    first = FirstLayer(copy.deepcopy(layer), nn.ReLU(), shape)
    new = {name: w - 1.5 for name, w in first.initial_weights().items()}
    first.load_weights(new)
    for name, w in first.initial_weights().items():
        assert np.array_equal(w, new[name])
        new[name][:] = 99  # the caller may go on using its arrays
        assert not (first.initial_weights()[name] == 99).any()


@PARTS
def test_flatten_and_unflatten_are_inverse(layer: nn.Module, shape: tuple[int, ...]) -> None:
    first = FirstLayer(layer, nn.ReLU(), shape)
    vector = np.arange(first.size, dtype=np.float32)
    weights = first.unflatten(vector)
    assert {n: w.shape for n, w in weights.items()} == {n: tuple(p.shape) for n, p in layer.named_parameters()}
    assert first.size == sum(p.numel() for p in layer.parameters())
    assert np.array_equal(first.flatten(weights), vector)
    assert np.array_equal(first.flatten(dict(reversed(weights.items()))), vector)  # the layer's order, not the dict's


def test_initial_weights_are_a_copy() -> None:
    first = FirstLayer(nn.Linear(2, 2), nn.ReLU(), (2,))
    first.initial_weights()["weight"][:] = 7
    assert not (first.initial_weights()["weight"] == 7).any()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivative_is_autograds(name: str) -> None:
    activation = ACTIVATIONS[name]()
    z = np.concatenate([inputs((20,), 2).ravel() * 3, np.zeros(1, dtype=np.float32)])
    expected = [torch.func.grad(lambda v: activation(v))(torch.tensor(v)).item() for v in z]
    before = z.copy()
    with torch.no_grad():  # as on the device
        found = FirstLayer(nn.Linear(2, 2), activation, (2,)).derivative(z)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(z, before)


def test_derivative_keeps_an_activations_own_arguments() -> None:
    first = FirstLayer(nn.Linear(2, 2), nn.LeakyReLU(0.3), (2,))
    np.testing.assert_allclose(first.derivative(np.array([[-2.0, 2.0]], dtype=np.float32)), [[0.3, 1.0]])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_shortcuts_hold_for_the_activations_that_take_them(name: str) -> None:
    first = FirstLayer(nn.Linear(2, 2), ACTIVATIONS[name](), (2,))
    z = np.linspace(-3, 3, 101, dtype=np.float32)
    out, slope = first.activation(torch.from_numpy(z)).numpy(), first.derivative(z)
    assert first.positive_only == (name == "relu")
    assert first.unit_slope == (name in ("relu", "identity"))
    if first.positive_only:
        assert (slope[out == 0] == 0).all()
    if first.unit_slope:
        sent = out != 0 if first.positive_only else np.ones(len(z), dtype=bool)
        assert (slope[sent] == 1).all()


# --- cutting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [*(a() for a in ACTIVATIONS.values()), None], ids=str)
def test_cutting_a_network_changes_none_of_its_outputs(activation: nn.Module | None) -> None:
    parts = [nn.Linear(4, 8), *([activation] if activation else []), nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 2)]
    net = nn.Sequential(*parts)
    model = SplitModel.from_sequential(net, input_shape=(4,))
    x = torch.from_numpy(inputs((4,)))
    torch.testing.assert_close(model.forward(x), net(x))
    assert model.first_layer.layer is parts[0]
    assert type(model.first_layer.activation) is type(activation or nn.Identity())
    assert list(model.trunk) == parts[2 if activation else 1 :]


@pytest.mark.parametrize("shape", [(2, 3, 4), (24,), (1, 24)])
def test_a_leading_flatten_is_what_a_linear_layer_does_by_itself(shape: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 2))
    model = SplitModel.from_sequential(net, input_shape=shape)
    x = torch.from_numpy(inputs(shape))
    torch.testing.assert_close(model.forward(x), net(x))
    assert model.first_layer.layer is net[1]
    assert isinstance(model.first_layer.activation, nn.ReLU)
    assert list(model.trunk) == [net[3]]
    assert model.first_layer.cut_shape == (8,)


def test_a_flatten_that_no_linear_layer_follows_is_no_first_layer() -> None:
    with pytest.raises(ConfigError, match="first layer Flatten has no parameters"):
        SplitModel.from_sequential(nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(8, 2)), (8,))
    with pytest.raises(ConfigError, match="from_sequential needs at least one module after"):
        SplitModel.from_sequential(nn.Sequential(nn.Flatten(), nn.Linear(8, 2), nn.ReLU()), (8,))


def test_a_linear_layer_for_the_last_axis_keeps_the_others() -> None:
    first = FirstLayer(nn.Linear(4, 5), nn.ReLU(), (2, 3, 4))
    assert first.cut_shape == (2, 3, 5)


def test_a_part_that_is_no_supported_activation_stays_in_the_trunk() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    model = SplitModel.from_sequential(net, input_shape=(4,))
    assert isinstance(model.first_layer.activation, nn.Identity)
    assert isinstance(model.trunk[0], nn.BatchNorm1d)


@pytest.mark.parametrize("cut", [0, 2, -1])
def test_another_cut_is_refused(cut: int) -> None:
    with pytest.raises(ConfigError, match=f"cut must be 1 .*, got {cut}"):
        SplitModel.from_sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (4,), cut=cut)


@pytest.mark.parametrize("net", [nn.Sequential(nn.Linear(4, 2)), nn.Sequential(), nn.Linear(4, 2)])
def test_what_cannot_be_cut_is_refused(net: Any) -> None:
    with pytest.raises(ConfigError, match="from_sequential needs"):
        SplitModel.from_sequential(net, (4,))


@pytest.mark.parametrize(
    ("layer", "activation", "shape", "refusal"),
    [
        (nn.LSTM(4, 2), nn.ReLU(), (4,), "first layer LSTM does not take records"),
        (nn.Embedding(4, 2), nn.ReLU(), (4,), "first layer Embedding does not take records"),
        (nn.BatchNorm1d(4), nn.ReLU(), (4,), "first layer BatchNorm1d does not take records"),
        (nn.Linear(4, 2), nn.Softmax(dim=1), (4,), "activation must be one of relu, .*, got Softmax"),
        (nn.Linear(4, 2), nn.Dropout(), (4,), "got Dropout"),
        (nn.Conv1d(2, 3, 3, padding="same"), nn.ReLU(), (2, 8), "pad with zeros by a number"),
        (nn.Conv2d(2, 3, 3, padding="valid"), nn.ReLU(), (2, 8, 8), "pad with zeros by a number"),
        (nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), nn.ReLU(), (2, 8), "pad with zeros by a number"),
        (nn.Linear(6, 2), nn.ReLU(), (2, 4), r"records of shape \(2, 4\) do not fit the first layer Linear"),
        (nn.Linear(4, 2), nn.ReLU(), (5,), r"records of shape \(5,\) do not fit the first layer Linear"),
        (nn.Conv1d(2, 3, 3), nn.ReLU(), (3, 8), r"records of shape \(3, 8\) do not fit"),
        (nn.Conv1d(2, 3, 9), nn.ReLU(), (2, 8), r"records of shape \(2, 8\) do not fit"),
        (nn.Conv2d(2, 3, 3), nn.ReLU(), (2, 8), r"records of shape \(2, 8\) do not fit"),
    ],
)
def test_first_layers_that_are_refused(
    layer: nn.Module, activation: nn.Module, shape: tuple[int, ...], refusal: str
) -> None:
    with pytest.raises(ConfigError, match=refusal):
        FirstLayer(layer, activation, shape)


# --- built-in models -------------------------------------------------------------------------------------------

BUILT = [
    ("sensor-cnn", (3, 40), (16, 20)),
    ("image-cnn", (1, 12, 12), (16, 6, 6)),
    ("mlp", (9,), (16,)),
    ("mlp", (3, 40), (16,)),
    ("mlp", (2, 3, 4), (16,)),
]


@pytest.mark.parametrize(("name", "shape", "cut_shape"), BUILT)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_built_in_models_map_records_to_outputs(
    name: str, shape: tuple[int, ...], cut_shape: tuple[int, ...], activation: str
) -> None:
    model = build_model(name, shape, outputs=5, width=16, activation=activation)
    assert model.first_layer.cut_shape == cut_shape
    assert isinstance(model.first_layer.activation, ACTIVATIONS[activation])
    assert model.forward(torch.from_numpy(inputs(shape))).shape == (5, 5)


@pytest.mark.parametrize(("name", "shape", "cut_shape"), BUILT)
def test_built_in_models_follow_torchs_seed(name: str, shape: tuple[int, ...], cut_shape: tuple[int, ...]) -> None:
    def parameters(seed: int) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build_model(name, shape, 5, 16, "relu")
        return torch.cat([p.flatten() for m in (model.first_layer.layer, model.trunk) for p in m.parameters()])

    assert torch.equal(parameters(1), parameters(1))
    assert not torch.equal(parameters(1), parameters(2))


@pytest.mark.parametrize(
    ("name", "shape", "axes"),
    [("sensor-cnn", (9,), 2), ("sensor-cnn", (1, 8, 8), 2), ("image-cnn", (3, 40), 3), ("image-cnn", (9,), 3)],
)
def test_built_in_models_refuse_records_of_other_axes(name: str, shape: tuple[int, ...], axes: int) -> None:
    with pytest.raises(ConfigError, match=f"model '{name}' takes records of {axes} axes, the data's have shape"):
        build_model(name, shape, outputs=5, width=16, activation="relu")


@pytest.mark.parametrize(("layer", "shape"), [(nn.Conv1d(1, 6, 3), (16,)), (nn.Conv2d(1, 6, 3), (16, 16))])
def test_records_without_a_channel_axis_are_refused(layer: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        FirstLayer(layer, nn.ReLU(), shape)


def test_an_activation_in_place_is_used_as_if_it_were_not() -> None:
    layer = FirstLayer(nn.Linear(2, 6), nn.LeakyReLU(0.1, inplace=True), (2,))
    assert layer.derivative(np.array([-1, 1], np.float32)).tolist() == pytest.approx([0.1, 1.0])


def test_a_network_without_a_trunk_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one module after"):
        SplitModel.from_sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), input_shape=(2,))
