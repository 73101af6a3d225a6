"""The demo page: what the service adds for it, and the page itself in a real browser."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIGS, small_settings
from starlette.testclient import TestClient

from fedsplit.common.errors import ConfigError
from fedsplit.device.bundle import DESCRIPTION, WEIGHTS
from fedsplit.device.home import Home
from fedsplit.device.predictor import Predictor
from fedsplit.plan.settings import load_settings
from fedsplit.release.chosen import numbers_of
from fedsplit.release.policies import All, TopK
from fedsplit.release.policy import Policy
from fedsplit.runs.folder import run_bundle
from fedsplit.runs.simulation import simulate
from fedsplit.service.app import service
from fedsplit.service.demo import Attacker, add_demo
from fedsplit.service.served import Served
from fedsplit.service.tokens import Tokens, add_token
from simulations.shared import browser as driving
from simulations.shared.serving import serving


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on digits of 8 by 8, raw numbers 0..16."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    settings = load_settings(CONFIGS / "digits.toml", ["run.engine=inline", "run.rounds=4"])
    simulate(settings, out=folder)
    return folder


@pytest.fixture(scope="module")
def client(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    token, served = add_token(path, "me"), Served.of_run(run)
    app = service([served], Tokens(path))
    add_demo(app, [Attacker.of_run(run, served)])
    with TestClient(app, headers={"Authorization": f"Bearer {token}"}) as opened:
        yield opened


@pytest.fixture
def home(tmp_path: Path) -> Home:
    built = Home.create(tmp_path / "home", [0])
    (built.folder / "limits.toml").write_text("enforce = false\n")
    return Home(built.folder)


def drawing() -> np.ndarray:
    raw = np.zeros((8, 8))
    raw[1, 2:6], raw[1:7, 4] = 12, 16
    return raw.reshape(1, -1)


def test_a_device_gets_its_files(run: Path, client: TestClient, tmp_path: Path) -> None:
    run_bundle(run).save(tmp_path / "device")
    name = run_bundle(run).model
    for file in (DESCRIPTION, WEIGHTS):
        answer = client.get(f"/demo/models/{name}/{file}")
        assert answer.content == (tmp_path / "device" / file).read_bytes()
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    for path in (f"{name}/trunk.safetensors", f"{name}/..%2f..%2fconfig.toml", f"other/{WEIGHTS}"):
        assert client.get(f"/demo/models/{path}").status_code == 404
    assert client.get(f"/demo/models/{name}/{WEIGHTS}", headers={"Authorization": "Bearer wrong"}).status_code == 401


def test_the_page_needs_nothing_from_elsewhere(client: TestClient) -> None:
    assert client.get("/", follow_redirects=False).headers["location"] == "/demo/"
    for path in ("/demo/", "/demo/page.js", "/demo/page.css", "/demo/layer.js", "/docs"):
        answer = client.get(path, headers={"Authorization": ""})
        assert answer.status_code == 200 and "http" not in answer.text.replace("http-equiv", ""), path


def attack(client: TestClient, run: Path, home: Home, dropping: Policy, raw: np.ndarray, **query: object) -> dict:
    bundle = run_bundle(run)
    made = Predictor(type(bundle)(**{**vars(bundle), "dropping": dropping}), home, lambda payload: np.zeros((1, 1)))
    payload = made.release(raw)[0].to_bytes()
    policy, numbers = numbers_of(dropping)
    given = {"policy": policy, **numbers, **query}
    answer = client.post(f"/demo/models/{bundle.model}/attack", params=given, content=payload)
    return {"status": answer.status_code, **answer.json()}


@pytest.mark.slow
def test_the_attack_is_a_real_one(client: TestClient, run: Path, home: Home) -> None:
    """Where more than enough outputs leave to decide the record it comes back, where few do it does not."""
    raw, scaling = drawing(), run_bundle(run).scaling
    record = scaling.apply(raw)[0].ravel()

    def closest(dropping: Policy) -> float:
        found = attack(client, run, home, dropping, raw)
        assert found["status"] == 200 and set(found["without"]) == {"mean", "class mean"} and found["peak"] == 1.0
        return min(float(np.square(np.array(guess) - record).mean()) for guess in found["guesses"].values())

    width = run_bundle(run).layer.width
    assert closest(All()) < closest(TopK(width // 16)) / 3


def test_what_cannot_be_attacked_is_refused(client: TestClient, run: Path, home: Home) -> None:
    twice = np.concatenate([drawing(), drawing() / 2])
    assert attack(client, run, home, All(), twice)["status"] == 422
    for query in ({"policy": "other"}, {"policy": "top-k", "k": 0}, {"policy": "top-k", "k": 10_000}, {"bits": 3}):
        found = attack(client, run, home, All(), drawing(), **query)
        assert found["status"] == 422 and "detail" in found
    assert attack(client, run, home, All(), drawing(), k="many")["detail"] == "not valid: query.k"


@pytest.mark.slow
def test_one_attack_at_a_time(client: TestClient, run: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go = threading.Event(), threading.Event()

    def slow(*_: object) -> dict:
        began.set()
        assert go.wait(20)
        return {}

    monkeypatch.setattr(Attacker, "attack", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(attack, client, run, home, All(), drawing())
        assert began.wait(20)
        second = attack(client, run, home, All(), drawing())
        go.set()
        assert first.result()["status"] == 200 and second["status"] == 503


@pytest.mark.parametrize("why", ["gelu", "no records"])
def test_a_model_that_the_page_cannot_compute_is_refused(why: str, tmp_path: Path) -> None:
    if why == "gelu":
        raw = load_settings(CONFIGS / "digits.toml", ["run.engine=inline", "run.rounds=1", "model.activation=gelu"])
        said = "not for models with noise or GELU"
    else:
        raw, said = small_settings(run={"rounds": 1}), "needs public records"
    simulate(raw, out=tmp_path / "run")
    with pytest.raises(ConfigError, match=said):
        Attacker.of_run(tmp_path / "run", Served.of_run(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.skipif(not driving.installed(), reason="needs Chromium and ChromeDriver")
def test_the_page_in_a_browser(run: Path, home: Home, tmp_path: Path) -> None:
    """What it sends is, byte for byte, what the Python client sends of the same record with the same secret."""
    token = add_token(tmp_path / "tokens", "demo")
    with serving(run, tmp_path, "--demo") as url, driving.browser() as driver:
        driver.get(f"{url}/demo/page.css")
        driver.execute_script("localStorage.setItem('fedsplit-secret', arguments[0])", home.secret.hex())
        driving.enter(driver, url, token)
        driving.resize(driver, *driving.PHONE)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= driving.PHONE[0]
        driving.draw_lines(driver, driving.SEVEN)
        assert driving.predict(driver).isdigit()

        module = (
            "const done = arguments[0]; import('/demo/page.js').then((m) => done(JSON.stringify([...m.state.raw])))"
        )
        raw = np.array([json.loads(driver.execute_async_script(module))])
        assert raw.max() > 8 and np.array_equal(raw, raw.round())
        predictor = Predictor(run_bundle(run), home, lambda payload: np.zeros((1, 10)))
        expected = predictor.release(raw)[0].to_bytes().hex()
        sent = driving.requests(driver)
        assert {path[: len(url)] for path, _ in sent if not path.startswith(("data:", "chrome:"))} == {url}
        assert [body.hex() for _, body in sent if body] == [
            expected,
            expected,
        ]  # for the prediction, and for the attack
        assert driving.element(driver, "bytes").get_property("textContent").replace(" ", "") == expected

        # another policy, and all of it by keyboard
        driving.element(driver, "clear").click()
        assert not driving.element(driver, "send").is_enabled()
        area = driving.element(driver, "draw")
        area.send_keys("\ue015" * 6, " ", "\ue014" * 8, "\ue015" * 8, " ")  # down, pen, right, down, pen
        driving.element(driver, "policy").send_keys("\ue014" * 9)
        driving.wait(driver, "!document.getElementById('send').disabled")
        assert "nothing is dropped" in driving.element(driver, "policy-says").text
        driving.element(driver, "send").send_keys("\ue007")
        driving.wait(driver, "!document.getElementById('pictures').hidden")
        assert "dB" in driving.element(driver, "attack").text
        logs = [line["message"] for line in driver.get_log("browser") if line["level"] == "SEVERE"]
        assert all("401" in line or "favicon" in line for line in logs), logs
