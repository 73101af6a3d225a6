"""Pages that a service shows beside its answers."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.staticfiles import StaticFiles

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI, name: str, folder: Path) -> None:
    """Serve a folder's files below ``/name/``, with headers that let the page load nothing from elsewhere.

    Parameters
    ----------
    app : FastAPI
    name : str
    folder : Path
        Its ``index.html`` is the page.
    """

    @app.middleware("http")
    async def _careful(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        if request.url.path.startswith(f"/{name}"):
            response.headers.update(_HEADERS)
        return response

    app.mount(f"/{name}", StaticFiles(directory=folder, html=True), name=name)
