"""Runs whose nodes refuse or have lost their ledgers, and what observing says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_server import NOTHING_LEAVES, Start, private, run_settings
from proposals import WIDTH, dense, flat

from fedsplit import DeviceData, simulate

# --- damage during a run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "cut off", "a flipped bit", "another node's"])
@pytest.mark.parametrize("mode", ["enforce", "observe"])
def test_a_node_whose_ledger_is_damaged_is_silent_and_others_go_on(damage: str, mode: str, server: Start) -> None:
    hostile = server(mode=mode, devices={"count": 3, "test": [2], "per-node": 1})
    chunk = [hostile.ask(rows=[(d, 0, 0, 10)]) for d in range(2)]
    assert all(hostile.send(chunk[d], node=2 + d) for d in range(2))
    path = hostile.states / "1" / "0" / "ledger-train.npz"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "another node's":
        path.write_bytes((hostile.states / "1" / "1" / "ledger-train.npz").read_bytes())
    else:
        content[200] ^= damage == "a flipped bit"
        path.write_bytes(content[: len(content) - 100 * (damage == "cut off")])
    left = path.read_bytes() if path.exists() else None
    for again in (chunk[0], hostile.ask(2, rows=[(0, 0, 10, 20)])):
        assert hostile.send(again, node=2) is None
        assert hostile.errors[-1] == NOTHING_LEAVES
    assert (path.read_bytes() if path.exists() else None) == left  # never begun anew
    other = hostile.send(hostile.ask(2, rows=[(1, 0, 10, 20)]), node=3)
    assert other is not None and len(other.release.targets) == 10


def test_a_run_goes_on_without_the_node_whose_ledger_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = run_settings(tmp_path / "s", mode="observe", devices={"count": 3, "test": [2], "per-node": 1})
    samples = []

    def lose(metrics: dict[str, Any]) -> None:
        samples.append(metrics["round"])
        if metrics["round"] == 2:
            (path,) = (tmp_path / "run" / "nodes").glob("*/1/ledger-train.npz")
            path.unlink()

    result = simulate(settings, out=tmp_path / "run", report=lose)
    assert result["rounds"] == 4 and result["samples"] == 2 * 60 + 2 * 40 and result["test_accuracy"] is not None
    said = " ".join(record.getMessage() for record in caplog.records if record.name == "fedsplit.server.round")
    assert "nothing leaves" in said and "ledger" not in said  # which only the node's own log tells


def test_a_run_goes_on_without_the_device_that_is_refused(tmp_path: Path) -> None:
    settings = run_settings(
        tmp_path / "s",
        "refusals = 1000",
        data={"builder": "test_guarded_runs:one_active"},
        protocol={"mode": "single-pass", "chunk": "spread"},
        first_layer={"strategy": "frozen"},
    )
    result = simulate(settings, out=tmp_path / "run")
    assert result["guard"] == {"mode": "enforce", "refused": {"weights": 20}, "test_refused": {}}
    assert result["samples"] == 40 and result["exposures_max"] == 1 and result["test_accuracy"] is not None


def one_active(device_id: int, num_devices: int) -> DeviceData:
    """The records of device 1 make all outputs of the model active."""
    data = private(device_id, num_devices)
    if device_id != 1:
        return data
    toward = np.linalg.lstsq(dense(42), np.full(WIDTH, 30.0), rcond=None)[0].astype(np.float32)
    return DeviceData(train=(data.train.x + toward, data.train.y), test=(data.test.x + toward, data.test.y))


# --- observing through the ClientApp -------------------------------------------------------------------------------


def test_observing_lets_everything_leave_and_says_the_same(server: Start) -> None:
    keep_all = {"policy": "none", "k": None}
    asks = {
        "keeps all": [(1, dense(42), 0.0)],
        "active": [(1, dense(42), 30.0)],
        "again": [(1, dense(42), -9.0), (2, dense(1), 0.0)],
    }
    for rounds in asks.values():
        seen = {}
        for mode in ("observe", "enforce"):
            hostile = server("refusals = 1000", mode=mode, dropping=keep_all)
            answers = [hostile.send(hostile.ask(r, weights=flat(w, bias))) for r, w, bias in rounds]
            assert all(answer is not None for answer in answers)
            if mode == "observe":
                assert [len(a.release.targets) for a in answers if a] == [60] * len(rounds)
            seen[mode] = [a.refused.tolist() for a in answers if a]
        assert seen["observe"] == seen["enforce"] and any(seen["observe"])
