"""Kinds of first layers: what each says of itself is what the module computes; the general one says the same."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsplit.audit.gradient_attacks import negative_control
from fedsplit.common.errors import ConfigError
from fedsplit.guard.criterion import LayerMap, coordinates
from fedsplit.guard.gradient import joint
from fedsplit.model.kinds import general as general_kind
from fedsplit.model.kinds import kind_named, kind_of
from fedsplit.model.kinds.base import double
from fedsplit.model.kinds.general import General
from fedsplit.model.layer import FirstLayer

KINDS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(6, 4), (6,)),
    (nn.Linear(6, 4, bias=False), (3, 6)),
    (nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2), (2, 9)),
    (nn.Conv2d(1, 3, 2, dilation=2, bias=False), (1, 5, 4)),
    (nn.Conv3d(1, 2, 2), (1, 3, 3, 2)),
    (nn.ConvTranspose1d(2, 3, 3, stride=2), (2, 4)),
]
EACH = pytest.mark.parametrize(("module", "shape"), KINDS, ids=lambda v: str(v).replace(" ", ""))


def general(module: nn.Module, shape: tuple[int, ...]) -> FirstLayer:
    """The same layer, as if no kind was registered for it."""
    layer = FirstLayer(module, nn.ReLU(), shape)
    layer.kind = _General(module, shape)
    return layer


class _General(General):
    def inputs(self, x: Tensor) -> Tensor:
        return x


@EACH
def test_what_a_kind_says_is_what_the_module_computes(module: nn.Module, shape: tuple[int, ...]) -> None:
    layer, rng = FirstLayer(module, nn.ReLU(), shape), np.random.default_rng(0)
    m = LayerMap(layer, layer.initial_weights())
    matrix = layer.unrolled().detach().numpy()
    x, u = rng.normal(size=(5, m.n)), rng.normal(size=(5, m.width))
    np.testing.assert_allclose(m.apply(x), x @ matrix.T, atol=1e-5)
    np.testing.assert_allclose(m.transpose(u), u @ matrix, atol=1e-5)
    np.testing.assert_allclose(m.rows(np.arange(m.width)), matrix, atol=1e-5)
    np.testing.assert_allclose(m.norms, np.linalg.norm(matrix, axis=1), atol=1e-5)
    assert sorted(map(int, (m.kernels != 0).sum(axis=1)))[-1] <= m.n


@EACH
def test_gradients_and_their_operators_are_autograds(module: nn.Module, shape: tuple[int, ...]) -> None:
    layer, rng = FirstLayer(module, nn.ReLU(), shape), np.random.default_rng(0)
    x = rng.normal(size=(3, *shape))
    delta = rng.normal(size=(3, *layer.cut_shape))
    own = {name: double(w).requires_grad_() for name, w in layer.initial_weights().items()}
    (layer.run(own, double(x)) * double(delta)).sum().backward()  # type: ignore[no-untyped-call]
    expected = torch.cat([p.grad.flatten() for p in own.values() if p.grad is not None])
    found = layer.gradient(x, delta)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-9)
    left = layer.kind.of_records(double(found), double(delta)).numpy()
    pairs = zip(delta, x, strict=True)
    told = sum(layer.kind.operator(double(d)).numpy().T @ record.ravel() for d, record in pairs)
    np.testing.assert_allclose(told, left, atol=1e-9)


@pytest.mark.parametrize(("module", "shape"), KINDS[2:4], ids=["conv1d", "conv2d"])
def test_the_general_kind_finds_what_a_closed_form_does(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Leverages in activations and gradients together, of three records."""
    rng = np.random.default_rng(0)
    layers = FirstLayer(module, nn.ReLU(), shape), general(module, shape)
    delta, kept = rng.normal(size=(3, layers[0].width)), rng.random((3, layers[0].width)) < 0.3
    maps = [LayerMap(layer, layer.initial_weights()) for layer in layers]
    found = [joint(m, [delta], [kept]) for m in maps]
    assert found[0].largest == pytest.approx(found[1].largest, abs=1e-9)
    both = [coordinates([(m, kept)]) for m in maps]
    np.testing.assert_allclose(both[0].largest, both[1].largest, atol=1e-9)
    np.testing.assert_array_equal(both[0].rank, both[1].rank)


