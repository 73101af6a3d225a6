"""Whatever is sent to a service: an answer or a refusal in the promised form, and no record's number in a refusal."""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
import torch
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from predictions import asking, problem, released
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from torch import nn

from fedsplit.common.errors import WireError
from fedsplit.data import Scaling
from fedsplit.device.bundle import Bundle
from fedsplit.device.home import Home
from fedsplit.model.layer import FirstLayer
from fedsplit.model.tasks import task_of
from fedsplit.release import policies
from fedsplit.service.app import service
from fedsplit.service.served import Served
from fedsplit.service.tokens import Tokens, add_token
from fedsplit.wire.container import pack_arrays
from fedsplit.wire.query import MOST_RECORDS, Query

BODIES = 10_000
CONFORMS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
KIND = 4  # of a query, on the wire
# the first layers hand on what they get, so that these numbers are in the queries, and nothing else is like them
RECORDS = np.array([[3217.25, 5431.75, 7654.25, 6789.5], [4321.5, 0.15625, 8765.25, 2345.75]], dtype=np.float32)
POLICIES = {
    "all": (policies.All(), "float32", 4),
    "few": (policies.TopK(2), "float32", 9),  # a width of no whole bytes
    "half": (policies.Random(0.5), "float16", 4),
    "codes": (policies.Bits(3), "float32", 4),
}
WHOLE = [0, 1, 2, 4, 8, 255, MOST_RECORDS + 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, -1, -201]
REAL = [np.nan, np.inf, -np.inf, -0.0, -1.0, 1e-45, 65504.0, 3e38, -3e38]
DTYPES = ["<f4", "<f2", "<i4", "<i8", "<u1", "<u2", "<u4", "<f8", "<i2"]

Arrays = list[np.ndarray]


@dataclass(frozen=True)
class Model:
    """A model that is served, and an honest query to it."""

    served: Served
    query: bytes


def small_model(number: int, policy: str, home: Home) -> Model:
    dropping, dtype, width = POLICIES[policy]
    torch.manual_seed(number)
    layer = FirstLayer(nn.Linear(4, width, bias=False), nn.ReLU(), (4,))
    layer.load_weights({"weight": np.roll(np.eye(width, 4, dtype=np.float32), number, axis=1)})
    bundle = Bundle(layer, dropping, dtype, Scaling(), task_of("classification"), 3)
    trunk = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    return Model(Served(bundle, trunk, bundle.model), released(bundle, home, RECORDS)[0].to_bytes())


@pytest.fixture
def models(home: Home) -> list[Model]:
    return [small_model(number, policy, home) for number, policy in enumerate(POLICIES)]


class Client:
    """Asks an application in this process, whose own tasks run while it is asked; what it raises, this raises."""

    def __init__(self, app: FastAPI, token: str) -> None:
        self._loop, self._lifespan = asyncio.new_event_loop(), app.router.lifespan_context(app)
        self._await(self._lifespan.__aenter__())
        headers = {"Authorization": f"Bearer {token}"}
        transport = httpx.ASGITransport(app)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://service", headers=headers)

    def _await(self, what: Any) -> Any:
        return self._loop.run_until_complete(what)

    def predict(self, name: str, body: bytes) -> httpx.Response:
        return self._await(self._client.post(f"/v1/models/{name}/predict", content=body))

    def close(self) -> None:
        self._await(self._client.aclose())
        self._await(self._lifespan.__aexit__(None, None, None))
        self._loop.close()


@pytest.fixture
def token(tmp_path: Path) -> str:
    return add_token(tmp_path / "tokens", "me")


@pytest.fixture
def app(models: list[Model], token: str, tmp_path: Path) -> FastAPI:
    return service([model.served for model in models], Tokens(tmp_path / "tokens"))


@pytest.fixture
def client(app: FastAPI, token: str) -> Iterator[Client]:
    client = Client(app, token)
    yield client
    client.close()


# --- other queries ---------------------------------------------------------------------------------------------


def arrays_of(query: bytes) -> Arrays:
    found = Query.from_bytes(query)
    head, _, _, _, *outputs = found.release.arrays()
    return [np.array([found.layer]), head, *outputs]


