"""Devices that are watched: what a device believes, releases and concludes."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from movements import NEW, app_of, fleet_of, monitor_of, moving, normal_of
from predictions import listening

from fedsplit.common.errors import ConfigError, DataError, RunError
from fedsplit.device.home import Home
from fedsplit.device.monitor import WithheldError
from fedsplit.device.predictor import Predictor
from fedsplit.service.served import Served
from fedsplit.wire.ledger import Reason
from fedsplit.wire.query import EPISODE


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        None,
        {"threshold": "x"},
        {"threshold": math.inf},
        {"threshold": 10**400},
        {"threshold": 1.0, "episode": None, "scores": [0.0] * EPISODE},
        {"threshold": 1.0, "episode": 1.0, "scores": [0.0]},
        {"threshold": 1.0, "episode": 1.0, "scores": ["x"] * EPISODE},
        {"threshold": 1.0, "episode": 1.0, "scores": [10**400] * EPISODE},
        {"threshold": 1.0, "episode": 10**400, "scores": [0.0] * EPISODE},
        {"threshold": 1.0, "episode": 1.0, "scores": [math.nan] * EPISODE},
    ],
    ids=lambda answer: str(answer)[:60],
)
def test_an_answer_that_is_no_verdict_is_told(run: Path, own: Home, answer: Any) -> None:
    monitor = monitor_of(run, own, "https://localhost:1")
    monitor._remote._client = httpx.Client(
        transport=httpx.MockTransport(lambda _: httpx.Response(200, content=iter([json.dumps(answer).encode()]))),
        base_url="https://localhost:1",
    )
    with pytest.raises(RunError, match="the answer is no verdict"):
        monitor.judge(moving(NEW, EPISODE, 51))
    if not isinstance(answer, dict) or not isinstance(answer.get("threshold"), float):
        with pytest.raises(RunError, match="the answer is no verdict"):
            monitor.calibrate(normal_of(), seconds=2.0)


def test_an_alarm_is_the_devices_own_conclusion(run: Path, own: Home) -> None:
    """A service that says alarm, or none, against its own figures is not believed."""
    monitor = monitor_of(run, own, "https://localhost:1")
    answer = {"scores": [2.0] * EPISODE, "episode": 2.0, "threshold": 1.0, "alarm": False}
    monitor._remote._client = httpx.Client(
        transport=httpx.MockTransport(lambda _: httpx.Response(200, content=iter([json.dumps(answer).encode()]))),
        base_url="https://localhost:1",
    )
    assert monitor.judge(moving(NEW, EPISODE, 51)).alarm


def test_records_over_the_limits_do_not_leave(run: Path, own: Home) -> None:
    (own.folder / "limits.toml").write_text("equations = 0.01\nleverage = 1.0\n")
    monitor = monitor_of(run, own, "https://localhost:1")
    with pytest.raises(WithheldError, match="8 of 8 records may not leave, for the limits on equations"):
        monitor.judge(moving(NEW, EPISODE, 51))
    with pytest.raises(WithheldError, match="36 of 36 records may not leave, for the limits on equations"):
        monitor.calibrate(normal_of(), seconds=2.0)


class _Withholding(Predictor):
    """One whose guard lets no record leave that begins with 9."""

    def release(self, raw: np.ndarray) -> tuple[Any, np.ndarray]:
        left = raw[:, 0, 0] != 9
        query, _ = super().release(raw[left])
        return query, np.where(left, 0, Reason.LEVERAGE)


def test_watching_goes_on_where_a_record_may_not_leave(
    asks: list[Any],
    watching: Served,
    tmp_path: Path,
    main: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("fedsplit.device.predictor.Predictor", _Withholding)
    records, normal = moving(NEW, 20, 51), np.concatenate(normal_of())
    records[9, 0, 0] = normal[3, 0, 0] = 9
    np.save(tmp_path / "some.npy", records)
    np.save(tmp_path / "all.npy", normal)
    fleet = fleet_of(watching, tmp_path)
    with listening(app_of(fleet)) as url:
        timed = [*asks, "--server", url, "--seconds", "2", "--speed", "0", "--normal", tmp_path / "all.npy"]
        main("monitor", tmp_path / "some.npy", *timed, "--json")
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert ["withheld" in line for line in lines] == [False] * 2 + [True] + [False] * 10
    assert lines[2]["withheld"] == "1 of 8 records may not leave, for the limits on leverage"
    assert "of 12 episodes of 8 records raised an alarm" in said.err
    assert len(fleet.devices["watch"].episodes) == 12


@pytest.mark.parametrize("name", ["", "a b", "../x", "a?b", "a/b", "a" * 65, "ä", "a\n"])
def test_a_name_that_no_device_can_have_asks_nothing(run: Path, own: Home, name: str) -> None:
    with pytest.raises(ConfigError, match="a device's name must be"):
        monitor_of(run, own, "https://localhost:1", name)


@pytest.mark.parametrize(
    ("recordings", "seconds", "said"),
    [
        ([], 2.0, "to calibrate takes 1..4096 records"),
        ([np.zeros((12, 2, 32)), np.zeros((0, 2, 32))], 2.0, r"some of each recording, got \[12, 0\]"),
        ([np.zeros((5000, 2, 32))], 2.0, "to calibrate takes 1..4096 records"),
        ([np.zeros(()), np.zeros((12, 2, 32))], 2.0, "records of one shape"),
        ([np.zeros((12, 2, 32)), np.zeros((12, 2, 16))], 2.0, "records of one shape"),
        ([np.zeros((12, 2, 32))], 0.0, "from one record to the next must be 0.001 to 86400 s, got 0"),
    ],
)
def test_nothing_leaves_of_what_cannot_calibrate(
    run: Path, own: Home, recordings: list[np.ndarray], seconds: float, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        monitor_of(run, own, "https://localhost:1").calibrate(recordings, seconds)
    assert not list(own.accountant("test").rows())


def test_the_device_has_no_trunk() -> None:
    names = "fedsplit.device.monitor, fedsplit.device.predictor, fedsplit.device.remote"
    there = f"import sys, {names}; print([m for m in sys.modules if 'trunk' in m or 'novelty' in m])"
    done = subprocess.run([sys.executable, "-c", there], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
