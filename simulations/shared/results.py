"""Where results are: one JSON file of each study, and another one of its quick run."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fedsplit.common.errors import DataError

Results = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results"


def path(name: str, quick: bool, suffix: str = ".json") -> Path:
    """Return the path of a study's results; ``quick`` ones never take the place of full ones."""
    return RESULTS / f"{name}{'-quick' if quick else ''}{suffix}"


def write(name: str, quick: bool, results: Results) -> None:
    """Write a study's results."""
    file = path(name, quick)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1, default=_plain) + "\n", encoding="utf-8")


def read(name: str, quick: bool) -> Results:
    """Read a study's results; raises DataError if there are none."""
    try:
        found: Results = json.loads(path(name, quick).read_text(encoding="utf-8"))
    except FileNotFoundError:
        command = f"python -m simulations {name}{' --quick' if quick else ''}"
        raise DataError(f"there is no {path(name, quick)}: run {command} first") from None
    return found


def _plain(value: Any) -> Any:
    """Return what JSON knows in place of a path or of what numpy has."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
