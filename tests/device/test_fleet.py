"""Devices that are watched: what the service takes and tells."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from movements import FLEET, NEW, RATES, app_of, fleet_of, monitor_of, moving, normal_of, watched_settings
from predictions import listening, problem
from safetensors.numpy import load, save

from fedsplit import simulate
from fedsplit.common.errors import DataError
from fedsplit.device.home import Home
from fedsplit.device.predictor import Predictor
from fedsplit.runs.folder import run_bundle
from fedsplit.service.served import Served
from fedsplit.service.tokens import Tokens, add_token
from fedsplit.wire.query import EPISODE
from simulations.shared import browser as driving


def _payload(run: Path, home: Home, records: np.ndarray) -> bytes:
    query, _ = Predictor(run_bundle(run), home, lambda _: np.zeros(0)).release(records)
    return query.to_bytes()


def test_a_device_that_has_calibrated_is_told_what_is_new(
    run: Path, watching: Served, own: Home, tmp_path: Path
) -> None:
    fleet = fleet_of(watching, tmp_path)
    with listening(app_of(fleet)) as url:
        monitor = monitor_of(run, own, url)
        threshold = monitor.calibrate(normal_of(), seconds=2.0)
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
        with listening(app_of(fleet_of(watching, tmp_path))) as url:
            monitor = monitor_of(run, own, url)
            if not start:
                monitor.calibrate(normal_of(), seconds=2.0)
            verdicts.append(monitor.judge(moving(NEW, EPISODE, 51)))
    assert verdicts[0].episode == verdicts[1].episode and verdicts[0].threshold == verdicts[1].threshold


def test_asking_again_releases_nothing_twice(run: Path, watching: Served, own: Home, tmp_path: Path) -> None:
    records = moving(RATES[0], EPISODE + 3, 52)
    with listening(app_of(fleet_of(watching, tmp_path))) as url:
        monitor = monitor_of(run, own, url)
        monitor.calibrate(normal_of(), seconds=2.0)
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
    with _client(app_of(fleet_of(watching, tmp_path))) as client:
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
    app = app_of(fleet_of(watching, tmp_path), Tokens(tmp_path / "tokens"), ("nurse",))
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
    with _client(app_of(fleet_of(watching, tmp_path))) as client:
        page = client.get("/fleet/")
        assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
        for name in ("fleet.js", "fleet.css"):
            assert client.get(f"/fleet/{name}").status_code == 200 and name in page.text


def test_devices_are_watched_at_the_same_time(run: Path, watching: Served, own: Home, tmp_path: Path) -> None:
    episodes = [_payload(run, own, moving(NEW if i % 2 else RATES[0], EPISODE, 60 + i)) for i in range(8)]
    normal, at = _payload(run, own, np.concatenate(normal_of())), f"/v1/models/{watching.name}/devices"

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

    with listening(app_of(fleet_of(watching, tmp_path))) as url:
        scores = asyncio.run(ask(url))
    assert min(scores[1::2]) > max(scores[::2])


def test_damaged_and_foreign_files_of_devices_are_told(watching: Served, tmp_path: Path) -> None:
    (tmp_path / FLEET).mkdir()
    (tmp_path / FLEET / "watch.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match=r"watch\.safetensors is damaged, or of another model"):
        fleet_of(watching, tmp_path)


def test_what_one_device_says_of_its_time_stops_no_service(
    run: Path, watching: Served, own: Home, tmp_path: Path
) -> None:
    """Records that come ever faster ask for ever higher thresholds, up to none that a number can be."""
    eight = _payload(run, own, moving(NEW, EPISODE, 53))
    at = f"/v1/models/{watching.name}/devices"
    with _client(app_of(fleet_of(watching, tmp_path))) as client:
        for seconds in ("1e-320", "5e-324", "1e-300", "9e-4"):
            there = f"{at}/watch/normal?recordings=8&seconds={seconds}"
            assert problem(client.post(there, content=eight), 422) == "not valid: query.seconds"
        assert client.post(f"{at}/watch/normal?recordings=8&seconds=0.001", content=eight).status_code == 200
        assert client.get(at).json()["devices"][0]["threshold"] > 0
    assert set(fleet_of(watching, tmp_path, 1e-320).devices) == {"watch"}


@pytest.mark.parametrize("changed", ["seconds", "spreads", "space"])
def test_a_file_that_no_calibration_wrote_is_told(
    run: Path, watching: Served, own: Home, tmp_path: Path, changed: str
) -> None:
    fleet = fleet_of(watching, tmp_path)
    fleet.calibrate("watch", watching.read(_payload(run, own, moving(NEW, EPISODE, 53))), [8], 2.0)
    path = tmp_path / FLEET / "watch.safetensors"
    found = load(path.read_bytes())
    path.write_bytes(save(found | {changed: np.zeros_like(found[changed])}))  # of another model, say: of another space
    with pytest.raises(DataError, match=r"watch\.safetensors is damaged, or of another model"):
        fleet_of(watching, tmp_path)


def test_what_cannot_be_kept_is_not_believed(run: Path, watching: Served, own: Home, tmp_path: Path) -> None:
    fleet = fleet_of(watching, tmp_path)
    (tmp_path / FLEET).rmdir()
    with pytest.raises(OSError, match="No such file"):
        fleet.calibrate("watch", watching.read(_payload(run, own, moving(NEW, EPISODE, 53))), [8], 2.0)
    assert not fleet.devices


def test_a_run_without_an_evaluation_watches_nobody(folder: Path, tmp_path: Path) -> None:
    def report(metrics: dict[str, Any]) -> None:
        if metrics["round"] == 2:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        simulate(watched_settings(folder), out=tmp_path / "run", report=report)
    with pytest.raises(DataError, match=r"detector.safetensors is missing: the run has not been evaluated yet"):
        Served.of_run(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.skipif(not driving.installed(), reason="needs Chromium and ChromeDriver")
def test_the_page_shows_the_fleet_in_a_browser(run: Path, watching: Served, own: Home, tmp_path: Path) -> None:
    """With a watcher's token; names and scores are shown as text, and nothing comes from elsewhere."""
    tokens = {name: add_token(tmp_path / "tokens", name) for name in ("watch-1", "watch-2", "nurse")}
    fleet = fleet_of(watching, tmp_path)
    app = app_of(fleet, Tokens(tmp_path / "tokens"), ("nurse",))
    normal = _payload(run, own, np.concatenate(normal_of()))
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
