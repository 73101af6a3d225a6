"""What several tests of data build."""

from typing import Any

from fedsplit.data import (
    Source,
    open_source,
)

SECRET = 7654.25  # a record's value: no error text may hold it


def opened(**settings: Any) -> Source:
    defaults = {key: None for key in ("name", "folder", "builder", "task", "outputs", "count")}
    return open_source(**(defaults | {"test": 1, "partition": "natural", "alpha": 1.0, "seed": 0} | settings))
