"""Predictions over the network: what a device makes of every answer, and the commands as processes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import numpy as np
import pytest
from predictions import RECORDS, listening

from fedsplit.common.certs import CA
from fedsplit.common.errors import ConfigError, RunError
from fedsplit.device import remote
from fedsplit.device.home import Home
from fedsplit.device.predictor import Predictor
from fedsplit.device.remote import Remote
from fedsplit.runs.folder import run_bundle
from fedsplit.service.app import service
from fedsplit.service.served import Served
from fedsplit.service.tokens import Tokens, add_token
from fedsplit.wire.container import VERSION
from fedsplit.wire.query import Query
from simulations.shared.network import free_port, wait_for_port

Serving = Callable[..., AbstractContextManager[str]]


def answered(handle: Callable[[httpx.Request], httpx.Response]) -> Remote:
    """Return what asks a service that answers in this way."""
    asks = Remote("https://localhost:1", "model", "t", None)
    asks._client = httpx.Client(transport=httpx.MockTransport(handle), base_url="https://localhost:1")
    return asks


def test_a_service_that_is_busy_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([503, 429, "away", 200])

    def handle(request: httpx.Request) -> httpx.Response:
        answer = next(answers)
        if answer == "away":
            raise httpx.ConnectError("refused")
        return httpx.Response(answer, content=iter([b'{"outputs": [[1.0, 2.0]]}']))

    monkeypatch.setattr(remote, "_PAUSE", 0.0)
    asks = answered(handle)
    assert asks(b"").tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    "answer",
    [
        '{"outputs": "x"}',
        '{"outputs": []}',
        '{"outputs": [1.0]}',
        '{"outputs": [[1.0], [1.0, 2.0]]}',
        "{}",
        "[]",
        '"x"',
        "",
        '{"outputs": [[1' + "0" * 400 + "]]}",
        "[" * 200000,
    ],
    ids=lambda text: text[:30],
)
def test_an_answer_that_is_no_prediction_is_told(answer: str) -> None:
    asks = answered(lambda request: httpx.Response(200, content=iter([answer.encode()])))
    with pytest.raises(RunError, match="the answer is no prediction"):
        asks(b"")


@pytest.mark.parametrize("url", ["localhost:1", "ftp://x", "", "https://"])
def test_what_is_no_address_is_told(url: str) -> None:
    with pytest.raises(ConfigError, match="--server must be https://HOST:PORT"):
        Remote(url, "model", None, None)
    with pytest.raises(ConfigError, match="a token is not sent without TLS"):
        Remote("http://localhost:1", "model", "token", None)
    with pytest.raises(ConfigError, match="the token in FEDSPLIT_TOKEN is none"):
        Remote("https://localhost:1", "model", "tok en", None)


def test_an_endless_answer_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    content = (b" " * 1000 for _ in range(10**9))
    asks = answered(lambda request: httpx.Response(200, content=content))
    monkeypatch.setattr(remote, "_LARGEST", 100_000)
    with pytest.raises(RunError, match="the answer is too large"):
        asks(b"")


@pytest.fixture
def asks(trained: Path, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return the command of a device that asks a service which is to come; with its token."""
    run_bundle(trained).save(tmp_path / "device")
    np.save(tmp_path / "x.npy", RECORDS)
    (home.folder / "limits.toml").write_text("equations = 0.9\nleverage = 1.0\n")
    monkeypatch.setattr(remote, "_PAUSE", 0.0)
    monkeypatch.setenv("FEDSPLIT_TOKEN", add_token(tmp_path / "tokens", "me"))
    own = ["--device", tmp_path / "device", "--home", home.folder, "--input", tmp_path / "x.npy"]
    return ["predict", *own, "--ca", tmp_path / "ca.crt", "--server"]


@pytest.fixture
def serving(served: Served, asks: list[object], certificates: Path, tmp_path: Path) -> Serving:
    """Return what serves the model to that device, with some certificates and another authority if it is given."""

    def serve(name: str = "good", authority: str = "") -> AbstractContextManager[str]:
        shutil.copy(certificates / (authority or name) / CA, tmp_path)
        return listening(service([served], Tokens(tmp_path / "tokens")), certificates / name)

    return serve


