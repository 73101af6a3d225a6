import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.config import Settings, check_settings

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

torch.set_num_threads(1)  # tests share the machine, and threads that wait for each other make them many times slower

CONFIGS = Path(__file__).parent.parent / "configs"

_SMALL: dict[str, Any] = {
    "run": {"name": "small", "rounds": 4, "engine": "inline", "seed": 3},
    "data": {"builder": "own:linear", "task": "classification", "outputs": 3},
    "devices": {"count": 5, "test": [3, 4]},
    "model": {"builder": "own:linear_model"},
    "dropping": {"policy": "none"},
    "protocol": {"mode": "pipelined", "dtype": "float32"},
    "first-layer": {"strategy": "FedAvg", "lr": 0.1},
    "trunk": {"optimizer": "sgd", "lr": 0.1},
}


def small_settings(**changes: dict[str, Any]) -> Settings:
    """Return a run over five small devices that takes a moment, with some sections' keys changed."""
    raw = copy.deepcopy(_SMALL)
    for section, values in changes.items():
        raw.setdefault(section.replace("_", "-"), {}).update(values)
    return check_settings(raw)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs the command line, expects exit code 2, and returns the one line on stderr."""

    def run(*arguments: object) -> str:
        command = [sys.executable, "-m", "fedsplit.cli", *map(str, arguments)]
        # a narrow terminal: no line is wrapped
        environment = {**os.environ, "FLWR_HOME": str(tmp_path / "flwr"), "COLUMNS": "40"}
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 2 and done.stdout == "", (done.stdout, done.stderr)
        lines = done.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("fedsplit: "), done.stderr
        assert "Traceback" not in done.stderr
        return lines[0]

    return run
