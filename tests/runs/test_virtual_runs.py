"""Runs over devices that are away, late and lost: who is heard and counted; nothing else changes."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import simulated_json
from references import largest_difference, trained
from virtual_devices import FAST, SHAKY, metrics_of, settings_for

from fedsplit import simulate
from fedsplit.device.node import Node
from fedsplit.flower.grid import InProcessGrid
from fedsplit.guard.sealed import load_sealed
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from fedsplit.runs.client_app import client_app
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.training import TrainingRun
from fedsplit.wire.exchange import Download, Upload

pytestmark = pytest.mark.slow  # whole runs


@pytest.mark.parametrize("sampled", [{}, {"fraction": 0.5, "sampling": "size", "per-node": 2}])
@pytest.mark.parametrize("mode", ["synchronous", "pipelined", "single-pass", "release-once"])
def test_a_profile_in_which_all_are_heard_changes_nothing(mode: str, sampled: dict[str, Any], tmp_path: Path) -> None:
    """Also where devices that have released all they have are sampled for nothing."""
    results = []
    for name, profile in {"with": FAST, "without": None}.items():
        settings = settings_for(profile, mode, devices=dict(sampled), run={"rounds": 6})
        results.append(simulate(settings, out=tmp_path / name))
    assert largest_difference(trained(tmp_path / "with"), trained(tmp_path / "without")) == 0
    for name in ("test_loss", "samples", "exposures_max", "ledger"):
        assert results[0][name] == results[1][name]
    assert results[0]["simulated"]["seconds"] > 0 and "simulated" not in results[1]


def hostile_weather(**devices: Any) -> Settings:
    """Return a run in which everything happens: rounds are cut off, devices come and go."""
    return settings_for(
        {**SHAKY, "availability": {"on": 3.0, "off": 1.0}},
        run={"rounds": 12},
        devices={"count": 16, "test": [14, 15], "fraction": 0.7, "over-sampling": 1.3, **devices},
        data={"builder": "own:few"},
        protocol={"deadline": 0.4, "max-staleness": 3},
    )


def test_schedule_and_metrics_are_the_same_however_devices_are_packed(tmp_path: Path) -> None:
    found = {}
    for per_node in (1, 3, 16):
        simulate(hostile_weather(**{"per-node": per_node}), out=tmp_path / str(per_node))
        found[per_node] = metrics_of(tmp_path / str(per_node))
        devices = (tmp_path / str(per_node) / "devices.csv").read_text()
        assert devices == (tmp_path / "1" / "devices.csv").read_text()
        assert largest_difference(trained(tmp_path / str(per_node)), trained(tmp_path / "1")) == 0
    assert found[1] == found[3] == found[16]
    for fate in ("late", "lost", "spare", "away"):
        assert any(line[fate] for line in found[1]), fate
    simulate(hostile_weather(), out=tmp_path / "other")
    changed = hostile_weather().model_copy(update={"run": hostile_weather().run.model_copy(update={"seed": 4})})
    simulate(changed, out=tmp_path / "seed")
    assert metrics_of(tmp_path / "other") == found[1] != metrics_of(tmp_path / "seed")


@pytest.mark.parametrize("after", [3, 7])
def test_a_resumed_run_goes_on_at_the_same_time(after: int, tmp_path: Path) -> None:
    def interrupt(metrics: dict[str, object]) -> None:
        if metrics["round"] == after:
            raise KeyboardInterrupt

    whole = simulate(hostile_weather(), out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        simulate(hostile_weather(), out=tmp_path / "cut", report=interrupt)
    resumed = simulate(hostile_weather(), out=tmp_path / "cut", resume=True)
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    assert resumed["simulated"] == whole["simulated"]


def test_what_was_measured_is_not_measured_again_by_a_resumed_run(tmp_path: Path) -> None:
    def interrupt(metrics: dict[str, object]) -> None:
        raise KeyboardInterrupt

    unmeasured = settings_for({"uplink": 1.0, "downlink": 1.0, "release-seconds": 5.0})
    with pytest.raises(KeyboardInterrupt):
        simulate(unmeasured, out=tmp_path / "run", report=interrupt)
    config = (tmp_path / "run" / "config.toml").read_text()
    assert "release-seconds = 5.0" in config and "gradient-seconds = " in config
    simulate(unmeasured, out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "config.toml").read_text() == config


class Watched:
    """Notes what leaves the nodes of a run, by device and record, whatever becomes of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.released: Counter[tuple[int, int]] = Counter()
        exchange = Node.exchange

        def watched(node: Node, download: Download) -> Upload:
            node._record = self._note
            return exchange(node, download)

        monkeypatch.setattr(Node, "exchange", watched)

    def _note(self, download: Download, upload: Upload, index: Any) -> None:
        owners = np.repeat(upload.release.devices, upload.release.records)
        self.released.update(zip(owners.tolist(), index.tolist(), strict=True))


