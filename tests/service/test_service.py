"""The server's side of a prediction: what it answers, to whom, what it refuses, and that it logs nothing of a query."""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from predictions import RECORDS, asking, listening, problem, released

from fedsplit.common.errors import ConfigError, WireError
from fedsplit.device.home import Home
from fedsplit.runs.folder import run_bundle
from fedsplit.service.app import service
from fedsplit.service.served import Served
from fedsplit.service.tokens import Tokens, add_token
from fedsplit.wire.query import Query


@pytest.fixture
def token(tmp_path: Path) -> str:
    return add_token(tmp_path / "tokens", "me")


@pytest.fixture
def tokens(token: str, tmp_path: Path) -> Tokens:
    return Tokens(tmp_path / "tokens")


@contextmanager
def opened(app: FastAPI, token: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {token}"}
    with listening(app) as url, httpx.Client(base_url=url, headers=headers, timeout=30) as client:
        yield client


@pytest.fixture
def client(served: Served, tokens: Tokens, token: str) -> Iterator[httpx.Client]:
    with opened(service([served], tokens), token) as client:
        yield client


@pytest.fixture
def query(trained: Path, home: Home) -> bytes:
    return released(run_bundle(trained), home)[0].to_bytes()


def test_a_service_answers_as_the_trunk_does(client: httpx.Client, served: Served, query: bytes) -> None:
    response = client.post(f"/v1/models/{served.name}/predict", content=query)
    assert response.status_code == 200
    assert np.allclose(response.json()["outputs"], asking(served)(query), atol=1e-6)
    assert client.get("/v1/models").json()["models"][0]["name"] == served.name
    counted = client.get("/metrics").text
    assert f'fedsplit_records_total{{model="{served.name}"}} 30.0' in counted
    assert client.get("/healthz", headers={"Authorization": ""}).json() == {"status": "ok"}


def test_each_of_many_gets_its_own_answer(served: Served, trained: Path, home: Home) -> None:
    """Those that are alike at once, and among others those that are none, which hold nobody up."""
    queries = [released(run_bundle(trained), home, RECORDS[i : i + 1])[0].to_bytes() for i in range(6)]
    several = released(run_bundle(trained), home, RECORDS[10:13])[0].to_bytes()
    alone = [asking(served)(query) for query in queries]
    alike = served.answers(queries)
    assert all(np.allclose(found, expected, atol=1e-6) for found, expected in zip(alike, alone, strict=True))
    broken = queries[1][:-2] + b"\xff\x7f"  # an exponent that nothing fits
    mixed = served.answers([queries[0], broken, several, b"", queries[2]])
    assert isinstance(mixed[1], WireError) and isinstance(mixed[3], WireError)
    assert np.allclose(mixed[0], alone[0], atol=1e-6) and np.allclose(mixed[4], alone[2], atol=1e-6)
    assert np.allclose(mixed[2], asking(served)(several), atol=1e-6)
    assert all(isinstance(why, WireError) for why in served.answers([b"", broken]))


def test_work_that_is_not_brief_holds_nothing_else_up(
    served: Served, tokens: Tokens, token: str, query: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on in a thread; brief work is done where the requests are, after a first time."""
    answers, took, where = Served.answers, [0.0], []

    def slow(self: Served, payloads: Sequence[bytes]) -> Any:
        where.append(threading.current_thread())
        until = time.thread_time() + took[0]
        while time.thread_time() < until:
            pass
        return answers(self, payloads)

    monkeypatch.setattr(Served, "answers", slow)
    with opened(service([served], tokens), token) as client:
        for took[0] in (0.0, 0.0, 0.1, 0.1):
            assert client.post(f"/v1/models/{served.name}/predict", content=query).status_code == 200
    beside, here, unexpected, again = where
    assert here is unexpected is not beside and again is beside


def test_bodies_have_no_more_room_than_there_is(served: Served, tokens: Tokens, token: str, query: bytes) -> None:
    app, path = service([served], tokens), f"/v1/models/{served.name}/predict"
    with opened(app, token) as client:
        app.state.bodies._held["of others"] = 2**25
        assert problem(client.post(path, content=query), 503) == "too many bodies at once"
        del app.state.bodies._held["of others"]
        assert client.post(path, content=query).status_code == 200
        assert app.state.bodies._held == {}


def test_who_has_no_token_is_refused(client: httpx.Client, served: Served) -> None:
    right = client.headers["Authorization"]
    for header in ("", right[:-1], right + "x", right.replace("Bearer", "Basic"), "Bearer x y", "Bearer \xff"):
        for ask_for in ("/v1/models", "/metrics", f"/v1/models/{served.name}/predict"):
            call = client.post if ask_for.endswith("predict") else client.get
            assert "bearer token" in problem(call(ask_for, headers={"Authorization": header.encode("latin-1")}), 401)


def test_what_is_no_query_is_told(
    client: httpx.Client, served: Served, query: bytes, trained: Path, home: Home
) -> None:
    path = f"/v1/models/{served.name}/predict"

    def post(content: bytes, to: str = path) -> httpx.Response:
        return client.post(to, content=content)

    assert "there is no model 'other' here" in problem(post(query, "/v1/models/other/predict"), 404)
    assert problem(post(query, "/v2"), 404)
    assert "too short" in problem(post(b""), 422)
    assert "length is" in problem(post(query[:-1]), 422)
    assert "version must be" in problem(post(query[:2] + b"\x09" + query[3:]), 422)
    assert "bytes" in problem(post(bytes(served.most_bytes + 1)), 413)
    assert "method" in problem(client.get(path), 405).lower()
    other = run_bundle(trained)
    other.layer.load_weights({name: w + 1 for name, w in other.layer.initial_weights().items()})
    foreign = released(other, home, RECORDS[:1] + 1)[0].to_bytes()
    assert "export the model for the device anew" in problem(post(foreign), 422)
    assert post(query).status_code == 200  # it is still there


def test_nothing_of_a_query_is_logged(
    client: httpx.Client,
    served: Served,
    query: bytes,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="fedsplit")  # which an earlier test may have changed

    def fails(releases: object) -> None:
        raise ValueError(f"cannot use {7654.25}")

    monkeypatch.setattr(Served, "outputs", lambda self, releases: fails(releases))
    response = client.post(f"/v1/models/{served.name}/predict", content=query)
    assert problem(response, 500) == "a mistake of this service's"
    assert "7654" not in caplog.text and "7654" not in response.text
    monkeypatch.undo()
    assert client.post(f"/v1/models/{served.name}/predict", content=query).status_code == 200


def test_a_token_has_its_rate(served: Served, tokens: Tokens, token: str) -> None:
    with opened(service([served], tokens, rate=1.0), token) as client:
        statuses = [client.get("/v1/models").status_code for _ in range(4)]
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
    path.write_text("")
    mine, yours = add_token(path, "me"), add_token(path, "you")
    assert mine not in path.read_text() and path.stat().st_mode & 0o777 == 0o600
    assert [Tokens(path).owner(f"Bearer {t}") for t in (mine, yours, "x")] == ["me", "you", None]
    with pytest.raises(ConfigError, match="has a token of me already"):
        add_token(path, "me")
    with pytest.raises(ConfigError, match="must be one word"):
        add_token(path, "me too")


def test_queries_come_back_as_they_were(query: bytes) -> None:
    assert Query.from_bytes(query).to_bytes() == query
    for stop in range(0, len(query), 7):
        with pytest.raises(WireError):
            Query.from_bytes(query[:stop])
