"""Runs over devices that are away, late and lost: who is heard, what is counted, and that nothing else changes."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import simulated_json, small_settings
from references import largest_difference, trained

from fedsplit import simulate
from fedsplit.common.errors import FedsplitError
from fedsplit.device.node import Node
from fedsplit.flower.grid import InProcessGrid
from fedsplit.guard.sealed import load_sealed
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from fedsplit.runs.client_app import client_app
from fedsplit.runs.folder import open_run_folder
from fedsplit.runs.training import TrainingRun
from fedsplit.wire.exchange import Download, Upload

pytestmark = pytest.mark.slow  # whole runs

KNOWN = {"release-seconds": 1e-3, "gradient-seconds": 2e-3}  # nothing is measured, so that runs are equal
FAST: dict[str, Any] = {**KNOWN, "uplink": 1.0, "downlink": 1.0}
SHAKY: dict[str, Any] = {
    **KNOWN,
    "compute": {"median": 0.5, "sigma": 0.7},
    "uplink": {"median": 0.05, "sigma": 0.6},
    "downlink": {"median": 0.2, "sigma": 0.6},
    "latency": {"median": 0.05, "sigma": 0.3},
    "dropout": 0.1,
}
OF_PACKING = ("seconds", "trunk_seconds", "exchanges", "bytes_up", "bytes_down")
RELEASE_ONCE = {"public": {"devices": [1], "epochs": 1}}


def settings_for(profile: dict[str, Any] | None, mode: str = "pipelined", **changes: dict[str, Any]) -> Settings:
    devices = {**changes.pop("devices", {}), **({"profile": profile} if profile else {})}
    protocol = {"mode": mode, **changes.pop("protocol", {})}
    once = RELEASE_ONCE if mode == "release-once" else {}
    return small_settings(
        devices=devices,
        protocol=protocol,
        trunk={"optimizer": "adam", "lr": 0.01},
        **{"first_layer": {"strategy": "FedAdam", "lr": 0.01}, **once, **changes},
    )


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in OF_PACKING} for line in lines]


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
    open_run_folder(folder, settings, resume=False)
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


def write_trace(path: Path, columns: str, *rows: str) -> str:
    path.write_text("\n".join([columns, *rows]) + "\n")
    return str(path)


@pytest.fixture
def generous(tmp_path: Path) -> dict[str, str]:
    """Return the guard's settings with which no message tells of a refusal."""
    path = tmp_path / "limits.toml"
    path.write_text("releases = 100\nequations = 1.0\nleverage = 1.0\nactive = 1.0\ngradients = true\n")
    return {"limits": str(path)}


