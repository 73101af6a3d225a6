"""Devices that are watched: the task from settings to scores, what the service takes and tells, and the command."""

import asyncio
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from conftest import CONFIGS, small_settings
from fastapi import FastAPI
from predictions import listening, problem
from safetensors.numpy import load, save

from fedsplit import simulate
from fedsplit.audit.transcript import Subjects
from fedsplit.common.certs import CA
from fedsplit.common.errors import ConfigError, DataError, RunError
from fedsplit.data import Scaling, wearables
from fedsplit.device.home import Home
from fedsplit.device.monitor import Monitor, WithheldError
from fedsplit.device.predictor import Predictor
from fedsplit.device.remote import Remote
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import check_settings
from fedsplit.runs.folder import run_bundle
from fedsplit.service.app import service
from fedsplit.service.fleet import FLEET, Fleet, add_fleets
from fedsplit.service.served import Served
from fedsplit.service.tokens import Tokens, add_token
from fedsplit.wire.ledger import Reason
from fedsplit.wire.query import EPISODE
from simulations.shared import browser as driving

RATES = (0.25, 0.45, 0.65)  # radians a sample: what a device does in its recordings
NEW = 1.3


def moving(rate: float, count: int, seed: int) -> np.ndarray:
    """Return records (2, 32) of one movement, at any phase."""
    rng = np.random.default_rng([seed, round(1000 * rate)])
    time = np.arange(32) + rng.uniform(0, 30, size=(count, 1, 1))
    waves = np.sin(rate * time + np.array([0.0, 1.0])[:, None])
    return (waves + 0.1 * rng.normal(size=waves.shape)).astype(np.float32)


