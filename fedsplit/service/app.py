"""The server's side of a prediction: trunks behind HTTP. It sees what dropping left of records, and logs none of it.

One endpoint takes a packed :class:`fedsplit.wire.query.Query` and returns the trunk's outputs. Requests that arrive
while the trunk is busy are answered together. Errors are problem+json (RFC 9457).
"""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedsplit.common.arrays import FloatArray
from fedsplit.common.errors import ConfigError, WireError
from fedsplit.service.served import Served
from fedsplit.service.tokens import Tokens

log = logging.getLogger(__name__)
MOST_CONNECTIONS = 1024
TOKEN: dict[str, Any] = {"security": [{"token": []}]}  # how the documentation says that one is needed
_SLOW = 30.0  # seconds in which a request's body must be there
_BRIEF = 0.005  # seconds; for less, a thread costs more than it saves: they would wait for each other
_MOST_HELD = 2**25  # bytes of all requests' bodies together, which take up to eight times as much when they are read


class _Together:
    """Answers what has come for a model while its trunk was busy, in one go."""

    def __init__(self, model: Served, pool: ThreadPoolExecutor, size: Histogram) -> None:
        self._model, self._pool, self._size = model, pool, size
        self._pace = math.inf  # seconds that the last ones took, a byte
        self._waiting: asyncio.Queue[tuple[bytes, asyncio.Future[FloatArray]]] = asyncio.Queue()

    async def ask(self, payload: bytes) -> FloatArray:
        """Return the outputs for one query; raises WireError if it is none."""
        future: asyncio.Future[FloatArray] = asyncio.get_running_loop().create_future()
        await self._waiting.put((payload, future))
        return await future

    async def run(self) -> None:
        """Answer until cancelled."""
        while True:
            taken = [await self._waiting.get()]
            await asyncio.sleep(0)  # what came in the same moment
            size = len(taken[0][0])
            while not self._waiting.empty() and size < self._model.most_bytes:  # the last one may go beyond it
                taken.append(self._waiting.get_nowait())
                size += len(taken[-1][0])
            found = await self._answers([payload for payload, _ in taken])
            self._size.observe(sum(len(part) for part in found if not isinstance(part, Exception)))
            for (_, future), part in zip(taken, found, strict=True):
                if future.done():  # who asked is gone
                    continue
                if isinstance(part, Exception):
                    future.set_exception(part)
                else:
                    future.set_result(part)

    async def _answers(self, payloads: Sequence[bytes]) -> Sequence[FloatArray | Exception]:
        """Return what the model makes of payloads: on the spot if that is brief, else beside what else goes on."""
        size = 1 + sum(map(len, payloads))

        def work() -> Sequence[FloatArray | Exception]:
            began = time.thread_time()
            try:
                return self._model.answers(payloads)
            except Exception as error:
                return [error] * len(payloads)
            finally:
                self._pace = (time.thread_time() - began) / size

        if self._pace * size < _BRIEF:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


@dataclass(frozen=True)
class _Metrics:
    registry: CollectorRegistry
    requests: Counter
    records: Counter
    seconds: Histogram
    together: Histogram

    @classmethod
    def new(cls) -> "_Metrics":
        registry = CollectorRegistry()
        return cls(
            registry,
            Counter("fedsplit_requests", "Requests by HTTP status.", ["status"], registry=registry),
            Counter("fedsplit_records", "Records predicted.", ["model"], registry=registry),
            Histogram("fedsplit_request_seconds", "Time to answer.", registry=registry),
            Histogram(
                "fedsplit_records_together",
                "Records that went through a trunk at once.",
                buckets=[4**n for n in range(7)],
                registry=registry,
            ),
        )


