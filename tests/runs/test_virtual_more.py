"""Runs over devices that are away, late and lost, with labels at home and with guards that enforce."""

from pathlib import Path
from typing import Any

import pytest
from conftest import small_settings
from references import largest_difference, moved, trained
from torch import nn
from virtual_devices import FAST, SHAKY, metrics_of, settings_for

from fedsplit import SplitModel, simulate
from fedsplit.plan.settings import Settings
from fedsplit.server.aggregation import FirstLayerServer

pytestmark = pytest.mark.slow  # whole runs

MODES = ["synchronous", "pipelined"]


def at_home(profile: dict[str, Any] | None, mode: str, **changes: dict[str, Any]) -> Settings:
    protocol = {"labels": "at-home", "batch-size": 1000, **changes.pop("protocol", {})}
    return settings_for(profile, mode, protocol=protocol, **changes)


@pytest.mark.parametrize("per_node", [1, 2])
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_profile_in_which_all_are_heard_changes_nothing_with_labels_at_home(
    mode: str, epochs: int, per_node: int, tmp_path: Path
) -> None:
    results = []
    for name, profile in {"with": FAST, "without": None}.items():
        settings = at_home(profile, mode, protocol={"trunk-epochs": epochs}, devices={"per-node": per_node})
        results.append(simulate(settings, out=tmp_path / name))
    assert moved(settings, trained(tmp_path / "with")) > 0.01
    assert largest_difference(trained(tmp_path / "with"), trained(tmp_path / "without")) == 0
    for name in ("test_loss", "test_accuracy", "samples", "exposures_max", "ledger"):
        assert results[0][name] == results[1][name]


def hostile_weather(mode: str, **devices: Any) -> Settings:
    return at_home(
        {**SHAKY, "availability": {"on": 3.0, "off": 1.0}},
        mode,
        run={"rounds": 12},
        devices={"count": 16, "test": [14, 15], "fraction": 0.7, "over-sampling": 1.3, **devices},
        protocol={"deadline": 0.8, "max-staleness": 3},
    )


@pytest.mark.parametrize("mode", MODES)
def test_with_labels_at_home_all_is_the_same_however_devices_are_packed(mode: str, tmp_path: Path) -> None:
    found = {}
    for per_node in (1, 3, 16):
        simulate(hostile_weather(mode, **{"per-node": per_node}), out=tmp_path / str(per_node))
        found[per_node] = metrics_of(tmp_path / str(per_node))
        devices = (tmp_path / str(per_node) / "devices.csv").read_text()
        assert devices == (tmp_path / "1" / "devices.csv").read_text()
        assert largest_difference(trained(tmp_path / str(per_node)), trained(tmp_path / "1")) < 1e-5
    for fate in ("late", "lost", "away"):
        assert any(line[fate] for line in found[1]), fate
    told = [[{k: v for k, v in line.items() if k != "train_loss"} for line in found[n][:-1]] for n in found]
    assert told[0] == told[1] == told[2]


