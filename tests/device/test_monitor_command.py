"""Devices that are watched: the commands."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CONFIGS
from movements import FLEET, NEW, RATES, app_of, fleet_of, moving
from predictions import listening

from fedsplit import simulate
from fedsplit.data import Scaling
from fedsplit.device.home import Home
from fedsplit.runs.folder import run_bundle
from fedsplit.service.served import Served
from fedsplit.service.tokens import add_token
from fedsplit.wire.query import EPISODE


def test_the_command_replays_a_recording_and_raises_alarms(
    asks: list[Any],
    watching: Served,
    tmp_path: Path,
    main: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    normal = [text for n in range(3) for text in ("--normal", tmp_path / f"normal-{n}.npy")]
    with listening(app_of(fleet_of(watching, tmp_path))) as url:
        timed = [*asks, "--server", url, "--seconds", "2", "--speed", "0"]
        main("monitor", tmp_path / "known.npy", *timed, *normal, "--json")
        said = capsys.readouterr()
        known = [json.loads(line) for line in said.out.splitlines()]
        main("monitor", tmp_path / "new.npy", *timed)
        loud = capsys.readouterr()
    assert [line["seconds"] for line in known] == [2.0 * n for n in range(EPISODE, 21)]
    assert not any(line["alarm"] for line in known)
    assert "calibrated with 36 records" in said.err and "0 of 13 episodes of 8 records raised an alarm" in said.err
    assert [line.split()[-1] for line in loud.out.splitlines()] == ["ALARM"] * 5
    assert loud.out.startswith("0:00:16 ") and "5 of 5 episodes of 8 records raised an alarm" in loud.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--seconds", "2", "--server", "http://localhost:1", "--speed", "-1"], "--speed must be at least 0, got -1"),
        (
            ["--seconds", "2", "--server", "http://localhost:1", "--column", "a=A"],
            "--column, --unit, --time and --file-rate say how recordings are read with --recipe",
        ),
        (["--server", "http://localhost:1"], "--seconds from one record to the next must be 0.001 to 86400, got None"),
        (["--seconds", "1e300", "--server", "http://localhost:1"], "must be 0.001 to 86400, got 1e+300"),
        (["--seconds", "2", "--server", "https://localhost:1"], "a service with TLS wants a token"),
        (["--seconds", "2", "--server", "localhost:1"], "--server must be https://HOST:PORT"),
    ],
)
def test_what_the_command_cannot_use_is_told(
    asks: list[Any], tmp_path: Path, refused: Callable[..., str], more: list[str], said: str
) -> None:
    assert said in refused("monitor", tmp_path / "new.npy", *asks, *more)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (np.float64(3), r"array of shape ()"),
        (np.zeros((12, 2, 16)), "x.npy: must hold records of shape (2, 32), got an array of shape (12, 2, 16)"),
        (np.array(["a"] * 12), "got an array of shape (12,)"),
        (np.zeros((0, 2, 32)), "got an array of shape (0, 2, 32)"),
    ],
)
def test_files_that_hold_no_records_are_named(
    asks: list[Any], tmp_path: Path, refused: Callable[..., str], records: Any, said: str
) -> None:
    np.save(tmp_path / "x.npy", records)
    there = [*asks, "--server", "http://localhost:1", "--seconds", "2"]
    assert said in refused("monitor", tmp_path / "x.npy", *there)
    assert said in refused("monitor", tmp_path / "new.npy", *there, "--normal", tmp_path / "x.npy")


def test_too_few_records_to_judge_are_told(asks: list[Any], tmp_path: Path, refused: Callable[..., str]) -> None:
    np.save(tmp_path / "x.npy", np.zeros((EPISODE - 1, 2, 32)))
    there = [*asks, "--server", "http://localhost:1", "--seconds", "2"]
    assert "x.npy: has no 8 consecutive records" in refused("monitor", tmp_path / "x.npy", *there)


def test_recipes_that_do_not_fit_are_told(
    asks: list[Any], run: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsplit.device.remote._PAUSE", 0.0)
    recipe = tmp_path / "windows.toml"
    _write_csv(tmp_path / "a.csv", moving(NEW, 20, 70).transpose(0, 2, 1).reshape(-1, 2))
    made = 'channels = ["a", "b"]\nunits = ["", ""]\nrate = 32.0\nrecordings = 3\n'
    made += "subtract = [0.0, 0.0]\ndivide = [1.0, 1.0]\n"
    there = ["monitor", tmp_path / "a.csv", *asks, "--server", "http://localhost:1", "--recipe", recipe, "--speed", "0"]
    for seconds, stride, said in (
        (1.0, 0.5, "windows that overlap"),
        (0.5, 0.5, "records of shape (2, 16), the model"),
    ):
        recipe.write_text(f"{made}seconds = {seconds}\nstride = {stride}\n")
        assert said in refused(*there)
    scaled = replace(run_bundle(run), scaling=Scaling((0.5,), (1.0,)))
    scaled.save(tmp_path / "scaled")
    recipe.write_text(made.replace("divide = [1.0", "divide = [2.0") + "seconds = 1.0\nstride = 1.0\n")
    assert "scales records, and so does the model" in refused(*there, "--device", tmp_path / "scaled")
    assert "does not answer" in refused(*there)  # which is as far as a recipe gets that scales what nobody else does


def test_commands_of_other_tasks_say_which_one_is_meant(
    asks: list[Any], trained: Path, own: Home, tmp_path: Path, refused: Callable[..., str]
) -> None:
    there = ["--server", "http://localhost:1", "--insecure"]
    of_novelty = ["--device", tmp_path / "device", "--home", own.folder, "--input", tmp_path / "new.npy"]
    assert "watches devices: see fedsplit monitor" in refused("predict", *of_novelty, *there)
    run_bundle(trained).save(tmp_path / "other")
    of_classes = ["--device", tmp_path / "other", "--home", own.folder, "--name", "x", "--seconds", "2", *there]
    assert "predicts: see fedsplit predict" in refused("monitor", tmp_path / "new.npy", *of_classes)


def test_a_service_needs_a_rate_of_false_alarms(run: Path, refused: Callable[..., str]) -> None:
    for rate in ("0", "-1", "nan", "inf"):
        assert "--false-alarms must be above 0" in refused("serve", run, "--insecure", "--false-alarms", rate)


def test_forgetting_tells_of_what_watched_devices_have_said(
    run: Path, tmp_path: Path, main: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "copy")
    main("forget", 1, tmp_path / "copy")
    assert "removed 60 records of device 1" in (said := capsys.readouterr().out) and "fleet" not in said
    (tmp_path / "copy" / FLEET).mkdir()
    main("forget", 2, tmp_path / "copy")
    assert f"is in {tmp_path / 'copy' / FLEET}, by their names" in capsys.readouterr().out


def test_a_demo_is_not_for_what_watches_devices(run: Path, refused: Callable[..., str]) -> None:
    said = refused("serve", run, "--insecure", "--demo")
    assert f"--demo is for models that predict, and that of {run} watches devices" in said


def test_a_watcher_has_a_token(run: Path, certificates: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    add_token(tmp_path / "tokens", "nurse")
    secured = ["serve", run, "--certs", certificates / "good", "--tokens", tmp_path / "tokens"]
    for other in (["--watcher", "nurs"], ["--watcher", "nurse", "--watcher", "nurs"]):
        assert "--watcher nurs: there is no token of that name" in refused(*secured, *other)


@pytest.mark.slow
def test_own_recordings_are_replayed_by_the_recipe(
    own: Home,
    tmp_path: Path,
    main: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From CSV files to an alarm; a gap in the recording begins a new episode."""
    for device in range(5):
        parts = [moving(rate * (1 + 0.02 * device), 30, device) for rate in RATES]
        rows = np.concatenate(parts).transpose(0, 2, 1).reshape(-1, 2)
        _write_csv(tmp_path / f"p{device}.csv", rows)
    _write_csv(tmp_path / "gap.csv", moving(NEW, 20, 70).transpose(0, 2, 1).reshape(-1, 2), gap=10 * 32)
    made = ["--channel", "a", "--channel", "b", "--rate", "32", "--seconds", "1", "--recordings", "3", "--donor", "p0"]
    files = [tmp_path / f"p{device}.csv" for device in range(5)]
    main("windows", *files, "--out", tmp_path / "records", *made, "--test-share", "0.4")
    recipe = tmp_path / "records" / "windows.toml"
    run = tmp_path / "own-run"
    changes = [f'data.folder="{tmp_path / "records"}"', "data.outputs=3", "run.rounds=15", "run.engine=inline"]
    result = simulate(CONFIGS / "own-novelty.toml", overrides=changes, out=run)
    assert result["test_auc"] is None and "public_only_auc" not in result  # nothing new was tested
    said = [record.getMessage() for record in caplog.records]
    assert [text for text in said if "device" in text] == [
        "no tested device has both something normal and something new: thresholds are known, no AUC"
    ]
    run_bundle(run).save(tmp_path / "device")
    asks = ["--device", tmp_path / "device", "--home", own.folder, "--name", "p4", "--insecure", "--speed", "0"]
    capsys.readouterr()
    asks += ["--recipe", recipe, "--normal", files[4], "--json"]
    found = []
    with listening(app_of(fleet_of(Served.of_run(run), tmp_path))) as url:
        for name in ("gap", "p4"):
            main("monitor", tmp_path / f"{name}.csv", *asks, "--server", url)
            found.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
        for name in ("gap", "p4"):
            text = (tmp_path / f"{name}.csv").read_text()
            (tmp_path / f"{name}.csv").write_text(text.replace("time,a,b", "t,A,b"))
        main("monitor", tmp_path / "gap.csv", *asks, "--server", url, "--time", "t", "--column", "a=A")
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found[0]
    assert [line["seconds"] for line in found[0]] == [8.0, 9.0, 10.0, 19.0, 20.0] and len(found[1]) == 83
    new, known = ([line["score"] for line in each] for each in found)
    assert min(new) > max(known)


def _write_csv(path: Path, rows: np.ndarray, gap: int | None = None) -> None:
    """Write samples at 32 Hz, one of which may be missing."""
    lines = [f"{n / 32},{a},{b}" for n, (a, b) in enumerate(rows.tolist()) if n != gap]
    path.write_text("\n".join(["time,a,b", *lines]) + "\n")
