import copy
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.cli import main
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
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Return a function that runs the command line, expects exit code 2, and returns the one line on stderr.

    In this process: a new one imports torch for seconds. ``test_cli.py`` has real ones.
    """
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    loggers = {name: logging.getLogger(name) for name in ("fedsplit", "flwr")}
    before = {name: (logger.level, logger.handlers) for name, logger in loggers.items()}

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["fedsplit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert ended.value.code == 2 and said.out == "", said
        lines = said.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("fedsplit: "), said.err
        return lines[0]

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name, (level, kept) in before.items():
        loggers[name].setLevel(level)
        loggers[name].handlers = kept
