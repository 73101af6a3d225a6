"""The site builds without a warning or the network, and says of every setting and command what it means."""

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fedsplit_site", ROOT / "docs" / "site.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """Strictly: a dead link or anchor, a page that the navigation leaves out, a parameter that is not there."""
    nowhere = {"NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **nowhere},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr, built.stderr
    page = (tmp_path / "reference" / "release" / "index.html").read_text(encoding="utf-8")
    assert 'id="fedsplit.release.streams.keystream"' in page
    elsewhere = [path for path in tmp_path.rglob("*.html") if "fonts.googleapis" in path.read_text(encoding="utf-8")]
    assert not elsewhere


def test_every_setting_has_a_meaning(site: ModuleType) -> None:
    rows = [line.split(" | ") for line in site.settings_page().splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    assert not [row[0] for row in rows if not row[-1].strip(" |")]
    page = site.settings_page()
    assert "| `over-sampling` | number ≥ 1, ≤ 10 | `1.0` |" in page
    assert "## `[devices.profile]`" in page and ":func:" not in page


def test_every_command_is_there(site: ModuleType) -> None:
    page = site.commands_page()
    for command in ("simulate", "audit", "node init", "node start", "server register", "windows", "tune"):
        assert f"## `fedsplit {command}`" in page
    assert "| `--fail-above FLOAT` | Exit with 1" in page


def test_the_house_is_the_one_that_the_linter_keeps() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    page = (ROOT / "docs" / "design" / "house.md").read_text(encoding="utf-8")
    floors: dict[int, set[str]] = {}
    for line in page.splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        if cells[0].isdigit():
            floors.setdefault(int(cells[0]), set()).add(cells[1])
    kept = [set(layer.replace("|", ":").replace(" ", "").split(":")) for layer in reversed(layers)]
    assert [floors[floor] for floor in sorted(floors)] == kept
    picture = (ROOT / "docs" / "images" / "house.svg").read_text(encoding="utf-8")
    assert all(f">{room}</text>" in picture for layer in kept for room in layer)