class _Watch:
    """Names, counts and logs every request, and answers for those that fail.

    Plain ASGI: Starlette's middleware of functions starts tasks for each request, which took a third of its time.
    """

    def __init__(self, app: ASGIApp, metrics: _Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, began, status = Request(scope), time.perf_counter(), 0
        name = request.state.id = secrets.token_hex(8)

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", name.encode()))
            await send(message)

        try:
            await self._app(scope, receive, named)
        except ClientDisconnect:
            await problem(request, 400, "the body ended early")(scope, receive, named)
        except Exception as error:  # its text could hold anything: it goes no further
            log.error("request %s: %s", name, type(error).__name__)
            if not status:
                await problem(request, 500, "a mistake of this service's")(scope, receive, named)
        seconds = time.perf_counter() - began
        self._metrics.requests.labels(status).inc()
        self._metrics.seconds.observe(seconds)
        log.info("request %s: status %d in %.4f s", name, status, seconds)


def service(models: Sequence[Served], tokens: Tokens | None, *, rate: float = 0.0) -> FastAPI:
    """Return the application.

    Parameters
    ----------
    models : sequence of Served
        With different names.
    tokens : Tokens or None
        Without, everybody may ask.
    rate : float
        Requests a second that one token may make, in bursts of twice as many; 0: any number.

    Raises
    ------
    ConfigError
        If two models have the same name.
    """
    by_name = {model.name: model for model in models}
    if len(by_name) < len(models):
        raise ConfigError("two of the runs have the same first layer: one name cannot stand for two trunks")
    metrics, buckets = _Metrics.new(), _Rates(rate)
    together: dict[str, _Together] = {}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with ThreadPoolExecutor(max_workers=1) as pool:
            together.update({name: _Together(model, pool, metrics.together) for name, model in by_name.items()})
            running = [asyncio.create_task(each.run()) for each in together.values()]
            yield
            for task in running:
                task.cancel()

    # the documentation's page comes from here, not from elsewhere
    app = FastAPIOffline(title="fedsplit", version="1", lifespan=lifespan, redoc_url=None)
    app.add_middleware(_Watch, metrics=metrics)

    @app.exception_handler(HTTPException)
    async def _problem(request: Request, error: HTTPException) -> Response:
        return problem(request, error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        where = ", ".join(".".join(map(str, found["loc"])) for found in error.errors())  # not what was given
        return problem(request, 422, f"not valid: {where}")

    def let_in(request: Request) -> str:
        given = request.headers.get("authorization", "")
        owner = tokens.owner(given) if tokens else ""
        if owner is None:
            said = "this bearer token is not known here" if given else "a bearer token is needed"
            raise HTTPException(401, said, {"WWW-Authenticate": "Bearer"})
        if not buckets.take(owner):
            raise HTTPException(429, f"more than {rate:g} requests a second", {"Retry-After": "1"})
        return owner

    app.state.let_in, app.state.bodies = let_in, _Bodies()

    asked = problems(401, 429)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the service is there."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse, responses=asked, openapi_extra=TOKEN)
    async def prometheus(request: Request) -> str:
        """Counts for Prometheus."""
        let_in(request)
        return generate_latest(metrics.registry).decode()

    @app.get("/v1/models", responses=asked, openapi_extra=TOKEN)
    async def names(request: Request) -> dict[str, list[dict[str, Any]]]:
        """The models that are served."""
        let_in(request)
        return {"models": [model.facts for model in models]}

    plain = app.openapi

    def described() -> dict[str, Any]:
        found = plain()
        found.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        return found

    app.openapi = described  # type: ignore[method-assign]
    body = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}

    @app.post(
        "/v1/models/{name}/predict",
        openapi_extra={"requestBody": {"required": True, **body}, **TOKEN},
        responses=problems(400, 401, 404, 408, 413, 422, 429, 503),
    )
    async def predict(name: str, request: Request) -> Response:
        """Return the trunk's outputs for a packed query."""
        let_in(request)
        model = by_name.get(name)
        if model is None:
            raise HTTPException(404, f"there is no model {name[:64]!r} here")
        if model.detector is not None:  # its outputs stand for training devices' recordings
            raise HTTPException(422, f"model {name!r} watches devices: see fedsplit monitor")
        async with body_of(request, model) as payload:
            try:
                outputs = await together[name].ask(payload)
            except WireError as error:
                raise HTTPException(422, str(error)) from None
        if not np.isfinite(outputs).all():
            raise HTTPException(422, "values give no finite outputs")
        metrics.records.labels(name).inc(len(outputs))
        return JSONResponse({"model": name, "outputs": outputs.tolist()})

    return app


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return how the documentation describes errors of some HTTP statuses."""
    text = {"type": "string"}
    fields = {"type": text, "title": text, "status": {"type": "integer"}, "detail": text, "request": text}
    schema = {"type": "object", "required": list(fields), "properties": fields}
    content = {"application/problem+json": {"schema": schema}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def problem(request: Request, status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return an error as problem+json (RFC 9457).

    Parameters
    ----------
    request : Request
    status, detail, headers : int, str, mapping or None
        Of the response; ``detail`` is for people.
    """
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return JSONResponse(
        {**content, "request": request.state.id},
        status_code=status,
        headers=dict(headers or {}),
        media_type="application/problem+json",
    )


@asynccontextmanager
async def body_of(request: Request, model: Served) -> AsyncIterator[bytes]:
    """Read a request's body, and hold room for it as long as it is worked on; raises HTTPException."""
    bodies: _Bodies = request.app.state.bodies
    try:
        try:
            async with asyncio.timeout(_SLOW):
                payload = await bodies.read(request, model.most_bytes)
        except TimeoutError:
            raise HTTPException(408, f"the body must be here within {_SLOW:g} s") from None
        yield payload
    finally:
        bodies.forget(request)


class _Bodies:
    """The requests' bodies that are held at a time, and no more of them than there is room for."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}

    async def read(self, request: Request, most: int) -> bytes:
        """Return a body of at most ``most`` bytes."""
        parts: list[bytes] = []
        name = request.state.id
        self._held[name] = 0
        async for part in request.stream():
            self._held[name] += len(part)
            if self._held[name] > most:
                raise HTTPException(413, f"at most {most} bytes")
            if sum(self._held.values()) > max(_MOST_HELD, most):
                raise HTTPException(503, "too many bodies at once", {"Retry-After": "1"})
            parts.append(part)
        return b"".join(parts)

    def forget(self, request: Request) -> None:
        """Give a body's room back."""
        self._held.pop(request.state.id, None)


class _Rates:
    """A bucket of requests for each token, which fills up with time."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, owner: str) -> bool:
        """Whether there is room for one more."""
        if not self._rate:
            return True
        most, now = max(1.0, 2 * self._rate), time.monotonic()
        left, before = self._left.get(owner, (most, now))
        left = min(most, left + (now - before) * self._rate)
        self._left[owner] = (left - (left >= 1), now)
        return left >= 1
