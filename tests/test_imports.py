"""What is loaded for what: a device loads nothing of a server, and commands only what they need."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from blocked import EXTRA, fedsplit, without

from fedsplit.device.home import Home
from fedsplit.runs.folder import run_bundle

pytestmark = pytest.mark.slow  # starts processes

PACKAGE = Path(__file__).parents[1] / "fedsplit"
DEVICES = ("common", "data", "model", "release", "wire", "guard", "device")
OTHERS = ("server", "runs", "plan.settings", "audit", "service", "tuning", "cli", "flower")


def modules(room: str) -> list[str]:
    """The names of a room's modules, the link over Flower left out."""
    paths = [path.relative_to(PACKAGE.parent).with_suffix("") for path in (PACKAGE / room).rglob("*.py")]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    return sorted(name for name in names if not name.startswith("fedsplit.device.link."))


def loaded(code: str) -> set[str]:
    """The modules that a new process has loaded after some code."""
    said = f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def within(found: set[str], packages: tuple[str, ...]) -> list[str]:
    return sorted(name for name in found for package in packages if f"{name}.".startswith(f"{package}."))


def test_a_device_loads_nothing_of_the_server() -> None:
    found = loaded("\n".join(f"import {name}" for room in DEVICES for name in modules(room)))
    assert "fedsplit.device.nodes" in found and "fedsplit.guard.guard" in found  # it has looked
    assert within(found, tuple(f"fedsplit.{room}" for room in OTHERS)) == []
    assert within(found, EXTRA) == []


def test_a_module_that_is_loaded_is_found() -> None:
    found = loaded("import fedsplit.device.home, fedsplit.server.roster")
    assert within(found, tuple(f"fedsplit.{room}" for room in OTHERS))
    assert "flwr.app" in within(found, EXTRA)


HELP = """
import sys
from fedsplit.cli.main import main
sys.argv = ["fedsplit", *{!r}]
try: main()
except SystemExit: pass
"""


@pytest.mark.parametrize("command", [["--help"], ["node", "--help"], ["serve", "--help"]])
def test_help_loads_neither_torch_nor_flower(command: list[str]) -> None:
    found = loaded(HELP.format(command))
    assert "fedsplit.cli.main" in found and within(found, ("torch", "numpy", *EXTRA)) == []


@pytest.fixture
def device(trained: Path, tmp_path: Path) -> Path:
    """A folder with what a device has that asks for predictions."""
    run_bundle(trained).save(tmp_path / "device")
    home = Home.create(tmp_path / "home", [3])
    (home.folder / "limits.toml").write_text("equations = 1.0\nleverage = 1.0\nactive = 1.0\n")
    np.save(tmp_path / "x.npy", np.random.default_rng(3).normal(size=(4, 12)))
    return tmp_path


PREDICT = ("predict", "--device", "device", "--home", "home", "--json", "--input")
MONITOR = ("monitor", "x.npy", "--device", "device", "--home", "home", "--name", "x", "--server", "http://127.0.0.1:9")


def test_predictions_need_no_extra(device: Path, trained: Path) -> None:
    env = without(EXTRA, device / "hook")
    done = fedsplit(*PREDICT, "x.npy", "--offline", trained, env=env, cwd=device)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["predictions"]) == 4


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ((*PREDICT, "x.npy"), "give either --server or --offline"),
        ((*PREDICT, "gone.npy", "--server", "http://127.0.0.1:9", "--insecure"), "input gone.npy cannot be read"),
        ((*PREDICT, "x.npy", "--server", "http://127.0.0.1:9", "--insecure"), "does not answer"),
        ((*PREDICT, "x.npy", "--server", "http://127.0.0.1:9"), "--server must be https://HOST:PORT"),
        ((*MONITOR, "--insecure"), "predicts: see fedsplit predict"),
        (("node", "ledger", "gone"), "is missing"),
    ],
)
def test_refusals_of_a_device_need_no_extra(command: tuple[str, ...], said: str, device: Path) -> None:
    done = fedsplit(*command, env=without(EXTRA, device / "hook"), cwd=device)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
