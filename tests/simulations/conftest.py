"""Studies say how much is logged; other tests of the process listen."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def as_loud_as_before() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in ("flwr", "fedsplit")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
