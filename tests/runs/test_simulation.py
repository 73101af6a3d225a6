"""Whole runs: packing of devices into nodes, engines, and that every kind of data and model learns."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIGS, small_settings
from references import largest_difference, moved, trained

from fedsplit import simulate
from fedsplit.common.errors import RunError
from fedsplit.plan.settings import Settings, load_settings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]  # whole runs


EXACT = [
    "run.rounds=3",
    "protocol.mode=pipelined",
    "protocol.chunk=epoch",
    "protocol.dtype=float32",
    "first-layer.strategy=FedAvg",
    "first-layer.lr=0.1",
    "trunk.optimizer=sgd",
    "trunk.lr=0.05",
]


def wearables(*overrides: str, engine: str = "inline", config: str = "wearables") -> Settings:
    return load_settings(CONFIGS / f"{config}.toml", [f"run.engine={engine}", *overrides])


def test_packing_and_engine_change_nothing(tmp_path: Path) -> None:
    """14 training devices (and 6 test devices) as 14 x 1, 7 x 2 and 2 x 7 nodes, and the same on Ray."""
    settings = wearables(*EXACT, "devices.per-node=1", config="wearables-paper")
    assert settings.dropping.policy == "random"
    simulate(settings, out=tmp_path / "1")
    reference = trained(tmp_path / "1")
    assert moved(settings, reference) > 1e-3
    for per_node in (2, 7):
        simulate(
            wearables(*EXACT, f"devices.per-node={per_node}", config="wearables-paper"), out=tmp_path / str(per_node)
        )
        assert largest_difference(trained(tmp_path / str(per_node)), reference) < 1e-5
    simulate(wearables(*EXACT, "devices.per-node=7", engine="ray", config="wearables-paper"), out=tmp_path / "ray")
    assert largest_difference(trained(tmp_path / "ray"), reference) < 1e-5


def test_packing_and_engine_change_nothing_at_a_thousand_devices(tmp_path: Path) -> None:
    """Two to six records each, so that a node sums many devices in one product; some devices sit out every round."""
    reference = None
    for name, per_node, engine in (("2", 500, "inline"), ("100", 10, "inline"), ("ray", 300, "ray")):
        settings = small_settings(
            run={"engine": engine, "rounds": 3},
            data={"builder": "own:few"},
            devices={"count": 1000, "per-node": per_node, "fraction": 0.7, "test": [7, 999]},
            dropping={"policy": "random", "keep": 0.5},
        )
        simulate(settings, out=tmp_path / name)
        reference = reference or trained(tmp_path / name)
        assert moved(settings, reference) > 1e-3
        assert largest_difference(trained(tmp_path / name), reference) < 1e-5


def test_packing_and_engine_change_no_bit_of_the_shipped_run(tmp_path: Path) -> None:
    """Float16, top-k and adaptive steps magnify one different bit: to half a point of accuracy in 60 rounds."""
    runs = {
        name: simulate(wearables("run.rounds=25", f"devices.per-node={n}", engine=engine), out=tmp_path / name)
        for name, n, engine in (("1", 1, "inline"), ("7", 7, "inline"), ("ray", 2, "ray"))
    }
    assert len({run["test_loss"] for run in runs.values()}) == 1
    for name in ("7", "ray"):
        assert largest_difference(trained(tmp_path / name), trained(tmp_path / "1")) == 0


def test_devices_are_away_late_and_lost_in_the_same_way_on_ray(tmp_path: Path) -> None:
    profile = {"preset": "phones-4g", "release-seconds": 1e-3, "gradient-seconds": 1e-3, "dropout": 0.2}
    devices = {"count": 12, "test": [11], "fraction": 0.5, "over-sampling": 1.5, "profile": profile}
    lines = {}
    for engine, per_node in (("inline", 1), ("ray", 5)):
        settings = small_settings(
            run={"engine": engine},
            data={"builder": "own:few"},
            devices={**devices, "per-node": per_node},
            protocol={"deadline": 0.2},
        )
        simulate(settings, out=tmp_path / engine)
        found = [json.loads(line) for line in (tmp_path / engine / "metrics.jsonl").read_text().splitlines()]
        clocked = ("seconds", "trunk_seconds", "exchanges", "bytes_up", "bytes_down")
        lines[engine] = [{k: v for k, v in line.items() if k not in clocked} for line in found]
    assert lines["ray"] == lines["inline"] and any(line["lost"] for line in lines["ray"])
    assert largest_difference(trained(tmp_path / "ray"), trained(tmp_path / "inline")) == 0


def test_a_weighted_mean_needs_no_contributions_per_device(tmp_path: Path) -> None:
    """Per device or per node, FedAvg steps alike: one sum per node is enough, and the same gradients are sent."""
    trained_by = {}
    for per_node in (1, 5):
        simulate(small_settings(devices={"per-node": per_node}), out=tmp_path / str(per_node))
        trained_by[per_node] = trained(tmp_path / str(per_node))
    assert largest_difference(trained_by[1], trained_by[5]) < 1e-6


@pytest.mark.parametrize(
    "policy",
    [
        {"policy": "bits", "bits": 1},
        {"policy": "bits", "bits": 5},
        {"policy": "units", "k": 10},
        {"policy": "none", "clip": 2.0, "noise": 4.0},
        {"policy": "random", "keep": 0.5, "clip": 2.0, "noise": 4.0},
    ],
    ids=lambda p: f"{p['policy']}{p.get('bits', '')}{'+noise' * ('noise' in p)}",
)
def test_packing_changes_nothing_of_any_policy(policy: dict[str, object], tmp_path: Path) -> None:
    """Codes, noise and scales belong to records: the trunk sees the same, whoever they are sent with."""
    results, ends = [], []
    for per_node in (1, 5):
        settings = small_settings(devices={"per-node": per_node}, dropping=policy, protocol={"dtype": "float16"})
        results.append(simulate(settings, out=tmp_path / str(per_node)))
        ends.append(trained(tmp_path / str(per_node)))
    assert moved(settings, ends[0]) > 1e-3
    assert largest_difference(*ends) < 1e-6
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], rel=1e-6)
    assert results[0]["ledger"] == results[1]["ledger"]


def test_frozen_sends_no_cut_gradients(tmp_path: Path) -> None:
    moving = simulate(small_settings(), out=tmp_path / "moving")
    settings = small_settings(first_layer={"strategy": "frozen"})
    frozen = simulate(settings, out=tmp_path / "frozen")
    assert moved(settings, trained(tmp_path / "frozen"), ["first."]) == 0.0
    assert frozen["bytes_down"] < 0.7 * moving["bytes_down"]


def test_sampling_devices_trains_and_delivers_late_gradients(tmp_path: Path) -> None:
    settings = small_settings(run={"rounds": 10}, devices={"fraction": 0.4}, protocol={"max-staleness": 2})
    result = simulate(settings, out=tmp_path / "run")
    assert moved(settings, trained(tmp_path / "run")) > 1e-3
    assert result["exposures_max"] < 10


@pytest.mark.parametrize(("config", "accuracy"), [("mnist", 0.75), ("digits", 0.75), ("wearables-paper", 0.6)])
def test_shipped_settings_learn(config: str, accuracy: float, tmp_path: Path) -> None:
    settings = load_settings(CONFIGS / f"{config}.toml", ["run.engine=inline"])
    assert simulate(settings, out=tmp_path / "run")["test_accuracy"] > accuracy


def test_breast_cancer_learns_as_a_binary_task(tmp_path: Path) -> None:
    settings = small_settings(
        run={"rounds": 20},
        data={"name": "breast-cancer", "builder": None, "task": None, "outputs": None},
        devices={"count": 6, "test": 2, "partition": "iid", "per-node": 3},
        model={"name": "mlp", "builder": None, "width": 16},
        dropping={"policy": "random", "keep": 0.5},
        first_layer={"strategy": "FedAdam", "lr": 0.01},
        trunk={"optimizer": "adam", "lr": 0.01},
    )
    result = simulate(settings, out=tmp_path / "run")
    assert result["test_accuracy"] > 0.85
    assert len(result["test_f1"]) == 2


def test_a_folder_of_own_files_learns(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    means = np.random.default_rng(0).normal(size=(3, 6))
    for device in range(4):
        rng = np.random.default_rng(device + 1)
        y = rng.integers(0, 3, 60)
        x = means[y] + 0.5 * rng.normal(size=(60, 6))
        np.savez(folder / f"site-{device}.npz", x=x[:40], y=y[:40], x_test=x[40:], y_test=y[40:])
    overrides = [f"data.folder={folder}", "run.engine=inline", "first-layer.lr=0.01", "trunk.lr=0.01"]
    result = simulate(CONFIGS / "own-data.toml", overrides=overrides, out=tmp_path / "run")
    assert result["test_accuracy"] > 0.7


def test_devices_whose_records_overlap_share_a_node_with_others(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for device in range(3):
        rng = np.random.default_rng(device)
        segments = {"segments": np.stack([np.arange(9), np.arange(1, 10)], axis=1)} if device == 1 else {}
        x, test = rng.normal(size=(9, 12)), rng.normal(size=(3, 12))
        np.savez(folder / f"{device}.npz", x=x, y=np.arange(9) % 3, x_test=test, y_test=np.arange(3), **segments)
    data = {"folder": str(folder), "builder": None}
    settings = small_settings(data=data, devices={"count": 3, "per-node": 3, "test": [2]})
    result = simulate(settings, out=tmp_path / "run")
    assert result["samples"] == 4 * 3 * 9
    assert result["ledger"]["releases"] == 2 * result["exposures_max"]  # of a piece that two windows share


def test_an_own_model_learns_own_data(tmp_path: Path) -> None:
    settings = small_settings(
        run={"rounds": 30}, devices={"per-node": 5}, dropping={"policy": "top-k", "k": 5}, first_layer={"lr": 0.5}
    )
    result = simulate(settings, out=tmp_path / "run")
    assert result["test_accuracy"] > 0.7


def test_regression_learns(tmp_path: Path) -> None:
    settings = small_settings(
        run={"rounds": 40},
        data={"builder": "own:regression", "task": "regression", "outputs": 1},
        devices={"test": "all", "per-node": 5},
        model={"builder": "own:regression_model"},
        first_layer={"strategy": "FedAdam", "lr": 0.02},
        trunk={"optimizer": "adam", "lr": 0.02},
    )
    result = simulate(settings, out=tmp_path / "run")
    assert result["test_accuracy"] is None
    assert result["test_r2"] > 0.8


def test_a_trunk_that_diverges_stops_before_its_checkpoint(tmp_path: Path) -> None:
    settings = small_settings(run={"rounds": 30}, trunk={"optimizer": "sgd", "lr": 1e38})
    with pytest.raises(RunError, match=r"the trunk is not finite: lower trunk\.lr"):
        simulate(settings, out=tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint"
    assert not checkpoint.exists() or all(t.isfinite().all() for t in trained(tmp_path / "run").values())
