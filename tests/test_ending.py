"""The tests' own end: a run of them ends with a failure, whatever dies."""

import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DIES = "os.kill(os.getpid(), signal.SIGKILL)"
HANGS = """signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ctypes.PyDLL(None).sleep(1000)  # with the interpreter's lock"""


@pytest.mark.slow
@pytest.mark.parametrize("body", [DIES, HANGS], ids=["dies", "hangs"])
def test_a_run_ends_within_a_minute_of_a_process_that_dies(tmp_path: Path, body: str) -> None:
    options = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    kept = {key: options[key] for key in ("addopts", "faulthandler_exit_on_timeout")}
    lines = [f"{key} = {value}" for key, value in {**kept, "faulthandler_timeout": 2}.items()]
    (tmp_path / "pytest.ini").write_text("\n".join(["[pytest]", *lines]))
    (tmp_path / "conftest.py").symlink_to(TESTS / "conftest.py")
    imports = "import ctypes\nimport os\nimport signal\nfrom pathlib import Path"
    (tmp_path / "test_bad.py").write_text(f"{imports}\n\n\ndef test_bad():\n    Path('began').touch()\n    {body}\n")
    many = "@pytest.mark.parametrize('i', range(1000))\ndef test_busy(i):\n    time.sleep(0.5)\n"
    (tmp_path / "test_busy.py").write_text(f"import time\nimport pytest\n\n\n{many}")
    command = [sys.executable, "-m", "pytest"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert time.time() - (tmp_path / "began").stat().st_mtime < 60
    assert ended.returncode == 1 and "the process of test_bad.py::test_bad died" in ended.stdout, ended