@EACH
def test_the_control_brings_records_back(module: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    fresh, count = kind_of(module, shape).control(40)
    layer = FirstLayer(fresh, nn.ReLU(), shape)
    assert type(layer.kind) is type(kind_of(module, shape))
    x = np.random.default_rng(0).random((count, *shape)).astype(np.float32)
    assert negative_control(layer, layer.initial_weights(), x, 0) > 60


@pytest.mark.parametrize(("module", "shape"), KINDS[:4], ids=lambda v: str(v).replace(" ", ""))
def test_a_kind_builds_what_it_describes(module: nn.Module, shape: tuple[int, ...]) -> None:
    kind = kind_of(module, shape)
    again = kind_named(kind.name).build(kind.describe(), bias=module.bias is not None)
    assert repr(again) == repr(module)


def test_an_unknown_kind_names_the_known() -> None:
    with pytest.raises(ConfigError, match="'Circulant' are not known here: Conv1d, Conv2d, Linear"):
        kind_named("Circulant")


# --- what is no linear layer -----------------------------------------------------------------------------------


class _Wrong(nn.Module):
    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.inner, self.how = nn.Linear(4, 3), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.inner, x)


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (lambda inner, x: inner(x).relu(), "must be linear in the record"),
        (lambda inner, x: inner(x.square()), "must be linear in the record"),
        (lambda inner, x: inner(x) * (inner.weight.sum() > 0), "must be linear in its parameters"),
        (lambda inner, x: x @ inner.weight.T @ inner.weight, "must be linear in its parameters"),
        (lambda inner, x: nn.functional.dropout(inner(x)), "the same outputs whenever"),
        (lambda inner, x: inner(x - x.mean(dim=0)), "the same outputs whenever"),
        (lambda inner, x: inner(x).float(), "in the dtype that they have"),
        (lambda inner, x: inner(x)[:2], "as many rows as it is given records"),
        (lambda inner, x: inner(x) / 0, "finite outputs"),
        (lambda inner, x: inner(x[:, :3]), r"does not take records of shape \(4,\)"),
    ],
)
def test_a_module_that_is_not_linear_is_refused(forward: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"first layer _Wrong .*{said}"):
        FirstLayer(_Wrong(forward), nn.ReLU(), (4,))


def test_rows_of_a_wide_module_are_taken_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, taken = _General(nn.Linear(6, 40), (6,)), []
    transpose = General.transpose
    monkeypatch.setattr(general_kind, "_BLOCK", 7 * 46)
    monkeypatch.setattr(General, "transpose", lambda *args: taken.append(len(args[2])) or transpose(*args))
    linear = {name: double(p.detach().numpy()) for name, p in kind.module.named_parameters()}
    assert torch.equal(kind.kernels(linear), linear["weight"]) and taken == [7, 7, 7, 7, 7, 5]


def test_buffers_come_along() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)
            self.register_buffer("scale", torch.arange(1.0, 5.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * self.scale)

    layer = FirstLayer(Scaled(), nn.ReLU(), (4,))
    layer.load_weights(layer.initial_weights())
    m = LayerMap(layer, layer.initial_weights())
    np.testing.assert_allclose(m.kernels, layer.unrolled().detach().numpy(), atol=1e-6)
    assert layer.description == FirstLayer(Scaled(), nn.ReLU(), (4,)).description
    other = Scaled()
    other.scale += 1  # type: ignore[operator]
    assert layer.description != FirstLayer(other, nn.ReLU(), (4,)).description  # a ledger must not take it for the same