def _doing(device: int, rates: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return 20 records of each movement, as this device does it."""
    x = np.concatenate([moving(rate * (1 + 0.02 * device), 20, device) for rate in rates])
    return x, np.repeat(np.arange(len(rates)), 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the records of six devices, of which the last two only test."""
    folder = tmp_path_factory.mktemp("devices")
    for device in range(6):
        x, y = _doing(device, RATES if device < 4 else (*RATES, NEW))
        test = "_test" if device >= 4 else ""
        np.savez(folder / f"{device}.npz", **{f"x{test}": x, f"y{test}": y})
    return folder


def _settings(folder: Path, **changes: dict[str, Any]) -> Any:
    chosen: dict[str, Any] = {
        "run": {"name": "watched", "rounds": 15, "engine": "inline"},
        "data": {"folder": str(folder), "task": "novelty", "outputs": 3},
        "devices": {"test": [4, 5]},
        "public": {"devices": [0], "epochs": 5},
        "model": {"name": "sensor-cnn", "width": 8},
        "dropping": {"policy": "top-k", "k": 32},
        "protocol": {"mode": "release-once", "batch-size": 32},
        "trunk": {"lr": 0.005, "schedule": "cosine", "thinning": 0.5},
    }
    for section, values in changes.items():
        chosen[section] = chosen.get(section, {}) | values
    return check_settings(chosen)


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder of the task, trained once."""
    out = tmp_path_factory.mktemp("runs") / "run"
    simulate(_settings(folder), out=out)
    return out


@pytest.fixture
def watching(run: Path, tmp_path: Path) -> Served:
    return Served.of_run(run)


def _fleet(served: Served, tmp_path: Path, false_alarms: float = 500.0) -> Fleet:
    return Fleet(served, tmp_path / FLEET, false_alarms)


def _app(fleet: Fleet, tokens: Tokens | None = None, watchers: tuple[str, ...] = ()) -> FastAPI:
    app = service([fleet.served], tokens)
    add_fleets(app, [fleet], watchers)
    return app


@pytest.fixture
def own(tmp_path: Path) -> Home:
    home = Home.create(tmp_path / "home", [4])
    (home.folder / "limits.toml").write_text("equations = 0.9\nleverage = 1.0\n")
    return home


def _monitor(run: Path, home: Home, url: str, name: str = "watch", token: str | None = None) -> Monitor:
    bundle = run_bundle(run)
    remote = Remote(url, bundle.model, token, None)
    return Monitor(Predictor(bundle, home, remote), remote, name)


def _normal(device: int = 4) -> list[np.ndarray]:
    return [moving(rate * (1 + 0.02 * device), 12, 50) for rate in RATES]


def _payload(run: Path, home: Home, records: np.ndarray) -> bytes:
    query, _ = Predictor(run_bundle(run), home, lambda _: np.zeros(0)).release(records)
    return query.to_bytes()


# ------------------------------------------------------------------------------------------------------- the task


def test_a_run_says_how_well_something_new_is_noticed(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert result["test_auc"] > 0.85 and result["test_episode_auc"] > 0.95
    assert result["test_accuracy"] is None and result["exposures_max"] == 1
    assert 0 < result["public_only_auc"] <= 1


@pytest.mark.slow
def test_equal_settings_notice_alike_and_a_run_resumes(folder: Path, run: Path, tmp_path: Path) -> None:
    settings = _settings(folder)
    stop = RuntimeError("stopped")

    def report(metrics: dict[str, Any]) -> None:
        if metrics["round"] == 9:
            raise stop

    with pytest.raises(RuntimeError) as stopped:
        simulate(settings, out=tmp_path / "again", report=report)
    assert stopped.value is stop
    result = simulate(settings, out=tmp_path / "again", resume=True)
    assert result["test_auc"] == json.loads((run / "result.json").read_text())["test_auc"]
    files = [(each / "checkpoint" / "detector.safetensors").read_bytes() for each in (run, tmp_path / "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocol": {"mode": "single-pass"}}, "a novelty task is for protocol.mode 'release-once'"),
        ({"data": {"outputs": None}}, "outputs must be the most recordings that a device has"),
        ({"data": {"outputs": 1}}, "labels must be in 0..1 for a novelty task with 1 outputs"),
        ({"data": {"novel": 1}}, "novel is for data sets with classes, not for a folder"),
    ],
)
def test_settings_that_do_not_fit_the_task_are_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        simulate(_settings(folder, **changes), out=tmp_path / "run")


def test_something_new_to_train_with_is_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    x, y = _doing(1, (*RATES, NEW))
    np.savez(tmp_path / "1.npz", x=x, y=y)
    with pytest.raises(DataError, match=r"device 1 \(1.npz\), train: label 3 is for something new"):
        simulate(_settings(tmp_path), out=tmp_path / "run")


@pytest.mark.slow
def test_public_recordings_may_come_in_a_file_as_real_nodes_need(
    folder: Path, run: Path, own: Home, tmp_path: Path
) -> None:
    """With data.shape the server has no device's records: those that everybody may know are of one device more."""
    x, y = _doing(9, RATES)
    np.savez(tmp_path / "public.npz", x=x, y=y)
    given = {"devices": None, "file": str(tmp_path / "public.npz")}
    absent = {"folder": None, "shape": [2, 32]}
    real = _settings(folder, public=given, data=absent, devices={"count": 6})
    public = Experiment(real).public
    assert public is not None and set(public.y.tolist()) == {18, 19, 20}
    assert Experiment(real).model.trunk(torch.zeros(1, *Experiment(real).model.first_layer.cut_shape)).shape[1] == 21
    result = simulate(_settings(folder, public=given), out=tmp_path / "run")
    assert result["test_auc"] > 0.85
    fleet = _fleet(Served.of_run(tmp_path / "run"), tmp_path)
    with listening(_app(fleet)) as url:
        assert _monitor(tmp_path / "run", own, url).calibrate(_normal(), seconds=2.0) > 0
    np.savez(tmp_path / "public.npz", x=x, y=y + 1)
    with pytest.raises(DataError, match=r"public.npz: label 3 is for something new"):
        _ = Experiment(real).public


def test_a_class_of_a_data_set_can_be_the_novelty() -> None:
    raw: dict[str, Any] = {
        "data": {"name": "digits", "novel": 3},
        "devices": {"count": 6, "partition": "iid", "test": [5]},
        "protocol": {"mode": "release-once"},
        "public": {"devices": [0], "epochs": 1},
    }
    del (tables := small_settings(**{"trunk": {}}).tables())["data"], tables["devices"]
    source = Experiment(check_settings(tables | {k: tables.get(k, {}) | v for k, v in raw.items()})).source
    assert (source.task.name, source.outputs, source.task.trunk_outputs(9, source.count)) == ("novelty", 9, 54)
    train, test = source.device(1).train, source.device(5).test
    assert set(train.y.tolist()) == set(range(9)) and set(test.y.tolist()) == set(range(10))


def test_an_attacker_knows_public_recordings_by_the_numbers_that_releases_have(folder: Path) -> None:
    settings = _settings(folder, public={"devices": [0, 2]})
    source = Experiment(settings).source
    public = Experiment(settings).public
    assert public is not None and set(public.y.tolist()) == {0, 1, 2, 6, 7, 8}
    subjects = Subjects.choose(source, public, settings.donors, targets=9, seed=0)
    assert subjects.public.y.tolist() == [0] * 20 + [1] * 20 + [2] * 20 + [0] * 20 + [1] * 20 + [2] * 20
    assert set(subjects.y.tolist()) <= {0, 1, 2}


# ----------------------------------------------------------------------------------------------------- the service


def test_a_device_that_has_calibrated_is_told_what_is_new(
    run: Path, watching: Served, own: Home, tmp_path: Path
) -> None:
    fleet = _fleet(watching, tmp_path)
    with listening(_app(fleet)) as url:
        monitor = _monitor(run, own, url)
        threshold = monitor.calibrate(_normal(), seconds=2.0)
        known = monitor.judge(moving(RATES[1] * 1.08, EPISODE, 51))
        new = monitor.judge(moving(NEW, EPISODE, 51))
        assert not known.alarm and new.alarm and known.threshold == new.threshold == threshold
        assert new.episode > threshold > known.episode and len(new.scores) == EPISODE
        at = f"{url}/v1/models/{watching.name}/devices"
        found = httpx.get(at).json()
        (last,) = httpx.get(at, params={"last": 1}).json()["devices"]
        assert "not valid: query.last" in problem(httpx.get(at, params={"last": 601}), 422)
    (row,) = found["devices"]
    assert last["episodes"] == row["episodes"][-1:]
    assert 0 <= found["now"] - row["episodes"][-1][0] < 60
    assert row["name"] == "watch" and [alarm for _, _, alarm in row["episodes"]] == [False, True]
    scores = [score for _, score, _ in row["episodes"]]
    assert scores == [known.episode, new.episode]


def test_what_is_normal_survives_the_service(run: Path, watching: Served, own: Home, tmp_path: Path) -> None:
    verdicts = []
    for start in range(2):
        with listening(_app(_fleet(watching, tmp_path))) as url:
            monitor = _monitor(run, own, url)
            if not start:
                monitor.calibrate(_normal(), seconds=2.0)
            verdicts.append(monitor.judge(moving(NEW, EPISODE, 51)))
    assert verdicts[0].episode == verdicts[1].episode and verdicts[0].threshold == verdicts[1].threshold


def test_asking_again_releases_nothing_twice(run: Path, watching: Served, own: Home, tmp_path: Path) -> None:
    records = moving(RATES[0], EPISODE + 3, 52)
    with listening(_app(_fleet(watching, tmp_path))) as url:
        monitor = _monitor(run, own, url)
        monitor.calibrate(_normal(), seconds=2.0)
        for end in range(EPISODE, len(records) + 1):
            monitor.judge(records[end - EPISODE : end])
    rows = list(own.accountant("test").rows())
    assert len(rows) == 36 + len(records) and {spent.releases for _, spent in rows} == {1}


@contextmanager
def _client(app: FastAPI, token: str = "") -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with listening(app) as url, httpx.Client(base_url=url, headers=headers, timeout=30) as client:
        yield client


def test_what_is_no_calibration_or_episode_is_refused(run: Path, watching: Served, own: Home, tmp_path: Path) -> None:
    eight = _payload(run, own, moving(NEW, EPISODE, 53))
    alike = _payload(run, own, np.repeat(moving(NEW, 1, 53), 4, axis=0))
    at = f"/v1/models/{watching.name}/devices"
    with _client(_app(_fleet(watching, tmp_path))) as client:
        assert "has not calibrated" in problem(client.post(f"{at}/watch/episode", content=eight), 409)
        normal = f"{at}/watch/normal?seconds=2&recordings="
        for recordings in ("7", "9", "4,3", "8,0", "0,8"):
            said = problem(client.post(normal + recordings, content=eight), 422)
            assert said == "recordings must be counts of the 8 records"
        for recordings in ("", "x", "-1", "1,,7", "8,"):
            assert problem(client.post(normal + recordings, content=eight), 422) == "not valid: query.recordings"
        for seconds in ("0", "-1", "nan", "inf", "x"):
            there = f"{at}/watch/normal?recordings=8&seconds={seconds}"
            assert problem(client.post(there, content=eight), 422) == "not valid: query.seconds"
        assert "need normal records" in problem(client.post(normal + "4", content=alike), 422)
        many = _payload(run, own, moving(NEW, 514, 55))
        said = problem(client.post(normal + ",".join(["2"] * 257), content=many), 422)
        assert said == "recordings must be at most 256, got 257"
        assert "need normal records" in problem(client.post(normal + ",".join("1" * 8), content=eight), 422)
        for name in (".hidden", "a" * 65, "a b", "%2e%2e"):
            assert client.post(f"{at}/{name}/normal?seconds=2&recordings=8", content=eight).status_code in (404, 422)
        assert client.post(normal + "8", content=eight).status_code == 200
        four = eight_of = _payload(run, own, moving(NEW, 4, 54))
        assert problem(client.post(f"{at}/watch/episode", content=four), 422) == "an episode must be 8 records, got 4"
        for broken in (b"", eight[:-1], eight_of[:20]):
            problem(client.post(f"{at}/watch/episode", content=broken), 422)
        assert "no model" in problem(client.post(f"{at.replace(watching.name, 'x')}/watch/episode", content=eight), 404)
        told = problem(client.post(f"/v1/models/{watching.name}/predict", content=eight), 422)
        assert "watches devices: see fedsplit monitor" in told
        listed = client.get(at).json()["devices"]
    assert [row["name"] for row in listed] == ["watch"] and not listed[0]["episodes"]
    assert {path.name for path in (tmp_path / FLEET).iterdir()} == {"watch.safetensors"}


def test_a_token_speaks_for_its_own_device_and_a_watcher_sees_all(
    run: Path, watching: Served, own: Home, tmp_path: Path
) -> None:
    tokens = {name: add_token(tmp_path / "tokens", name) for name in ("watch-1", "watch-2", "nurse")}
    eight = _payload(run, own, moving(NEW, EPISODE, 53))
    at = f"/v1/models/{watching.name}/devices"
    app = _app(_fleet(watching, tmp_path), Tokens(tmp_path / "tokens"), ("nurse",))
    with listening(app) as url, httpx.Client(base_url=url, timeout=30) as client:

        def asked(kind: str, path: str, token: str, **more: Any) -> httpx.Response:
            return client.request(kind, path, headers={"Authorization": f"Bearer {token}"}, **more)

        for device in ("watch-1", "watch-2"):
            there = f"{at}/{device}/normal?recordings=8&seconds=2"
            assert asked("POST", there, tokens[device], content=eight).status_code == 200
        stolen = asked("POST", f"{at}/watch-2/normal?recordings=8&seconds=2", tokens["watch-1"], content=eight)
        assert "this token is of 'watch-1'" in problem(stolen, 403)
        assert problem(asked("POST", f"{at}/watch-1/episode", "guess", content=eight), 401)
        seen = {
            name: [row["name"] for row in asked("GET", at, token).json()["devices"]] for name, token in tokens.items()
        }
        assert asked("GET", at, "guess").status_code == 401
    assert seen == {"watch-1": ["watch-1"], "watch-2": ["watch-2"], "nurse": ["watch-1", "watch-2"]}


def test_the_page_is_there_and_loads_nothing_from_elsewhere(watching: Served, tmp_path: Path) -> None:
    with _client(_app(_fleet(watching, tmp_path))) as client:
        page = client.get("/fleet/")
        assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
        for name in ("fleet.js", "fleet.css"):
            assert client.get(f"/fleet/{name}").status_code == 200 and name in page.text


def test_devices_are_watched_at_the_same_time(run: Path, watching: Served, own: Home, tmp_path: Path) -> None:
    episodes = [_payload(run, own, moving(NEW if i % 2 else RATES[0], EPISODE, 60 + i)) for i in range(8)]
    normal, at = _payload(run, own, np.concatenate(_normal())), f"/v1/models/{watching.name}/devices"

    async def ask(url: str) -> list[float]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            for i in range(8):
                await client.post(f"{at}/d{i}/normal?recordings=12,12,12&seconds=2", content=normal)
            found = await asyncio.gather(
                *(client.post(f"{at}/d{i}/episode", content=e) for i, e in enumerate(episodes))
            )
            again = [await client.post(f"{at}/d{i}/episode", content=e) for i, e in enumerate(episodes)]
        assert [r.json()["episode"] for r in found] == [r.json()["episode"] for r in again]
        return [r.json()["episode"] for r in found]

    with listening(_app(_fleet(watching, tmp_path))) as url:
        scores = asyncio.run(ask(url))
    assert min(scores[1::2]) > max(scores[::2])


def test_damaged_and_foreign_files_of_devices_are_told(watching: Served, tmp_path: Path) -> None:
    (tmp_path / FLEET).mkdir()
    (tmp_path / FLEET / "watch.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match=r"watch\.safetensors is damaged, or of another model"):
        _fleet(watching, tmp_path)


def test_what_one_device_says_of_its_time_stops_no_service(
    run: Path, watching: Served, own: Home, tmp_path: Path
) -> None:
    """Records that come ever faster ask for ever higher thresholds, up to none that a number can be."""
    eight = _payload(run, own, moving(NEW, EPISODE, 53))
    at = f"/v1/models/{watching.name}/devices"
    with _client(_app(_fleet(watching, tmp_path))) as client:
        for seconds in ("1e-320", "5e-324", "1e-300", "9e-4"):
            there = f"{at}/watch/normal?recordings=8&seconds={seconds}"
            assert problem(client.post(there, content=eight), 422) == "not valid: query.seconds"
        assert client.post(f"{at}/watch/normal?recordings=8&seconds=0.001", content=eight).status_code == 200
        assert client.get(at).json()["devices"][0]["threshold"] > 0
    assert set(_fleet(watching, tmp_path, 1e-320).devices) == {"watch"}


@pytest.mark.parametrize("changed", ["seconds", "spreads", "space"])
def test_a_file_that_no_calibration_wrote_is_told(
    run: Path, watching: Served, own: Home, tmp_path: Path, changed: str
) -> None:
    fleet = _fleet(watching, tmp_path)
    fleet.calibrate("watch", watching.read(_payload(run, own, moving(NEW, EPISODE, 53))), [8], 2.0)
    path = tmp_path / FLEET / "watch.safetensors"
    found = load(path.read_bytes())
    path.write_bytes(save(found | {changed: np.zeros_like(found[changed])}))  # of another model, say: of another space
    with pytest.raises(DataError, match=r"watch\.safetensors is damaged, or of another model"):
        _fleet(watching, tmp_path)


def test_what_cannot_be_kept_is_not_believed(run: Path, watching: Served, own: Home, tmp_path: Path) -> None:
    fleet = _fleet(watching, tmp_path)
    (tmp_path / FLEET).rmdir()
    with pytest.raises(OSError, match="No such file"):
        fleet.calibrate("watch", watching.read(_payload(run, own, moving(NEW, EPISODE, 53))), [8], 2.0)
    assert not fleet.devices


def test_a_run_without_an_evaluation_watches_nobody(folder: Path, tmp_path: Path) -> None:
    def report(metrics: dict[str, Any]) -> None:
        if metrics["round"] == 2:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        simulate(_settings(folder), out=tmp_path / "run", report=report)
    with pytest.raises(DataError, match=r"detector.safetensors is missing: the run has not been evaluated yet"):
        Served.of_run(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.skipif(not driving.installed(), reason="needs Chromium and ChromeDriver")
def test_the_page_shows_the_fleet_in_a_browser(run: Path, watching: Served, own: Home, tmp_path: Path) -> None:
    """With a watcher's token; names and scores are shown as text, and nothing comes from elsewhere."""
    tokens = {name: add_token(tmp_path / "tokens", name) for name in ("watch-1", "watch-2", "nurse")}
    fleet = _fleet(watching, tmp_path)
    app = _app(fleet, Tokens(tmp_path / "tokens"), ("nurse",))
    normal = _payload(run, own, np.concatenate(_normal()))
    episodes = [_payload(run, own, moving(rate, EPISODE, 53)) for rate in (RATES[0], NEW)]
    with listening(app) as url, driving.browser() as driver:
        at = f"{url}/v1/models/{watching.name}/devices"
        for device, payload in zip(("watch-1", "watch-2"), episodes, strict=True):
            headers = {"Authorization": f"Bearer {tokens[device]}"}
            httpx.post(f"{at}/{device}/normal?recordings=12,12,12&seconds=2", content=normal, headers=headers)
            for _ in range(3):
                assert httpx.post(f"{at}/{device}/episode", content=payload, headers=headers).status_code == 200
        driver.get(f"{url}/fleet/")
        driving.wait(driver, "!document.getElementById('entry').hidden")
        driving.element(driver, "token").send_keys(tokens["nurse"], "\ue007")
        driving.wait(driver, "document.querySelectorAll('section').length == 2")
        driving.resize(driver, *driving.PHONE)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= driving.PHONE[0]
        shown = driver.execute_script("return [...document.querySelectorAll('section')].map((s) => s.innerText)")
        assert "watch-1" in shown[0] and "normal" in shown[0] and "0 of 3 above it" in shown[0]
        assert "watch-2" in shown[1] and "ALARM" in shown[1] and "3 of 3 above it" in shown[1]
        assert driving.element(driver, "summary").text == "2 devices, 1 with an alarm now"
        fleet.devices["watch-1"].episodes.append((time.time() - 100, 0.1, False))
        driving.wait(driver, "document.getElementById('summary').textContent.endsWith('now, 1 silent')")
        shown = driver.execute_script("return [...document.querySelectorAll('section')].map((s) => s.innerText)")
        assert "normal, silent since 10" in shown[0] and "silent" not in shown[1]
        sent = driving.requests(driver)
        assert {path[: len(url)] for path, _ in sent if not path.startswith(("data:", "chrome:"))} == {url}
        logs = [line["message"] for line in driver.get_log("browser") if line["level"] == "SEVERE"]
        assert all("401" in line for line in logs), logs


# ------------------------------------------------------------------------------------------------------ the device


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
    monitor = _monitor(run, own, "https://localhost:1")
    monitor._remote._client = httpx.Client(
        transport=httpx.MockTransport(lambda _: httpx.Response(200, content=iter([json.dumps(answer).encode()]))),
        base_url="https://localhost:1",
    )
    with pytest.raises(RunError, match="the answer is no verdict"):
        monitor.judge(moving(NEW, EPISODE, 51))
    if not isinstance(answer, dict) or not isinstance(answer.get("threshold"), float):
        with pytest.raises(RunError, match="the answer is no verdict"):
            monitor.calibrate(_normal(), seconds=2.0)


def test_an_alarm_is_the_devices_own_conclusion(run: Path, own: Home) -> None:
    """A service that says alarm, or none, against its own figures is not believed."""
    monitor = _monitor(run, own, "https://localhost:1")
    answer = {"scores": [2.0] * EPISODE, "episode": 2.0, "threshold": 1.0, "alarm": False}
    monitor._remote._client = httpx.Client(
        transport=httpx.MockTransport(lambda _: httpx.Response(200, content=iter([json.dumps(answer).encode()]))),
        base_url="https://localhost:1",
    )
    assert monitor.judge(moving(NEW, EPISODE, 51)).alarm


def test_records_over_the_limits_do_not_leave(run: Path, own: Home) -> None:
    (own.folder / "limits.toml").write_text("equations = 0.01\nleverage = 1.0\n")
    monitor = _monitor(run, own, "https://localhost:1")
    with pytest.raises(WithheldError, match="8 of 8 records may not leave, for the limits on equations"):
        monitor.judge(moving(NEW, EPISODE, 51))
    with pytest.raises(WithheldError, match="36 of 36 records may not leave, for the limits on equations"):
        monitor.calibrate(_normal(), seconds=2.0)


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
    records, normal = moving(NEW, 20, 51), np.concatenate(_normal())
    records[9, 0, 0] = normal[3, 0, 0] = 9
    np.save(tmp_path / "some.npy", records)
    np.save(tmp_path / "all.npy", normal)
    fleet = _fleet(watching, tmp_path)
    with listening(_app(fleet)) as url:
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
        _monitor(run, own, "https://localhost:1", name)


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
        _monitor(run, own, "https://localhost:1").calibrate(recordings, seconds)
    assert not list(own.accountant("test").rows())


def test_the_device_has_no_trunk() -> None:
    names = "fedsplit.device.monitor, fedsplit.device.predictor, fedsplit.device.remote"
    there = f"import sys, {names}; print([m for m in sys.modules if 'trunk' in m or 'novelty' in m])"
    done = subprocess.run([sys.executable, "-c", there], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# ----------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def asks(run: Path, own: Home, tmp_path: Path) -> list[Any]:
    """Return the command's arguments but for the recording and the server."""
    run_bundle(run).save(tmp_path / "device")
    for number, records in enumerate(_normal()):
        np.save(tmp_path / f"normal-{number}.npy", records)
    np.save(tmp_path / "known.npy", moving(RATES[1] * 1.08, 20, 51))
    np.save(tmp_path / "new.npy", moving(NEW, 12, 51))
    return ["--device", tmp_path / "device", "--home", own.folder, "--name", "watch", "--insecure"]


def test_the_command_replays_a_recording_and_raises_alarms(
    asks: list[Any],
    watching: Served,
    tmp_path: Path,
    main: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    normal = [text for n in range(3) for text in ("--normal", tmp_path / f"normal-{n}.npy")]
    with listening(_app(_fleet(watching, tmp_path))) as url:
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
    with listening(_app(_fleet(Served.of_run(run), tmp_path))) as url:
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


# -------------------------------------------------------------------------------------------------- on real recordings


def _recorded(app: FastAPI, bodies: list[bytes]) -> Any:
    """Return the application, which also notes the bodies of requests."""

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        async def listen() -> Any:
            message = await receive()
            bodies.append(message.get("body", b""))
            return message

        await app(scope, listen, send)

    return noting


def _watch_recordings(person: int, side: int) -> dict[str, np.ndarray]:
    """Return the raw samples ``(samples, 6)`` of somebody's exercises."""
    found = wearables._read()
    mine = (found["subject"] == person) & (found["side"] == side)
    chosen = np.flatnonzero(mine).tolist()
    return {wearables.CLASSES[found["y"][i]]: found["X"][i] for i in chosen}


def _cut(samples: np.ndarray) -> np.ndarray:
    windows = len(samples) // wearables.WINDOW
    return samples[: windows * wearables.WINDOW].reshape(windows, wearables.WINDOW, 6).transpose(0, 2, 1)


@pytest.mark.slow
def test_a_new_exercise_raises_an_alarm_and_ten_minutes_of_a_known_one_none(certificates: Path, tmp_path: Path) -> None:
    """The command as a process, over TLS, on a watch of somebody whose data trained nothing; no body holds a record."""
    run, novel = tmp_path / "run", "ROW"
    simulate(CONFIGS / "wearables-novelty.toml", overrides=["run.engine=inline", "audit.targets=0"], out=run)
    samples, third = _watch_recordings(9, 1), {}
    for exercise, recording in samples.items():
        border = len(recording) // 3
        third[exercise] = _cut(recording[:border])
        samples[exercise] = recording[border:]
    known = np.concatenate([samples["IR"]] * (30_000 // len(samples["IR"]) + 1))[:30_000]  # at 50 Hz
    for name, records in {"known": _cut(known), "new": _cut(samples[novel]), **third}.items():
        np.save(tmp_path / f"{name}.npy", records)
    run_bundle(run).save(tmp_path / "device")
    Home.create(tmp_path / "home", [0])
    token, bodies = add_token(tmp_path / "tokens", "watch-17"), []
    normal = [part for exercise in third if exercise != novel for part in ("--normal", f"{exercise}.npy")]
    app = _app(Fleet(Served.of_run(run), run / FLEET, 10.0), Tokens(tmp_path / "tokens"))
    with listening(_recorded(app, bodies), certificates / "good") as url:  # type: ignore[arg-type]
        own = ["--device", "device", "--home", "home", "--name", "watch-17", "--seconds", "2", "--speed", "0", "--json"]
        there = ["--server", url, "--ca", str(certificates / "good" / CA)]
        alarms = {}
        for name, more in (("known", normal), ("new", [])):
            done = subprocess.run(
                [sys.executable, "-m", "fedsplit.cli", "monitor", f"{name}.npy", *own, *there, *more],
                cwd=tmp_path, env={**os.environ, "FEDSPLIT_TOKEN": token}, capture_output=True, text=True, timeout=200,
                check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            alarms[name] = [json.loads(line)["alarm"] for line in done.stdout.splitlines()]
    assert len(alarms["known"]) == 300 - EPISODE + 1 and not any(alarms["known"])
    assert all(alarms["new"]) and len(alarms["new"]) > 2
    _hold_no_record(b"".join(bodies), np.concatenate([_cut(known), _cut(samples[novel]), *third.values()]))


def _hold_no_record(sent: bytes, raw: np.ndarray) -> None:
    """Check that no four neighbouring numbers of a record are in what was sent, raw or scaled, in any usual dtype."""
    scaled = Scaling(tuple(wearables.MEAN.tolist()), tuple(wearables.STD.tolist())).apply(raw)
    for size, dtypes in ((32, ("<f8", ">f8")), (16, ("<f4", ">f4")), (8, ("<f2", ">f2"))):
        there = {sent[i : i + size] for i in range(len(sent) - size)}
        for numbers in (raw, scaled):
            for content in (numbers.astype(dtype).tobytes() for dtype in dtypes):
                pieces = {content[i : i + size] for i in range(0, len(content) - size, size)}
                assert not {piece for piece in pieces if len(set(piece)) > 4} & there