def test_rounds_take_what_was_worked_out_by_hand(generous: dict[str, str], tmp_path: Path) -> None:
    """Five devices, three rounds, no gradients: sizes, transfers, work, latency, a deadline.

    A first layer of 12 x 10 + 10 = 130 parameters; all 10 outputs of a record are sent as float32, since zeros of an
    identity are sent, too. A message has 6 bytes of head, arrays with 6 (one axis) or 10 (two) of their own:

    - down: 6 + (6 + 48) + (6 + 4 * 130) + (10 + 16) = 612 bytes
    - up, n records: 6 + nonce 14 + ledger 70 + lost 6 + failed 6 + refused 10 + width 14 + devices 10 + records 10
      + targets 6 + 4n + counts 6 + 2n + bitmap 10 + 2n + values 6 + 40n + exponents 6 + 2n
      + gradients 6 + 6 + 10 = 202 + 50n bytes

    Devices 0..4 train on 7, 10, 13, 16, 19 records. At 0.1 Mbit/s a byte takes 80 us, at 0.2 Mbit/s 40 us.
    """
    trace = write_trace(
        tmp_path / "trace.csv",
        "device,seconds,compute,uplink,downlink,latency,available",
        "0,0,1.0,0.1,0.2,0.05,1",
        "1,0,0.5,0.1,0.1,0.0,1",
        "2,0,2.0,0.2,0.2,0.01,1",
        "3,0,1.0,0.05,0.1,0.0,1",  # too slow for the deadline: 0.048960 + 0.016 + 1002 * 160 us = 0.225280
        "4,0,1.0,0.2,0.1,0.1,0",  # comes back at 0.2 s
        "4,0.2,1.0,0.2,0.1,0.1,1",
    )
    settings = small_settings(
        run={"rounds": 3},
        devices={"count": 5, "test": [4], "profile": {**KNOWN, "trace": trace}},
        model={"builder": "own:identity_model"},
        first_layer={"strategy": "frozen"},
        protocol={"deadline": 0.22},
        guard=generous,
    )
    result = simulate(settings, out=tmp_path / "run")
    # device 0: 0.05 + 612 * 40 us + 7 ms / 1   + (202 + 350) * 80 us = 0.125640
    # device 1:        612 * 80 us + 10 ms / 0.5 + (202 + 500) * 80 us = 0.125120
    # device 2: 0.01 + 612 * 40 us + 13 ms / 2   + (202 + 650) * 40 us = 0.075060
    # device 4: 0.1  + 612 * 80 us + 19 ms       + (202 + 950) * 40 us = 0.214040
    lines = metrics_of(tmp_path / "run")
    # device 3 never makes it, and each round waits for it until the deadline
    assert [line["simulated_seconds"] for line in lines] == [0.22, 0.44, 0.66]
    assert [line["heard"] for line in lines] == [3, 4, 4]
    assert [(line["late"], line["away"]) for line in lines] == [([3], [4]), ([3], []), ([3], [])]
    rows = {int(row["device"]): row for row in csv.DictReader((tmp_path / "run" / "devices.csv").open())}
    assert [int(rows[d]["bytes_up"]) for d in range(5)] == [3 * 552, 3 * 702, 3 * 852, 3 * 1002, 2 * 1152]
    assert [int(rows[d]["bytes_down"]) for d in range(5)] == [3 * 612] * 4 + [2 * 612]
    assert [float(rows[d]["busy"]) for d in range(5)] == [0.021, 0.06, 0.0195, 0.048, 0.038]
    relaxed = settings.model_copy(update={"protocol": settings.protocol.model_copy(update={"deadline": 1.0})})
    simulate(relaxed, out=tmp_path / "relaxed")
    # now the slowest ends a round: device 3 with 0.225280, in all three
    assert [line["simulated_seconds"] for line in metrics_of(tmp_path / "relaxed")] == [0.22528, 0.45056, 0.67584]
    # heard 3, 3, 3, 0 and 2 times: 11^2 / (5 * 31)
    assert result["simulated"]["participation"] == {"least": 0, "mean": 2.2, "most": 3, "jain": 0.7806}


def test_pending_gradients_take_their_time_too(generous: dict[str, str], tmp_path: Path) -> None:
    """One device, 7 records (another is never there): two messages with their answers, and a flush of gradients alone.

    Cut gradients: a block of 62 bytes and 4 for each of 70 values, down; a sum of 4 + 8 + 8 * 130 = 1052 bytes, up.
    """
    trace = write_trace(tmp_path / "trace.csv", "device,seconds,available", "0,0,1", "1,0,0")
    settings = small_settings(
        run={"rounds": 2},
        devices={"count": 2, "test": [1], "profile": {**KNOWN, "uplink": 0.1, "downlink": 0.2, "trace": trace}},
        model={"builder": "own:identity_model"},
        guard=generous,
    )
    simulate(settings, out=tmp_path / "run")
    first = 612 * 40 + 7_000 + 552 * 80  # microseconds
    second = (612 + 342) * 40 + 7_000 + 14_000 + (552 + 1052) * 80
    flush = (596 + 342) * 40 + 14_000 + (202 + 1052 - 8) * 80
    lines = [line["simulated_seconds"] for line in metrics_of(tmp_path / "run")]
    assert lines == [first / 1e6, (first + second + flush) / 1e6]


def test_those_who_come_first_are_heard(tmp_path: Path) -> None:
    settings = settings_for(
        {**SHAKY, "dropout": 0.0},
        run={"rounds": 6},
        devices={"count": 16, "test": [15], "fraction": 0.4, "over-sampling": 2.0},
        data={"builder": "own:few"},
    )
    simulate(settings, out=tmp_path / "run")
    lines = metrics_of(tmp_path / "run")
    # of 15 devices 12 are asked and 6 wanted; others answer gradients alone, and are heard if they come before the end
    assert all(line["spare"] and 6 <= line["heard"] <= 12 for line in lines[:-1])
    assert lines[0]["heard"] == 6 and len(lines[0]["spare"]) == 6