def test_a_resumed_run_with_labels_at_home_goes_on_at_the_same_time(tmp_path: Path) -> None:
    def interrupt(metrics: dict[str, object]) -> None:
        if metrics["round"] == 5:
            raise KeyboardInterrupt

    whole = simulate(hostile_weather("pipelined"), out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        simulate(hostile_weather("pipelined"), out=tmp_path / "cut", report=interrupt)
    resumed = simulate(hostile_weather("pipelined"), out=tmp_path / "cut", resume=True)
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    assert resumed["simulated"] == whole["simulated"]
    assert largest_difference(trained(tmp_path / "whole"), trained(tmp_path / "cut")) == 0


def three_layers() -> SplitModel:
    """Return a model of whose outputs all are sent, zeros too."""
    net = nn.Sequential(nn.Linear(12, 10), nn.Identity(), nn.Linear(10, 8), nn.Linear(8, 3))
    return SplitModel.from_sequential(net, input_shape=(12,))


def test_questions_about_labels_take_their_time(tmp_path: Path) -> None:
    """One device of 7 records: a release without labels, features and gradients, cut gradients and a sum.

    As in ``test_virtual_time.py``, but 4 bytes less of each record, and an array of targets with two axes: 4 more. A
    question has 6 bytes of head, numbers 38, device 10, records 14, 27 parameters in 114, features 10 + 7 * 32 and
    exponents 6 + 7 * 2; its answer counts 30, loss 14, 222 for the head's gradient and as many rows.
    """
    trace = tmp_path / "trace.csv"
    trace.write_text("device,seconds,available\n0,0,1\n1,0,0\n")
    limits = tmp_path / "limits.toml"
    limits.write_text("releases = 100\nequations = 1.0\nleverage = 1.0\nactive = 1.0\ngradients = true\n")
    profile = {**FAST, "uplink": 0.1, "downlink": 0.2, "trace": str(trace)}
    settings = small_settings(
        run={"rounds": 1},
        devices={"count": 2, "test": [1], "profile": profile},
        model={"builder": "test_virtual_more:three_layers"},
        protocol={"mode": "synchronous", "labels": "at-home", "batch-size": 1000},
        guard={"limits": str(limits)},
    )
    simulate(settings, out=tmp_path / "run")
    first = 612 * 40 + 7_000 + (552 - 28 + 4) * 80  # microseconds
    rows = 10 + 7 * 32 + 6 + 7 * 2
    question = (6 + 38 + 10 + 14 + 114 + rows) * 40 + (6 + 30 + 14 + 222 + rows) * 80
    gradient = (596 + 342) * 40 + 14_000 + (202 + 1052 - 8) * 80
    (line,) = metrics_of(tmp_path / "run")
    assert line["simulated_seconds"] == (first + question + gradient) / 1e6


# --- guards that enforce -----------------------------------------------------------------------------------------


@pytest.fixture
def strict(tmp_path: Path) -> dict[str, str]:
    """Return a guard's settings with which some gradients leave, and their records are not released again."""
    path = tmp_path / "limits.toml"
    path.write_text(
        "releases = 100\nequations = 1.0\nactive = 1.0\nrow-norms = 1e9\ngradients = true\n"
        "leverage = 1.0\n"
        "gradient-records = 8\ngradient-leverage = 1.0\ngradient-share = 1.0\n"
    )
    return {"mode": "enforce", "limits": str(path)}


def guarded(profile: dict[str, Any] | None, mode: str, guard: dict[str, str], **changes: Any) -> Settings:
    return settings_for(
        profile,
        mode,
        run={"rounds": 6},
        guard=guard,
        dropping={"policy": "top-k", "k": 2},
        **changes,
    )


@pytest.mark.parametrize("mode", MODES)
def test_to_a_guard_that_enforces_a_device_is_a_node_of_its_own(
    mode: str, strict: dict[str, str], tmp_path: Path
) -> None:
    """What it refuses and what it lets go is the same on a clock, where each message asks for the same in its turn."""
    results = {}
    for name, profile in {"with": FAST, "without": None}.items():
        settings = guarded(profile, mode, strict)
        results[name] = simulate(settings, out=tmp_path / name)
    assert moved(settings, trained(tmp_path / "with")) > 1e-3
    # the product of one device's few records is in float32 where it is asked for alone
    assert largest_difference(trained(tmp_path / "with"), trained(tmp_path / "without")) < 1e-7
    refused = results["with"]["guard"]["refused"]
    assert refused["gradients"] > 0 and refused["releases"] > 0
    for name in ("guard", "samples", "exposures_max", "ledger", "exchanges", "bytes_up", "bytes_down"):
        assert results["with"][name] == results["without"][name], name


def test_what_was_answered_and_not_heard_is_asked_for_again_by_a_guarded_run(
    strict: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every record's gradient counts once, but those of devices that are lost at the end."""
    stepped: list[int] = []
    step = FirstLayerServer.step

    def noted(server: FirstLayerServer, number: int, contributions: Any, stream: str = "first-layer") -> None:
        stepped.append(sum(count for _, count in contributions))
        step(server, number, contributions, stream)

    monkeypatch.setattr(FirstLayerServer, "step", noted)
    settings = settings_for(
        {**FAST, "dropout": 0.3},
        run={"rounds": 4},
        guard=strict,
        dropping={"policy": "none"},
        data={"builder": "own:regression", "task": "regression", "outputs": 1},
        model={"builder": None, "name": "mlp", "width": 2, "activation": "identity"},
        devices={"count": 8, "test": [7]},
        protocol={"chunk": 10, "deadline": 60.0, "max-staleness": 6},
    )
    result = simulate(settings, out=tmp_path / "run")
    lost = [len(line["lost"]) for line in metrics_of(tmp_path / "run")]
    assert result["guard"]["refused"] == {} and sum(lost[:-1]) > 3
    assert result["samples"] - 10 * lost[-1] <= sum(stepped) <= result["samples"]
