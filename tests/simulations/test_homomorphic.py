"""Predictions of encrypted records are the network's; what cannot be measured is said."""

import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedsplit.model.split import SplitModel
from simulations.encryption import paillier as scheme
from simulations.encryption.ckks import Product, ckks
from simulations.encryption.homomorphic import measured
from simulations.encryption.paillier import paillier
from simulations.encryption.stages import LeftOut, stages


def network(*shape: int) -> nn.Sequential:
    torch.manual_seed(4)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(shape):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def served(net: nn.Sequential, shape: tuple[int, ...]) -> Any:
    model = SplitModel.from_sequential(net, shape)
    return SimpleNamespace(bundle=SimpleNamespace(layer=model.first_layer), trunk=model.trunk)


def records(*shape: int) -> np.ndarray:
    return np.random.default_rng(8).normal(size=shape)


def outputs(net: nn.Sequential, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net.double()(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize("outputs", [1, 2, 3, 5, 16, 20])
@pytest.mark.parametrize("inputs", [1, 2, 7, 16, 50])
def test_diagonals_and_rotations_are_the_product(outputs: int, inputs: int) -> None:
    weight, x = records(outputs, inputs), records(inputs)
    product = Product(weight)
    slots, turned = np.zeros(product.length), []
    slots[:inputs] = x

    def turn(vector: np.ndarray, step: int) -> np.ndarray:
        turned.append(step)
        return np.roll(vector, -step)

    def times(vector: np.ndarray, diagonal: int) -> np.ndarray | None:
        found = product.diagonals[diagonal]
        return vector * np.tile(found, 4) if found.any() else None

    found = product.run(np.tile(slots, 4), times, np.add, turn).reshape(-1, product.rows)
    assert np.allclose(found[:, :outputs], weight @ x)  # in all slots: none tells of a part of a sum
    assert np.allclose(found[:, outputs:], 0)
    assert set(turned) <= product.steps
    assert len(turned) <= 2 * product.baby + product.rows // product.baby + len(product.folds)


def test_a_network_comes_apart_into_products_and_what_follows_them() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.ReLU(), nn.Linear(4, 5, bias=False), nn.Linear(5, 2))
    model, x = SplitModel.from_sequential(net, (2, 3)), records(7, 6)
    y = x
    for layer in stages(model.first_layer, model.trunk):
        y = layer.activated(y @ layer.weight.T + layer.bias)
    assert np.allclose(y, outputs(net, x), atol=1e-6)


@pytest.mark.parametrize(
    ("net", "shape", "told"),
    [
        (nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh()), (6,), "the trunk has Tanh"),
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), (6,), "the trunk has BatchNorm1d"),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4)), (2, 3), "the first layer is Linear"),
        (nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten()), (2, 9), "the first layer is Conv1d"),
    ],
)
def test_other_networks_are_left_out(net: nn.Sequential, shape: tuple[int, ...], told: str) -> None:
    rows, lines = measured(served(net, shape), records(1, *shape), np.zeros((1, 2)))
    assert not rows and len(lines) == 2
    assert all(line.startswith(f"{s} is left out: {told}") for s, line in zip(("CKKS", "Paillier"), lines, strict=True))


def test_without_the_packages_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tenseal", "tenseal.sealapi", "phe", "phe.util"):
        monkeypatch.setitem(sys.modules, name, None)
    rows, lines = measured(served(network(6, 4, 2), (6,)), records(1, 6), np.zeros((1, 2)))
    assert not rows
    assert lines == [
        f"{scheme} is left out: it needs the package {package}: pip install 'fedsplit[he]'"
        for scheme, package in (("CKKS", "tenseal"), ("Paillier", "phe"))
    ]


def test_ckks_gives_the_whole_networks_outputs() -> None:
    pytest.importorskip("tenseal")
    net, x = network(12, 10, 7, 3), 4 * records(2, 12)
    model = SplitModel.from_sequential(net, (12,))
    name, row, said = ckks(stages(model.first_layer, model.trunk), x, outputs(net, x))
    assert name.startswith("CKKS") and "2 records, 3 round trips each" in said
    assert row["bytes_up"] > 3 * 4096 and row["bytes_down"] > 3 * 4096 and row["server_us"] > 0 < row["device_us"]
    with pytest.raises(RuntimeError, match="another prediction"):
        ckks(stages(model.first_layer, model.trunk), x, outputs(net, x) + 0.01)


def test_what_no_ciphertext_holds_is_left_out() -> None:
    pytest.importorskip("tenseal")
    model = SplitModel.from_sequential(network(9000, 2, 2), (9000,))
    with pytest.raises(LeftOut, match="a layer takes 16384 numbers"):
        ckks(stages(model.first_layer, model.trunk), records(1, 9000), np.zeros((1, 2)))


def test_paillier_gives_the_first_layers_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a key that is far too short, for speed: it checks the outputs by itself, signs included."""
    pytest.importorskip("phe")
    (layer, _) = stages(served(network(12, 10, 3), (12,)).bundle.layer, nn.Linear(10, 3))
    name, row, said = paillier(layer, records(12), bits=256)
    assert name == "Paillier, first layer" and "scaled" not in said
    assert (row["bytes_up"], row["bytes_down"]) == (12 * 64, 10 * 64)
    monkeypatch.setattr(scheme, "LONGEST", 0.0)
    name, row, said = paillier(layer, records(12), bits=256)
    assert name == "Paillier, first layer, from 1 of 10 outputs" and "1 of 10 outputs were computed" in said
    assert row["bytes_down"] == 10 * 64
    monkeypatch.setattr(scheme, "_FRACTION", 2)
    with pytest.raises(RuntimeError, match="Paillier: another prediction"):
        paillier(layer, records(12), bits=256)
