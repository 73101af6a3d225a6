"""Predictions: what a device is given, what it sends, what a service takes, and what neither does."""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from conftest import small_settings
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import free_port, wait_for_port
from torch import nn

from fedsplit.data import Scaling
from fedsplit.deployment.certs import make_certificates
from fedsplit.dropping import Dropping
from fedsplit.errors import ConfigError, DataError, RunError, WireError
from fedsplit.home import Home
from fedsplit.model import ACTIVATIONS, FirstLayer
from fedsplit.prediction import remote
from fedsplit.prediction.bundle import DESCRIPTION, WEIGHTS, Bundle, run_bundle
from fedsplit.prediction.predictor import Predictor
from fedsplit.prediction.remote import Remote
from fedsplit.prediction.service import Served, Tokens, add_token, service
from fedsplit.simulation import simulate
from fedsplit.wire import Query, Reason

RECORDS = np.random.default_rng(5).normal(size=(30, 12))
TOKEN = {"Authorization": "Bearer right"}
SCALED = Scaling((1.0,), (2.0,), -50.0, 50.0)
OTHERS = {"activation": nn.Identity(), "stride": nn.Conv1d(2, 3, 3, stride=2), "padding": nn.Conv1d(2, 3, 3, padding=1)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prediction") / "run"
    simulate(small_settings(dropping={"policy": "top-k", "k": 4}), out=folder)
    return folder


@pytest.fixture(scope="module")
def served(run: Path) -> Served:
    return Served.of_run(run)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    built = Home.create(tmp_path / "home", [3])
    (built.folder / "limits.toml").write_text("enforce = false\n")
    return Home(built.folder)


def ask(served: Served) -> Callable[[bytes], np.ndarray]:
    return lambda payload: served.outputs([served.read(payload)])


# ------------------------------------------------------------------------------------------------ the bundle

LAYERS = {
    "linear": (nn.Linear(6, 5), (2, 3)),
    "per step": (nn.Linear(3, 5, bias=False), (2, 3)),
    "conv1d": (nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2), (2, 9)),
    "conv2d": (nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(1, 0), groups=2, bias=False), (2, 6, 6)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_bundle_comes_back_as_it_was(name: str, activation: str, tmp_path: Path) -> None:
    module, shape = LAYERS[name]
    layer = FirstLayer(module, ACTIVATIONS[activation](), shape)
    bundle = Bundle(layer, Dropping("random", keep=0.25), "float16", SCALED, "classification", 3)
    bundle.save(tmp_path / "device")
    assert sorted(path.name for path in (tmp_path / "device").iterdir()) == [DESCRIPTION, WEIGHTS]
    again = Bundle.load(tmp_path / "device")
    assert np.array_equal(again.weights, bundle.weights) and again.model == bundle.model
    assert (again.dropping, again.dtype, again.scaling, again.task, again.outputs) == (
        bundle.dropping, "float16", SCALED, "classification", 3
    )  # fmt: skip
    x = np.random.default_rng(1).normal(size=(4, *shape)).astype(np.float32)
    before, after = (b.layer.activation(b.layer.pre_activations(b.layer.initial_weights(), x)) for b in (bundle, again))
    assert np.array_equal(before, after)
    with pytest.raises(ConfigError, match="is not empty"):
        bundle.save(tmp_path / "device")


def test_an_activation_with_other_numbers_is_not_exported(tmp_path: Path) -> None:
    layer = FirstLayer(nn.Linear(3, 4), nn.LeakyReLU(0.3), (3,))
    with pytest.raises(ConfigError, match=r"LeakyReLU\(negative_slope=0.3\) cannot be exported"):
        Bundle(layer, Dropping("none"), "float32", Scaling(), "binary", 1).save(tmp_path / "device")


def test_the_trunk_is_not_in_it(run: Path, tmp_path: Path) -> None:
    run_bundle(run).save(tmp_path / "device")
    size = sum(path.stat().st_size for path in (tmp_path / "device").iterdir())
    assert size < 4 * (12 * 10 + 10) + 2000


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d.update(format=2), "is damaged, or of another version"),
        (lambda d: d.update(more=1), "is damaged, or of another version"),
        (lambda d: d.update(sha256="0" * 64), "its SHA-256 is not the one"),
        (lambda d: d.update(model="0" * 16), "is not of the model"),
        (lambda d: d["layer"].update(kind="Embedding"), "is damaged, or of another version"),
        (lambda d: d["layer"]["arguments"].update(in_features=13), "does not describe a model that can be built"),
        (lambda d: d["layer"]["arguments"].update(device="meta"), "is damaged, or of another version"),
        (lambda d: d["layer"].update(input_shape=[0]), "does not describe a model that can be built"),
        (lambda d: d["dropping"].update(k=11), "does not describe a model that can be built"),
        (lambda d: d["scaling"].update(subtract=[1, 2]), "does not describe a model that can be built"),
        (lambda d: d["scaling"].update(divide=[0.0]), "does not describe a model that can be built"),
        (lambda d: d["scaling"].update(low=None), "is damaged, or of another version"),
    ],
)
def test_a_bundle_that_was_changed_is_refused(change: Callable, told: str, run: Path, tmp_path: Path) -> None:
    run_bundle(run).save(tmp_path / "device")
    description = json.loads((tmp_path / "device" / DESCRIPTION).read_text())
    change(description)
    (tmp_path / "device" / DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(DataError, match=told):
        Bundle.load(tmp_path / "device")


def test_what_is_no_bundle_or_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no model for devices"):
        Bundle.load(tmp_path / "device")
    with pytest.raises(DataError, match="is not a run folder"):
        run_bundle(tmp_path)


# -------------------------------------------------------------------------------------------------- the device


def test_a_repeated_record_releases_nothing_new(run: Path, served: Served, home: Home) -> None:
    sent: list[bytes] = []

    def note(payload: bytes) -> np.ndarray:
        sent.append(payload)
        return ask(served)(payload)

    first = Predictor(run_bundle(run), home, note).predict(RECORDS)
    rows = list(home.accountant("test").rows())
    assert len(rows) == 30 and {spent.releases for _, spent in rows} == {1} and not first.refused.any()
    ledger = home.ledger_path("test").read_bytes()
    for _ in range(20):  # another process each time
        again = Predictor(run_bundle(run), Home(home.folder), note).predict(RECORDS)
        assert np.array_equal(again.outputs, first.outputs)
    assert home.ledger_path("test").read_bytes() == ledger and len(set(sent)) == 1
    twice = Predictor(run_bundle(run), Home(home.folder), note).predict(np.concatenate([RECORDS[:2], RECORDS[:2]]))
    assert np.array_equal(twice.outputs, np.concatenate([first.outputs[:2]] * 2))
    assert home.ledger_path("test").read_bytes() == ledger


def test_a_record_is_sent_alike_whatever_it_is_sent_with(run: Path, home: Home) -> None:
    whole, _ = Predictor(run_bundle(run), home, ask).release(RECORDS)
    for i in (0, 7, 29):
        alone, _ = Predictor(run_bundle(run), home, ask).release(RECORDS[i : i + 1])
        assert np.array_equal(alone.release.bitmap[0], whole.release.bitmap[i])
        stop = whole.release.counts[: i + 1].sum()
        assert np.array_equal(alone.release.codes, whole.release.codes[stop - alone.release.counts[0] : stop])


@pytest.mark.parametrize("other", OTHERS)
def test_the_same_weights_in_another_layer_are_another_release(other: str, tmp_path: Path) -> None:
    """Else whoever makes models could ask about a record again and again, uncounted."""
    home = Home.create(tmp_path / "home", [0])
    (home.folder / "limits.toml").write_text("releases = 1\nequations = 0.9\nleverage = 1.0\n")
    torch.manual_seed(0)
    module, raw = nn.Conv1d(2, 3, 3), np.random.default_rng(2).normal(size=(4, 2, 9))
    changed = OTHERS[other] if isinstance(OTHERS[other], nn.Conv1d) else nn.Conv1d(2, 3, 3)
    changed.load_state_dict(module.state_dict())
    activation = nn.ReLU() if isinstance(OTHERS[other], nn.Conv1d) else OTHERS[other]
    refused = []
    for layer in (FirstLayer(module, nn.ReLU(), (2, 9)), FirstLayer(changed, activation, (2, 9))):
        bundle = Bundle(layer, Dropping("top-k", k=2), "float32", Scaling(), "binary", 1)
        refused.append(Predictor(bundle, Home(home.folder), ask).release(raw)[1].tolist())
    assert refused == [[0] * 4, [Reason.RELEASES] * 4]


def test_another_scaling_makes_no_other_record(run: Path, home: Home) -> None:
    bundle = run_bundle(run)
    for scaling in (Scaling(), Scaling(divide=(1.0000002,)), Scaling((0.5,), (2.0,))):
        changed = Bundle(bundle.layer, bundle.dropping, bundle.dtype, scaling, bundle.task, bundle.outputs)
        Predictor(changed, Home(home.folder), ask).release(RECORDS)
    Predictor(bundle, Home(home.folder), ask).release(np.where(RECORDS == 0, -0.0, RECORDS))
    assert len(list(home.accountant("test").rows())) == 30


def test_the_limits_hold_and_are_told(run: Path, served: Served, home: Home) -> None:
    (home.folder / "limits.toml").write_text("equations = 0.1\n")
    found = Predictor(run_bundle(run), Home(home.folder), ask(served)).predict(RECORDS)
    sent = found.refused == 0
    assert set(found.refused.tolist()) <= {0, Reason.EQUATIONS} and not sent.all()
    assert np.isnan(found.outputs[~sent]).all() and np.isfinite(found.outputs[sent]).all()
    assert found.why() == {"equations": int((~sent).sum())}
    assert [value is None for value in found.values()] == (~sent).tolist()
    assert len(list(home.accountant("test").rows())) == sent.sum()


def test_predictions_are_the_whole_networks(run: Path, served: Served, home: Home) -> None:
    bundle = run_bundle(run)
    plain = Bundle(bundle.layer, Dropping("none"), "float32", bundle.scaling, bundle.task, bundle.outputs)
    found = Predictor(plain, home, ask(served)).predict(RECORDS)
    x = RECORDS.astype(np.float32)
    cut = bundle.layer.activation(bundle.layer.pre_activations(bundle.layer.initial_weights(), x))
    assert np.allclose(found.outputs, served.trunk(cut).detach().numpy(), atol=1e-5)
    assert found.values() == found.outputs.argmax(axis=1).tolist()


@pytest.mark.parametrize(
    ("records", "told"),
    [
        (RECORDS[:, :5], r"must have shape \(records, 12\), got \(30, 5\)"),
        (RECORDS[0], "must have shape"),
        (RECORDS[:0], "must have shape"),
        (np.where(RECORDS > 2, np.nan, RECORDS), "must be finite"),
        (RECORDS + 1e300, "must be in the model's units"),
        ([["a"] * 12], "must be numbers"),
    ],
)
def test_records_that_cannot_be_are_refused(records: np.ndarray, told: str, run: Path, home: Home) -> None:
    with pytest.raises(DataError, match=told):
        Predictor(run_bundle(run), home, ask).predict(records)
    assert not list(home.accountant("test").rows())


def test_other_units_are_refused(run: Path, home: Home) -> None:
    bundle = run_bundle(run)
    scaled = Bundle(bundle.layer, bundle.dropping, bundle.dtype, SCALED, bundle.task, bundle.outputs)
    with pytest.raises(DataError, match="must be in the model's units, -50 to 50"):
        Predictor(scaled, home, ask).predict(RECORDS * 1000)
    assert np.allclose(SCALED.apply(SCALED.undo(RECORDS.astype(np.float32))), RECORDS, atol=1e-6)


@pytest.mark.parametrize("answer", [np.zeros((29, 3)), np.zeros((30, 2)), np.full((30, 3), np.nan), np.zeros(30)])
def test_an_answer_that_fits_nothing_is_refused(answer: np.ndarray, run: Path, home: Home) -> None:
    with pytest.raises(RunError, match="the answer must be finite numbers"):
        Predictor(run_bundle(run), home, lambda _: answer).predict(RECORDS)


# -------------------------------------------------------------------------------------------------- the service


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    (tmp_path / "tokens").write_text("")
    right = add_token(tmp_path / "tokens", "me")
    TOKEN["Authorization"] = f"Bearer {right}"
    assert right not in (tmp_path / "tokens").read_text()
    assert (tmp_path / "tokens").stat().st_mode & 0o777 == 0o600
    return Tokens(tmp_path / "tokens")


@contextmanager
def listening(app: FastAPI) -> Iterator[httpx.Client]:
    """Serve an application over a socket, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for_port("127.0.0.1", server.config.port)
        with httpx.Client(base_url=f"http://127.0.0.1:{server.config.port}", timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def client(served: Served, tokens: Tokens) -> Iterator[httpx.Client]:
    with listening(service([served], tokens)) as opened:
        yield opened


def query(run: Path, home: Home, count: int = 30) -> bytes:
    return Predictor(run_bundle(run), home, ask).release(RECORDS[:count])[0].to_bytes()


def problem(response: httpx.Response, status: int) -> str:
    found = response.json()
    assert response.status_code == status and response.headers["content-type"] == "application/problem+json"
    assert found["status"] == status and found["request"] == response.headers["x-request-id"]
    return str(found["detail"])


def test_a_service_answers_as_the_trunk_does(client: httpx.Client, served: Served, run: Path, home: Home) -> None:
    payload = query(run, home)
    response = client.post(f"/v1/models/{served.name}/predict", content=payload, headers=TOKEN)
    assert response.status_code == 200
    assert np.allclose(response.json()["outputs"], ask(served)(payload), atol=1e-6)
    assert client.get("/v1/models", headers=TOKEN).json()["models"][0]["name"] == served.name
    counted = client.get("/metrics", headers=TOKEN).text
    assert f'fedsplit_records_total{{model="{served.name}"}} 30.0' in counted
    assert client.get("/healthz").json() == {"status": "ok"}


def test_who_has_no_token_is_refused(client: httpx.Client, served: Served) -> None:
    right = TOKEN["Authorization"]
    for header in ("", right[:-1], right + "x", right.replace("Bearer", "Basic"), "Bearer x y", "Bearer \xff"):
        for ask_for in ("/v1/models", "/metrics", f"/v1/models/{served.name}/predict"):
            call = client.post if ask_for.endswith("predict") else client.get
            assert "bearer token" in problem(call(ask_for, headers={"Authorization": header.encode("latin-1")}), 401)


def test_what_is_no_query_is_told(client: httpx.Client, served: Served, run: Path, home: Home, tmp_path: Path) -> None:
    payload, path = query(run, home), f"/v1/models/{served.name}/predict"

    def post(content: bytes, to: str = path) -> httpx.Response:
        return client.post(to, content=content, headers=TOKEN)

    assert "there is no model 'other' here" in problem(post(payload, "/v1/models/other/predict"), 404)
    assert problem(post(payload, "/v2"), 404)
    assert "too short" in problem(post(b""), 422)
    assert "length is" in problem(post(payload[:-1]), 422)
    assert "version must be" in problem(post(payload[:2] + b"\x09" + payload[3:]), 422)
    assert "bytes" in problem(post(bytes(served.most_bytes + 1)), 413)
    assert "method" in problem(client.get(path, headers=TOKEN), 405).lower()
    other = run_bundle(run)
    other.layer.load_weights({name: w + 1 for name, w in other.layer.initial_weights().items()})
    foreign = Predictor(other, home, ask).release(RECORDS[:1] + 1)[0].to_bytes()
    assert "export the model for the device anew" in problem(post(foreign), 422)
    assert post(payload).status_code == 200  # it is still there


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_body_is_too_strange(
    data: st.DataObject, client: httpx.Client, served: Served, run: Path, home: Home
) -> None:
    """Garbage, and queries in which some bytes were changed: an answer or a refusal, never a mistake."""
    payload = bytearray(query(run, home, 3))
    for _ in range(data.draw(st.integers(0, 6))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(payload)))
    body = data.draw(st.sampled_from([bytes(payload), bytes(payload[:cut]), bytes(payload[cut:])]) | st.binary())
    response = client.post(f"/v1/models/{served.name}/predict", content=body, headers=TOKEN)
    assert response.status_code in (200, 422)


def test_nothing_of_a_query_is_logged(
    client: httpx.Client, served: Served, run: Path, home: Home, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)

    def fails(releases: object) -> None:
        raise ValueError(f"cannot use {7654.25}")

    monkeypatch.setattr(Served, "outputs", lambda self, releases: fails(releases))
    response = client.post(f"/v1/models/{served.name}/predict", content=query(run, home), headers=TOKEN)
    assert problem(response, 500) == "a mistake of this service's"
    assert "7654" not in caplog.text and "7654" not in response.text
    monkeypatch.undo()
    assert client.post(f"/v1/models/{served.name}/predict", content=query(run, home), headers=TOKEN).status_code == 200


def test_a_token_has_its_rate(served: Served, tokens: Tokens) -> None:
    with listening(service([served], tokens, rate=1.0)) as client:
        statuses = [client.get("/v1/models", headers=TOKEN).status_code for _ in range(4)]
        assert statuses == [200, 200, 429, 429]
        assert client.get("/healthz").status_code == 200


def test_two_trunks_need_two_names(served: Served) -> None:
    with pytest.raises(ConfigError, match="have the same first layer"):
        service([served, served], None)


def test_token_files_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokens(path)
    for damage in ("me", "me xx", "\n", "a b c"):
        path.write_text(damage)
        with pytest.raises(ConfigError):
            Tokens(path)
    path.unlink()
    mine, yours = add_token(path, "me"), add_token(path, "you")
    assert [Tokens(path).owner(f"Bearer {t}") for t in (mine, yours, "x")] == ["me", "you", None]
    with pytest.raises(ConfigError, match="has a token of me already"):
        add_token(path, "me")
    with pytest.raises(ConfigError, match="must be one word"):
        add_token(path, "me too")


# ------------------------------------------------------------------------------------------- over the network


def test_a_service_that_is_busy_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([503, 429, "away", 200])

    def handle(request: httpx.Request) -> httpx.Response:
        answer = next(answers)
        if answer == "away":
            raise httpx.ConnectError("refused")
        return httpx.Response(answer, content=iter([b'{"outputs": [[1.0, 2.0]]}']))

    asks = Remote("https://localhost:1", "model", "t", None)
    asks._client = httpx.Client(transport=httpx.MockTransport(handle), base_url="https://localhost:1")
    monkeypatch.setattr(remote, "_PAUSE", 0.0)
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
    asks = Remote("https://localhost:1", "model", "t", None)
    handle = httpx.MockTransport(lambda request: httpx.Response(200, content=iter([answer.encode()])))
    asks._client = httpx.Client(transport=handle, base_url="https://localhost:1")
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
    asks = Remote("https://localhost:1", "model", "t", None)
    content = (b" " * 1000 for _ in range(10**9))
    handle = httpx.MockTransport(lambda request: httpx.Response(200, content=content))
    asks._client = httpx.Client(transport=handle, base_url="https://localhost:1")
    monkeypatch.setattr(remote, "_LARGEST", 100_000)
    with pytest.raises(RunError, match="the answer is too large"):
        asks(b"")


def test_queries_come_back_as_they_were(run: Path, home: Home) -> None:
    payload = query(run, home)
    assert Query.from_bytes(payload).to_bytes() == payload
    for stop in range(0, len(payload), 7):
        with pytest.raises(WireError):
            Query.from_bytes(payload[:stop])


@pytest.mark.slow
def test_predict_and_serve_are_processes(run: Path, tmp_path: Path) -> None:
    """With TLS and a token; what the service gets is what it would offline, and its log holds nothing of it."""

    inherited = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(Path(__file__).parent)}

    def fedsplit(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "fedsplit.cli", *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env={**inherited, **environment}, capture_output=True, text=True,
            timeout=100, check=False,
        )  # fmt: skip

    assert fedsplit("export", run, "--device", "device").returncode == 0
    make_certificates(tmp_path / "certs", ["127.0.0.1"])
    make_certificates(tmp_path / "other", ["127.0.0.1"])
    token = fedsplit("token", "tokens", "me").stdout.strip()
    np.savez(tmp_path / "x.npz", x=RECORDS)
    np.savetxt(tmp_path / "x.csv", RECORDS, delimiter=",")
    Home.create(tmp_path / "home", [0])
    (tmp_path / "home" / "limits.toml").write_text("enforce = false")
    asks = ("predict", "--device", "device", "--home", "home", "--json", "--input")
    offline = fedsplit(*asks, "x.npz", "--offline", run)
    assert offline.returncode == 0, offline.stderr
    port = free_port()
    command = ["serve", str(run), "--certs", "certs", "--tokens", "tokens", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedsplit.cli", *command], cwd=tmp_path, env=inherited, stdout=log, stderr=log
        )
    try:
        wait_for_port("127.0.0.1", port)
        there = ("--server", f"https://127.0.0.1:{port}", "--ca")
        online = fedsplit(*asks, "x.csv", *there, "certs/ca.crt", FEDSPLIT_TOKEN=token)
        assert online.returncode == 0, online.stderr
        found = [json.loads(done.stdout) for done in (offline, online)]
        assert found[0]["predictions"] == found[1]["predictions"] and len(found[0]["predictions"]) == 30
        for ca, secret, told in (("certs", "x", "a bearer token is needed"), ("other", token, "is refused")):
            refused = fedsplit(*asks, "x.npz", *there, f"{ca}/ca.crt", FEDSPLIT_TOKEN=secret)
            assert refused.returncode == 2 and told in refused.stderr and len(refused.stderr.splitlines()) == 2
        busy = fedsplit(*command)
        assert busy.returncode == 2 and "cannot listen on" in busy.stderr
    finally:
        process.terminate()
        assert process.wait(20) in (0, -15)
    text = (tmp_path / "log").read_text()
    assert "serving" in text and "Traceback" not in text
