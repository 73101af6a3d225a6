"""The README's commands stay true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [block.strip() for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S)]
BIN = Path(sys.executable).parent


def test_the_two_commands_stand_first_and_install_alike() -> None:
    train, test = BLOCKS[:2]
    assert re.fullmatch(
        r'python3 -m venv \.venv && \.venv/bin/pip install "\.\[data\]" && \.venv/bin/fedsplit .*', train
    )
    assert test == 'python3 -m venv .venv && .venv/bin/pip install ".[data,dev]" && .venv/bin/pytest'
    assert 'pip" install --quiet ".[data,dev]"' in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_first_command_trains_on_ray(tmp_path: Path) -> None:
    command = BLOCKS[0].split("&&")[-1].strip().removeprefix(".venv/bin/").split()
    done = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=_copy(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"exposures_max \(training records\)\W+1\W", done.stdout)
    accuracy = float(re.search(r"test_accuracy\W+([\d.]+)", done.stdout).group(1))
    assert accuracy > 0.7


@pytest.mark.slow
def test_the_override_example_runs(tmp_path: Path) -> None:
    command = next(b for b in BLOCKS if b.startswith("fedsplit simulate configs/digits.toml")).split()
    done = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=_copy(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"test_accuracy"' in done.stdout


def _copy(folder: Path) -> Path:
    """Give a command the shipped settings in a folder of its own, where its runs/ may stay."""
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


def test_the_readme_stays_short_and_says_the_rest_elsewhere() -> None:
    assert len(README.splitlines()) <= 150
    assert re.search(r"!\[[^]]+\]\(docs/images/[\w-]+\.(svg|png)\)", README)


def test_every_file_the_readme_names_exists() -> None:
    for name in set(re.findall(r"`((?:configs|fedsplit|simulations|tests)/[\w./-]*)`", README)):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / name).exists(), name
