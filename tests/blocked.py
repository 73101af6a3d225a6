"""Processes in which some packages cannot be imported, as if they were not installed."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

EXTRA = (
    *("flwr", "google.protobuf", "grpc", "ray", "optuna", "matplotlib"),
    *("fastapi", "fastapi_offline", "prometheus_client", "uvicorn", "starlette"),
    *("sklearn", "mlxtend", "onnx", "onnxruntime", "pyarrow", "edfio"),
)
"""What a device does without."""
_HOOK = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == gone or name.startswith(gone + ".") for gone in {packages!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def without(packages: Iterable[str], folder: Path) -> dict[str, str]:
    """Return the environment of a process that starts without some packages; ``folder`` is for the hook."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_HOOK.format(packages=tuple(packages)))
    path = os.pathsep.join([str(folder), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def fedsplit(*arguments: object, env: dict[str, str], cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run the installed command."""
    command = [str(Path(sys.executable).with_name("fedsplit")), *map(str, arguments)]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