def test_too_few_are_refused_as_nodes_are(tmp_path: Path) -> None:
    settings = settings_for({**FAST, "dropout": 0.9}, protocol={"min-nodes": 3, "deadline": 60.0})
    with pytest.raises(FedsplitError, match=r"^round 1: [012] of 5 devices were heard within 60 simulated seconds, "):
        simulate(settings, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("profile", "protocol", "said"),
    [
        ({**FAST, "uplink": -1.0}, {}, "devices.profile.uplink: .* greater than 0.*, got -1.0"),
        ({**FAST, "compute": float("nan")}, {}, "devices.profile.compute: .* finite.*, got nan"),
        ({**FAST, "availability": 0.0}, {}, "devices.profile.availability: .*greater than 0.*, got 0.0"),
        ({**FAST, "availability": 1e-5}, {}, "devices.profile: no round can begin: with availability 1e-05"),
        (FAST, {"min-nodes": 6}, "protocol.min-nodes is 6, but only 5 devices train"),
        (
            {**FAST, "availability": {"on": 1.0, "off": 999.0}},
            {"min-nodes": 2},
            "devices.profile: no round can begin: with availability on 1, off 999 .*, protocol.min-nodes is 2 of 5",
        ),
        ({"uplink": 1.0}, {}, "devices.profile.downlink: missing: give it, a preset or a trace that has it"),
        (
            FAST,
            {"deadline": 0.01},
            r"protocol.deadline \(or timeout\) 0.01 s is shorter than even the fastest device, 0, needs .*: 0.0\d+ s",
        ),
        (FAST, {"deadline": 0.0}, "protocol.deadline: .* greater than 0"),
        (None, {"deadline": 1.0}, r"protocol.deadline needs a \[devices.profile\] in a simulation"),
    ],
)
def test_refuses_what_cannot_be_before_it_begins(
    profile: dict[str, Any] | None, protocol: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(FedsplitError, match=f"^{said}") as refused:
        simulate(settings_for(profile, protocol=protocol), out=tmp_path / "run")
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["0,0,1", "1,0,1", "2,0,0", "3,0,1"], "trace .*trace.csv: device 4 has no row"),
        (["0,0,1", "1,0,1", "2,0,1", "3,0,1", "4,0,1", "9,0,1"], "line 7: device 9 does not exist: ids are 0..4"),
        (["0,5,1", "1,0,1", "2,0,1", "3,0,1", "4,0,1"], "line 2: device 0 begins at 5 seconds"),
        ([f"{d},0,0" for d in range(5)], "devices.profile: no round can begin: the trace has at most 0 there at once"),
    ],
)
def test_the_command_refuses_a_trace_in_one_line(
    rows: list[str], said: str, tmp_path: Path, main: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_trace(tmp_path / "trace.csv", "device,seconds,available", *rows)
    settings = settings_for({**FAST, "trace": trace})
    (tmp_path / "run.toml").write_text(settings.to_toml())
    with pytest.raises(SystemExit) as stopped:
        main("simulate", tmp_path / "run.toml", "--out", tmp_path / "run")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    assert re.search(said, error.replace("\n", " ")), error


def test_a_device_that_is_heard_least_is_asked_first(tmp_path: Path) -> None:
    def jain(sampling: str) -> float:
        settings = settings_for(
            {**FAST, "dropout": 0.2},
            run={"rounds": 20},
            devices={"count": 16, "test": [15], "fraction": 0.3, "sampling": sampling},
            data={"builder": "own:few"},
            first_layer={"strategy": "frozen"},
            protocol={"deadline": 60.0},
        )
        return float(simulate(settings, out=tmp_path / sampling)["simulated"]["participation"]["jain"])

    assert jain("fair") > 0.97 > jain("uniform")


def test_curves_show_accuracy_over_simulated_time(tmp_path: Path) -> None:
    simulate(settings_for(FAST), out=tmp_path / "with")
    simulate(settings_for(None), out=tmp_path / "without")

    def width(name: str) -> int:
        return int.from_bytes((tmp_path / name / "curves.png").read_bytes()[16:20], "big")

    assert width("with") > width("without")
