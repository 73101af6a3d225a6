"""What tests of the guard are given: a ledger, and a server that is hostile."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from proposals import LAYER, OWNER, Guards

from fedsplit.guard.accountant import ExposureAccountant
from fedsplit.guard.guard import Guard
from fedsplit.guard.limits import Limits
from fedsplit.model.layer import FirstLayer

if TYPE_CHECKING:
    from hostile_server import Server


@pytest.fixture
def guards(tmp_path: Path) -> Guards:
    """Return a function that opens a guard over one and the same ledger, as every exchange does."""
    path = tmp_path / "ledger.npz"
    ExposureAccountant.create(path, OWNER)

    def opened(*, enforce: bool = True, layer: FirstLayer = LAYER, **changes: Any) -> Guard:
        chosen = Limits(**{name.replace("_", "-"): value for name, value in changes.items()})
        return Guard(chosen, ExposureAccountant(path, OWNER), layer, enforce=enforce)

    return opened


@pytest.fixture
def server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[..., "Server"]]:
    """Return a function that starts a hostile server; what it and the logs have heard holds no record's number."""
    from hostile_server import Server, run_settings, said  # which imports from tests/conftest.py

    started: list[Server] = []
    caplog.set_level(logging.DEBUG)

    def start(lines: str = "", *, home: Path | None = None, **changes: Any) -> "Server":
        folder = tmp_path / f"server{len(started)}"
        settings = run_settings(folder, lines, **changes)
        started.append(Server(settings, folder, home))
        return started[-1]

    yield start
    for one in started:
        said(one, *map(logging.Formatter().format, caplog.get_records("call")))