def other_number(rng: Random, arrays: Arrays) -> None:
    i = rng.randrange(len(arrays))
    if arrays[i].size:
        kind, changed = arrays[i].dtype, arrays[i].flatten()
        with np.errstate(over="ignore"):  # 3e38 is infinity in half precision
            changed[rng.randrange(len(changed))] = np.array(rng.choice(REAL if kind.kind == "f" else WHOLE)).astype(
                kind
            )
        arrays[i] = changed.reshape(arrays[i].shape)


def other_numbers(rng: Random, arrays: Arrays) -> None:
    """All values alike, also so large that the trunk's sums overflow."""
    value = rng.choice(REAL)
    with np.errstate(over="ignore"):
        arrays[:] = [np.full_like(a, np.array(value).astype(a.dtype)) if a.dtype.kind == "f" else a for a in arrays]


def other_dtype(rng: Random, arrays: Arrays) -> None:
    i = rng.randrange(len(arrays))
    arrays[i] = np.zeros(arrays[i].shape, rng.choice(DTYPES))


def other_shape(rng: Random, arrays: Arrays) -> None:
    i = rng.randrange(len(arrays))
    shape = [rng.choice([0, 1, 2, 3, 9]) for _ in range(rng.choice([1, 2]))]
    arrays[i] = np.resize(arrays[i], shape).astype(arrays[i].dtype)


def other_rows(rng: Random, arrays: Arrays) -> None:
    """Of some arrays the first rows alone, or the same ones again and again."""
    count = rng.choice([0, 1, 3, 40, MOST_RECORDS + 1])
    for i in rng.choice([[2], [3], [4], [5], [2, 3], [2, 3, 5], [2, 3, 4, 5]]):
        if i < len(arrays) and len(arrays[i]):
            arrays[i] = arrays[i][np.arange(count) % len(arrays[i])]


def other_arrays(rng: Random, arrays: Arrays) -> None:
    """Two in each other's place, one twice, or one less."""
    i, j, what = rng.randrange(len(arrays)), rng.randrange(len(arrays)), rng.randrange(3)
    if what == 0:
        arrays[i], arrays[j] = arrays[j], arrays[i]
    elif what == 1:
        arrays.insert(j, arrays[i])
    elif len(arrays) > 1:
        del arrays[i]


def flip(rng: Random, body: bytearray) -> None:
    if body:
        body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)


def flip_early(rng: Random, body: bytearray) -> None:
    """In the header or the table of arrays."""
    if body:
        body[rng.randrange(min(52, len(body)))] = rng.choice([0, 1, 2, 3, 4, 8, 127, 128, 255])


def cut(rng: Random, body: bytearray) -> None:
    del body[rng.randint(0, len(body)) :]


def extend(rng: Random, body: bytearray) -> None:
    body += rng.randbytes(rng.randint(1, 20)) * rng.choice([1, 1, 1, 100, 20_000])


def overwrite(rng: Random, body: bytearray) -> None:
    """Four or eight bytes by a number that could be a size, a value or a name."""
    i, size = rng.randint(0, len(body)), rng.choice([4, 8])
    number = rng.choice([*WHOLE, rng.getrandbits(64)]) % 2 ** (8 * size)
    body[i : i + size] = number.to_bytes(size, "little")


def noise(rng: Random, body: bytearray) -> None:
    body[:] = rng.randbytes(rng.randint(0, 200))


CHANGES = [other_number, other_number, other_numbers, other_dtype, other_shape, other_rows, other_arrays]
DAMAGES = [flip, flip, flip_early, cut, extend, overwrite, noise]


def changed(model: Model, changes: list[Any], damages: list[Any], rng: Random) -> bytes:
    """Return a query with other arrays, and then other bytes."""
    arrays = arrays_of(model.query)
    for change in changes:
        change(rng, arrays)
    body = bytearray(pack_arrays(KIND, arrays))
    for damage in damages:
        damage(rng, body)
    return bytes(body)


# --- what is answered ------------------------------------------------------------------------------------------