def ledgers_of(folder: Path) -> Counter[tuple[int, int]]:
    """Return how often each record has left, as the nodes' ledgers have it."""
    found: Counter[tuple[int, int]] = Counter()
    for path in folder.glob("nodes/*/*/ledger-train.npz"):
        held, _ = load_sealed(path)
        for name, count in zip(*np.unique(held["sent"][:, 0], return_counts=True), strict=True):
            found[int(name) >> 32, int(name) & 0xFFFFFFFF] += int(count)
    return found


def run_watched(settings: Settings, folder: Path) -> TrainingRun:
    """Train without what a simulation clears away in the end."""
    RunFolder(folder).open(settings, resume=False)
    run = TrainingRun(settings, folder)
    nodes = Experiment(settings).nodes
    run.train(InProcessGrid(client_app(simulated_json(settings), str(folder / "nodes")), nodes))
    return run


@pytest.mark.parametrize("mode", ["single-pass", "release-once", "pipelined"])
@pytest.mark.parametrize("per_node", [1, 4])
def test_no_release_is_lost_or_counted_twice_in_the_ledgers(
    mode: str, per_node: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    settings = settings_for(
        {**FAST, "availability": 0.7, "dropout": 0.1},
        mode,
        run={"rounds": 10},
        devices={"count": 16, "test": [15], "per-node": per_node},
        data={"builder": "own:few"},
        dropping={"policy": "random", "keep": 0.9} if mode == "pipelined" else {},  # else what leaves twice is the same
        protocol={"chunk": {"single-pass": "spread"}.get(mode, "epoch"), "deadline": 60.0},
    )
    run = run_watched(settings, tmp_path / "run")
    assert run.result is not None
    simulated = run.result["simulated"]
    assert simulated["lost"] > 0 and simulated["away"] > 0
    assert simulated["released"] == sum(watched.released.values()) == run.result["samples"] + simulated["wasted"]
    different = Counter(dict.fromkeys(watched.released, 1))
    if mode == "pipelined":
        assert max(watched.released.values()) > 1 and ledgers_of(tmp_path / "run") == watched.released
    elif mode == "single-pass":
        assert ledgers_of(tmp_path / "run") == watched.released == different
        assert simulated["wasted"] > 0
    else:  # what was lost is asked for again, and is the same: nothing new leaves
        assert ledgers_of(tmp_path / "run") == different != watched.released
        records = {(d, i) for d in range(16) if d != 1 for i in range(2 + d % 5)}
        assert set(different) == records and run.result["samples"] == len(records)
    assert run.result["exposures_max"] == max(ledgers_of(tmp_path / "run").values())


def test_gradients_of_lost_devices_wait_and_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a step of the first layer is over: every record's gradient is in one, but those that waited too long."""
    stepped: list[int] = []
    run_step = TrainingRun.train

    def watch(run: TrainingRun, grid: Any) -> dict[str, Any]:
        first_layer = run.strategy.first_layer
        assert first_layer is not None
        step = first_layer.step

        def noted(number: int, contributions: Any, stream: str = "first-layer") -> None:
            stepped.append(sum(count for _, count in contributions))
            step(number, contributions, stream)

        monkeypatch.setattr(first_layer, "step", noted)
        return run_step(run, grid)

    monkeypatch.setattr(TrainingRun, "train", watch)
    settings = settings_for(
        {**FAST, "dropout": 0.3},
        run={"rounds": 8},
        devices={"count": 12, "test": [11], "per-node": 4},
        data={"builder": "own:few"},
        protocol={"deadline": 60.0, "max-staleness": 8},
    )
    result = simulate(settings, out=tmp_path / "run")
    last = 3  # of the devices lost in the flush nobody asks again
    assert result["samples"] - last * 8 <= sum(stepped) <= result["samples"]
    assert len(stepped) >= 8 and result["simulated"]["lost"] > 10
