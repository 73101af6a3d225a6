"""Records, queries and services that the tests of predictions share."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from fastapi import FastAPI

from fedsplit.common.certs import CERTIFICATE, KEY
from fedsplit.device.bundle import Bundle
from fedsplit.device.home import Home
from fedsplit.device.predictor import Predictor
from fedsplit.service.served import Served
from fedsplit.wire.query import Query
from simulations.shared.network import free_port, wait_for_port

RECORDS = np.random.default_rng(5).normal(size=(30, 12))


def asking(served: Served) -> Callable[[bytes], np.ndarray]:
    """Return what asks a trunk that is here."""
    return lambda payload: served.outputs([served.read(payload)])


def nobody(payload: bytes) -> np.ndarray:
    raise AssertionError("nobody is to be asked")


def released(bundle: Bundle, home: Home, records: Any = RECORDS) -> tuple[Query, list[int]]:
    """Return what leaves a device of some records, and why others do not; another process each time."""
    query, refused = Predictor(bundle, Home(home.folder), nobody).release(records)
    return query, refused.tolist()


@contextmanager
def listening(app: FastAPI, certs: Path | None = None) -> Iterator[str]:
    """Serve an application over a socket, in a thread; yield its address."""
    files = {"ssl_certfile": certs / CERTIFICATE, "ssl_keyfile": certs / KEY} if certs else {}
    # clients in this process keep their connections, and closing these would be waited for; uvicorn's own logging shuts
    # all handlers down, absl's among them, which then closes what pytest captures with
    options = {"log_config": None, "ws": "none", "timeout_graceful_shutdown": 0, **files}
    server = uvicorn.Server(uvicorn.Config(app, port=free_port(), **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for_port("127.0.0.1", server.config.port)
        yield f"http{'s' if certs else ''}://127.0.0.1:{server.config.port}"
    finally:
        server.should_exit = True
        thread.join()


def problem(response: httpx.Response, status: int) -> str:
    """Return the detail of an error, which must be problem+json."""
    found = response.json()
    assert response.status_code == status and response.headers["content-type"] == "application/problem+json"
    assert found["status"] == status and found["request"] == response.headers["x-request-id"]
    return str(found["detail"])
