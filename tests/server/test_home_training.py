"""Labels at home: what is computed is what is computed where they are shared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labels_at_home import HEAD, at_home
from references import centralised, delayed, largest_difference, moved, trained
from torch import nn

from fedsplit import simulate
from fedsplit.service.served import Served


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_without_dropping_it_is_centralised_sgd(kind: str, out: Path) -> None:
    """Fifty rounds over three nodes of two devices."""
    settings = at_home(
        run={"rounds": 50},
        data={"builder": f"own:{kind}"},
        model={"builder": f"own:{kind}_model"},
        devices={"per-node": 2},
    )
    simulate(settings, out=out)
    found = trained(out)
    assert moved(settings, found) > 0.01
    assert largest_difference(found, centralised(settings)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("chunk", ["epoch", 7])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_pipelined_applies_first_layer_gradients_one_round_late(kind: str, chunk: int | str, out: Path) -> None:
    """As with shared labels: see ``test_exactness.py``."""
    settings = at_home(
        run={"rounds": 8},
        data={"builder": f"own:{kind}"},
        model={"builder": f"own:{kind}_model"},
        devices={"per-node": 2},
        protocol={"mode": "pipelined", "chunk": chunk},
        first_layer={"lr": 0.3},
    )
    simulate(settings, out=out)
    found = trained(out)
    assert moved(settings, found) > 0.01
    assert largest_difference(found, delayed(settings)) < 1e-5
    assert largest_difference(found, centralised(settings)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_how_devices_are_packed_into_nodes_changes_nothing(dtype: str, tmp_path: Path) -> None:
    for per_node in (1, 2, 5):
        settings = at_home(
            run={"rounds": 10},
            devices={"per-node": per_node},
            protocol={"dtype": dtype},
            dropping={"policy": "random", "keep": 0.5},
            first_layer={"strategy": "FedAdam", "lr": 0.01},
        )
        simulate(settings, out=tmp_path / str(per_node))
    found = [trained(tmp_path / str(per_node)) for per_node in (1, 2, 5)]
    assert largest_difference(found[0], found[1]) < 1e-5
    assert largest_difference(found[0], found[2]) < 1e-5


CASES: dict[str, dict[str, dict[str, Any]]] = {
    "adam": {"trunk": {"optimizer": "adam", "lr": 0.01}},
    "momentum and decay": {"trunk": {"momentum": 0.9, "weight-decay": 0.01}},
    "dropping and a schedule": {"dropping": {"policy": "random", "keep": 0.5}, "trunk": {"schedule": "cosine"}},
    "dropout and batch norm": {"model": {"builder": "own:random_model"}},
    "thinning": {"trunk": {"thinning": 0.5}},
    "a frozen first layer": {"first-layer": {"strategy": "frozen"}},
    "a sum of each device's": {"first-layer": {"strategy": "FedMedian"}},
    "some devices": {"devices": {"fraction": 0.5}},
    "several passes": {"protocol": {"trunk-epochs": 3}, "model": {"builder": "own:random_model"}},
    "regression": {
        "data": {"builder": "own:regression", "task": "regression", "outputs": 1},
        "model": {"builder": None, "name": "mlp", "width": 8},
        "trunk": {"lr": 0.01},
    },
    "binary": {
        "data": {"builder": None, "name": "breast-cancer", "task": None, "outputs": None},
        "devices": {"count": 5, "partition": "iid"},
        "model": {"builder": None, "name": "mlp", "width": 8},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["synchronous", "pipelined"])
@pytest.mark.parametrize("case", CASES)
def test_where_labels_are_changes_nothing(case: str, mode: str, tmp_path: Path) -> None:
    """Weights and scores are those of shared labels; what would tell of single classes is not there."""
    results = {}
    for labels in ("shared", "at-home"):
        changes = {**CASES[case], "protocol": {"labels": labels, "mode": mode, **CASES[case].get("protocol", {})}}
        settings = at_home(run={"rounds": 6}, **changes)
        results[labels] = simulate(settings, out=tmp_path / labels)
    shared, private = results["shared"], results["at-home"]
    assert largest_difference(trained(tmp_path / "shared"), trained(tmp_path / "at-home")) < 1e-5
    for score in ("test_loss", "test_accuracy", "test_rmse"):
        assert shared.get(score) == pytest.approx(private.get(score), abs=1e-5)
    assert "test_f1" not in private and "test_r2" not in private
    lines = [[json.loads(line) for line in (tmp_path / m / "metrics.jsonl").open()] for m in ("shared", "at-home")]
    for line, other in zip(*lines, strict=True):
        assert line["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)
        assert line.get("train_accuracy") == pytest.approx(other.get("train_accuracy"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["synchronous", "pipelined"])
def test_an_interrupted_run_resumes_exactly_and_its_model_predicts(mode: str, tmp_path: Path) -> None:
    settings = at_home(
        run={"rounds": 6},
        protocol={"dtype": "float16", "mode": mode, "trunk-epochs": 2},
        first_layer={"strategy": "FedAdam", "lr": 0.01},
        trunk={"optimizer": "adam", "lr": 0.01},
    )
    whole = simulate(settings, out=tmp_path / "whole")

    def interrupt(metrics: dict[str, object]) -> None:
        if metrics["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(settings, out=tmp_path / "cut", report=interrupt)
    resumed = simulate(settings, out=tmp_path / "cut", resume=True)
    assert largest_difference(trained(tmp_path / "whole"), trained(tmp_path / "cut")) == 0.0
    assert resumed["test_loss"] == whole["test_loss"]
    served = Served.of_run(tmp_path / "cut")
    head = {k.rpartition(".")[2]: v for k, v in trained(tmp_path / "cut").items() if k.startswith("trunk.2.")}
    assert torch.equal(served.trunk[2].weight, head["weight"]) and torch.equal(served.trunk[2].bias, head["bias"])


def test_gradients_are_those_of_autograd() -> None:
    rng = np.random.default_rng(0)
    layer, y = nn.Linear(8, 3).double(), rng.integers(0, 3, 6)
    x = torch.from_numpy(rng.normal(size=(6, 8)).astype(np.float32))
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(p.float())
    inputs = x.double().requires_grad_()
    loss = nn.functional.cross_entropy(layer(inputs), torch.from_numpy(y), reduction="sum")
    loss.backward()
    flat = np.concatenate([p.detach().numpy().ravel() for p in layer.parameters()]).astype(np.float32)
    found = HEAD.sums(flat, x.numpy(), y)
    assert found.loss == pytest.approx(loss.item())
    np.testing.assert_allclose(found.features, inputs.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(found.head[:24].reshape(3, 8), layer.weight.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(found.head[24:], layer.bias.grad.numpy(), atol=1e-12)
    assert found.correct == int((layer(inputs).argmax(1).numpy() == y).sum())
