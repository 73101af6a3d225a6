"""Predictions over the network: what a device makes of every answer, and the commands as processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from predictions import RECORDS
from processes import free_port, wait_for_port

from fedsplit.deployment.certs import CA
from fedsplit.errors import ConfigError, RunError
from fedsplit.home import Home
from fedsplit.prediction import remote
from fedsplit.prediction.remote import Remote


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


@pytest.mark.slow
def test_predict_and_serve_are_processes(trained: Path, certificates: Path, tmp_path: Path) -> None:
    """With TLS and a token; what the service gets is what it would offline, and its log holds nothing of it."""

    inherited = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(Path(__file__).parent)}

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
        for ca, secret, told in (("good", "x", "a bearer token is needed"), ("other", token, "is refused")):
            refused = fedsplit(*asks, "x.npz", *there, certificates / ca / CA, FEDSPLIT_TOKEN=secret)
            assert refused.returncode == 2 and told in refused.stderr and len(refused.stderr.splitlines()) == 2
        busy = fedsplit(*command)
        assert busy.returncode == 2 and "cannot listen on" in busy.stderr
    finally:
        process.terminate()
        assert process.wait(20) in (0, -15)
    text = (tmp_path / "log").read_text()
    assert "serving" in text and "Traceback" not in text