def expected(served: Served, body: bytes) -> list[list[float]] | None:
    """Return what the trunk makes of a body; None if nothing."""
    if len(body) > served.most_bytes:
        return None
    try:
        outputs = asking(served)(body)
    except WireError:
        return None
    return outputs.tolist() if np.isfinite(outputs).all() else None


def numbers(models: list[Model]) -> set[str]:
    """The records' numbers as they would be written, those that the queries hold, and their bytes."""
    sent = [Query.from_bytes(model.query).release.values() for model in models[:3]]  # the last one's are small levels
    assert np.isin(RECORDS, sent[0]).all()
    written = {str(number) for values in sent for number in values.tolist() if number}
    return written | {pair.tobytes().hex() for pair in RECORDS.reshape(-1, 2)}


@pytest.mark.slow
def test_no_body_is_too_strange(client: Client, models: list[Model], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="fedsplit")  # which an earlier test may have changed
    seen: Counter[int] = Counter()
    forbidden = numbers(models)

    @settings(max_examples=BODIES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        made_by=st.sampled_from(models),
        elsewhere=st.integers(0, 9),
        changes=st.lists(st.sampled_from(CHANGES), max_size=2),
        damages=st.lists(st.sampled_from(DAMAGES), max_size=2),
        seed=st.integers(0, 2**32 - 1),
    )
    def ask(made_by: Model, elsewhere: int, changes: list[Any], damages: list[Any], seed: int) -> None:
        body = changed(made_by, changes, damages, Random(seed))
        model = made_by if elsewhere else models[seed % len(models)]
        response, outputs = client.predict(model.served.name, body), expected(model.served, body)
        seen[response.status_code] += 1
        if outputs is None:
            problem(response, 413 if len(body) > model.served.most_bytes else 422)
            told = f"{response.text} {response.headers}"
            assert not [number for number in forbidden if number in told]
        else:
            assert response.status_code == 200
            assert response.json() == {"model": model.served.name, "outputs": outputs}
            assert f"{Query.from_bytes(body).layer:016x}" == model.served.name

    ask()
    assert seen.total() >= BODIES and all(seen[status] > 50 for status in (200, 413, 422)), seen
    for model in models:  # it is still there
        response = client.predict(model.served.name, model.query)
        assert response.json()["outputs"] == asking(model.served)(model.query).tolist()
    assert caplog.text.count("status 422") == seen[422]
    assert not [number for number in forbidden if number in caplog.text]


# --- what the service says of itself ---------------------------------------------------------------------------


def calls(app: FastAPI) -> dict[str, Any]:
    """Return what makes requests, by the operations of the application's own description."""
    found = [each.ok() for each in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()]
    return {f"{operation.method.upper()} {operation.path}": operation for operation in found}


ROUTES = ["GET /healthz", "GET /metrics", "GET /v1/models", "POST /v1/models/{name}/predict"]


def test_all_routes_are_described(app: FastAPI) -> None:
    assert sorted(calls(app)) == ROUTES


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_answers_as_it_is_described(route: str, app: FastAPI, models: list[Model], token: str) -> None:
    """Requests made from the description, some without a token and some to a model that is there."""
    seen: Counter[int] = Counter()

    # so many that each answer comes, whatever is drawn: with 100 there was once no name that is not there
    @settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(calls(app)[route].as_strategy(), st.booleans(), st.sampled_from([None, *models]))
    def ask(case: Any, allowed: bool, model: Model | None) -> None:
        if "name" in case.path_parameters and model:
            case.path_parameters["name"] = model.served.name
        response = case.call(headers={"Authorization": f"Bearer {token}"} if allowed else {})
        seen[response.status_code] += 1
        case.validate_response(response, checks=CONFORMS)
        if response.status_code != 200:
            assert response.headers["content-type"] == ["application/problem+json"]
            told = response.json()
            assert told["status"] == response.status_code and [told["request"]] == response.headers["x-request-id"]

    ask()
    expected = {"GET /healthz": {200}, "POST /v1/models/{name}/predict": {401, 404, 422}}.get(route, {200, 401})
    assert set(seen) == expected, seen
