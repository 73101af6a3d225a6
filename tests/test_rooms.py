"""The house keeps its plan: who may import whom, what stands in the root, and how large a module may be."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fedsplit"
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
FLOORS, SEAL, FLOWER, RAY, WEB, SETTINGS = (contract["name"] for contract in CONTRACTS)
VIOLATIONS = [
    ("device/home.py", "import fedsplit.server.rounds", FLOORS),
    ("server/roster.py", "import fedsplit.device.home", FLOORS),
    ("audit/scores.py", "import fedsplit.device.home", FLOORS),
    ("wire/coding.py", "import fedsplit.guard.guard", FLOORS),
    ("common/seeds.py", "import fedsplit.data", FLOORS),
    ("device/node.py", "from fedsplit.release.seal import SEAL", SEAL),
    ("device/predictor.py", "import flwr", FLOWER),
    ("server/trunk.py", "import flwr.app", FLOWER),
    ("runs/training.py", "import ray", RAY),
    ("device/remote.py", "import fastapi", WEB),
    ("runs/folder.py", "import starlette.routing", WEB),
    ("server/trunk.py", "import fedsplit.plan.settings", SETTINGS),
    ("device/node.py", "import fedsplit.plan.settings", SETTINGS),
]


def broken(root: Path) -> tuple[int, set[str]]:
    """Run the linter on a tree; return its exit code and the contracts that are broken."""
    script = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([script, "--no-cache"], cwd=root, capture_output=True, text=True, timeout=120, check=False)
    words = " ".join(done.stdout.split())  # names are wrapped
    return done.returncode, {c["name"] for c in CONTRACTS if f"{c['name']} BROKEN" in words}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "fedsplit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contracts_hold(tree: Path) -> None:
    assert broken(tree) == (0, set())


@pytest.mark.parametrize(("module", "line", "contract"), VIOLATIONS)
def test_a_violation_breaks_its_contract(tree: Path, module: str, line: str, contract: str) -> None:
    path = tree / "fedsplit" / module
    path.write_text(f"{path.read_text()}\n{line}\n")
    code, names = broken(tree)
    assert code == 1 and contract in names


def test_a_new_room_needs_a_floor(tree: Path) -> None:
    (tree / "fedsplit" / "attic").mkdir()
    (tree / "fedsplit" / "attic" / "__init__.py").write_text('"""A room that is in no plan."""\n')
    assert broken(tree)[0] == 1


def test_the_root_holds_the_facade_and_addresses_alone() -> None:
    assert sorted(path.name for path in PACKAGE.glob("*.py")) == ["__init__.py", "client_app.py", "server_app.py"]


def test_no_module_is_too_long() -> None:
    lengths = {str(p.relative_to(PACKAGE)): len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > 350} == {}


def test_no_test_file_is_too_long() -> None:
    tests = ROOT / "tests"
    lengths = {str(p.relative_to(tests)): len(p.read_text().splitlines()) for p in tests.rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
