"""A service that listens until it is stopped."""

from collections.abc import Mapping
from typing import Any

import uvicorn
from fastapi import FastAPI

from fedsplit.service.app import MOST_CONNECTIONS


def run(app: FastAPI, host: str, port: int, certificates: Mapping[str, Any]) -> None:
    """Answer requests until the process is told to stop.

    Parameters
    ----------
    app : FastAPI
        That of :func:`fedsplit.service.app.service`.
    host : str
    port : int
    certificates : mapping
        ``ssl_certfile`` and ``ssl_keyfile``; empty for a service without TLS.
    """
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        ws="none",
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=10,
        **certificates,
    )
