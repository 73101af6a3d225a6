"""What goes to a SuperLink with a run."""

import subprocess
import sys
from pathlib import Path

from fedsplit.server.link.runs import own_modules, write_app


def test_own_code_goes_with_the_run(tmp_path: Path) -> None:
    """A module or a package, of several folders the first that has it; what is installed does not, nor fedsplit."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        (folder / "package" / "deep").mkdir(parents=True)
    (here / "module.py").write_text("class A:\n    pass\n")
    (there / "module.py").write_text("raise ValueError\n")
    for name in ("__init__.py", "inner.py", "deep/__init__.py", "__pycache__"):
        path = there / "package" / name
        path.mkdir() if name == "__pycache__" else path.write_text("class B:\n    pass\n")
    (here / "fedsplit").mkdir()
    (here / "fedsplit" / "__init__.py").touch()
    named = ["module:A", "package.inner:B", "package.deep:B", "json:loads", "fedsplit.model.zoo:build_model"]
    found = own_modules(named, [here, there])
    assert found == [here / "module.py", there / "package"]
    app = tmp_path / "app"
    app.mkdir()
    write_app(app, {"settings": "{}"}, found)
    files = {str(path.relative_to(app)) for path in app.rglob("*")}
    assert {"module.py", "package/inner.py", "package/deep/__init__.py"} < files and "package/__pycache__" not in files
    code = "from module import A; from package.inner import B; from package.deep import B"
    subprocess.run([sys.executable, "-c", code], cwd=app, check=True)