def test_a_device_gets_its_predictions_over_tls(
    serving: Serving, asks: list[object], served: Served, main: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, device, _, home, _, _, _, authority, _ = asks
    with serving() as url:
        main(*asks, url)
        connected = Predictor.connect(
            url, device=device, home=home, token=os.environ["FEDSPLIT_TOKEN"], authority=authority
        )
        values = connected.predict(RECORDS).values()
    assert capsys.readouterr().out.split() == [str(value) for value in values] and len(values) == len(RECORDS)


@pytest.mark.parametrize(
    ("name", "authority", "why"),
    [
        ("expired", "expired", "certificate has expired"),
        ("good", "other", ""),
        ("elsewhere", "elsewhere", "IP address mismatch"),
    ],
)
def test_a_certificate_that_is_not_good_is_told(
    name: str, authority: str, why: str, serving: Serving, asks: list[object], refused: Callable[..., str]
) -> None:
    with serving(name, authority) as url:
        said = refused(*asks, url)
    assert said.startswith(f"fedsplit: {url}: its certificate is refused: ") and why in said


def test_a_service_that_is_away_is_told(serving: Serving, asks: list[object], refused: Callable[..., str]) -> None:
    with serving() as url:
        pass
    assert refused(*asks, url) == f"fedsplit: {url} does not answer"


def test_a_wrong_token_is_told(
    serving: Serving, asks: list[object], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSPLIT_TOKEN", "wrong")
    with serving() as url:
        assert refused(*asks, url) == f"fedsplit: {url} refuses: this bearer token is not known here"


def test_a_missing_token_is_told_before_anything_leaves(
    asks: list[object], refused: Callable[..., str], home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDSPLIT_TOKEN")
    said = "fedsplit: a service with TLS wants a token: put it in the variable FEDSPLIT_TOKEN"
    assert refused(*asks, "https://localhost:1") == said
    assert list(home.accountant("test").rows()) == []


def test_another_version_of_the_wire_is_told(
    serving: Serving, asks: list[object], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = Query.to_bytes
    monkeypatch.setattr(Query, "to_bytes", lambda self: packed(self)[:2] + b"\x09" + packed(self)[3:])
    with serving() as url:
        assert refused(*asks, url) == f"fedsplit: {url} refuses: version must be {VERSION}, got 9"


def test_another_layer_is_told(
    serving: Serving, asks: list[object], refused: Callable[..., str], trained: Path, tmp_path: Path
) -> None:
    other = run_bundle(trained)
    other.layer.load_weights({name: w + 1 for name, w in other.layer.initial_weights().items()})
    other.save(tmp_path / "other")
    asks[asks.index(tmp_path / "device")] = tmp_path / "other"
    with serving() as url:
        assert refused(*asks, url) == f"fedsplit: {url} refuses: there is no model {other.model!r} here"


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.csv"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_input_that_is_not_finite_is_told_and_nothing_leaves(
    bad: float,
    name: str,
    asks: list[object],
    refused: Callable[..., str],
    certificates: Path,
    home: Home,
    tmp_path: Path,
) -> None:
    shutil.copy(certificates / "good" / CA, tmp_path)
    records = RECORDS.copy()
    records[7, 3] = bad
    np.save(tmp_path / "x.npy", records)
    np.savez(tmp_path / "x.npz", x=records)
    np.savetxt(tmp_path / "x.csv", records, delimiter=",")
    asks[asks.index(tmp_path / "x.npy")] = tmp_path / name
    assert refused(*asks, "https://localhost:1") == "fedsplit: records must be finite, got NaN or infinity"
    assert not list(home.accountant("test").rows())


@pytest.mark.parametrize("size", [1, 10_000_000])
def test_a_body_that_is_too_large_is_told(size: int, serving: Serving, served: Served, asks: list[object]) -> None:
    """Also one of which the service does not read most."""
    with serving() as url:
        ask = Remote(url, served.name, os.environ["FEDSPLIT_TOKEN"], Path(str(asks[asks.index("--ca") + 1])))
        with pytest.raises(RunError, match=f"refuses: at most {served.most_bytes} bytes"):
            ask(bytes(served.most_bytes + size))


@pytest.mark.slow
def test_predict_and_serve_are_processes(trained: Path, certificates: Path, tmp_path: Path) -> None:
    """With TLS and a token; what the service gets is what it would offline, and its log holds nothing of it."""

    inherited = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(Path(__file__).parents[1])}

    def fedsplit(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "fedsplit.cli", *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env={**inherited, **environment}, capture_output=True, text=True,
            timeout=100, check=False,
        )  # fmt: skip

    assert fedsplit("export", trained, "--device", "device").returncode == 0
    token = fedsplit("token", "tokens", "me").stdout.strip()
    np.savez(tmp_path / "x.npz", x=RECORDS)
    np.savetxt(tmp_path / "x.csv", RECORDS, delimiter=",")
    Home.create(tmp_path / "home", [0])
    (tmp_path / "home" / "limits.toml").write_text("enforce = false")
    asks = ("predict", "--device", "device", "--home", "home", "--json", "--input")
    offline = fedsplit(*asks, "x.npz", "--offline", trained)
    assert offline.returncode == 0, offline.stderr
    port = free_port()
    command = ["serve", str(trained), "--certs", str(certificates / "good"), "--tokens", "tokens", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedsplit.cli", *command], cwd=tmp_path, env=inherited, stdout=log, stderr=log
        )
    try:
        wait_for_port("127.0.0.1", port)
        there = ("--server", f"https://127.0.0.1:{port}", "--ca")
        online = fedsplit(*asks, "x.csv", *there, certificates / "good" / CA, FEDSPLIT_TOKEN=token)
        assert online.returncode == 0, online.stderr
        found = [json.loads(done.stdout) for done in (offline, online)]
        assert found[0]["predictions"] == found[1]["predictions"] and len(found[0]["predictions"]) == 30
        for ca, secret, told in (("good", "x", "this bearer token is not known here"), ("other", token, "is refused")):
            refused = fedsplit(*asks, "x.npz", *there, certificates / ca / CA, FEDSPLIT_TOKEN=secret)
            assert refused.returncode == 2 and told in refused.stderr and len(refused.stderr.splitlines()) == 2
        busy = fedsplit(*command)
        assert busy.returncode == 2 and "cannot listen on" in busy.stderr
    finally:
        process.terminate()
        assert process.wait(20) in (0, -15)
    text = (tmp_path / "log").read_text()
    assert "serving" in text and "Traceback" not in text


def test_a_service_without_tls_is_for_this_machine(refused: Callable[..., str], trained: Path) -> None:
    said = refused("serve", trained, "--insecure", "--host", "0.0.0.0")
    assert "--insecure is for this machine alone: --host must be 127.0.0.1, got 0.0.0.0" in said
