"""What a study is, and which there are."""

import ast
import re
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Protocol, cast

from simulations.shared.results import Results

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
_FOLDER = Path(__file__).parents[1]
_NO_STUDIES = ("shared", "__main__")


class Study(Protocol):
    """The module of a study."""

    __doc__: str
    Options: type[Any]

    def study(self, options: Any) -> Results:
        """Measure."""

    def tables(self, results: Results) -> str:
        """Return Markdown of what was measured, read from its file."""

    def draw(self, results: Results, path: Path) -> None:
        """Draw what was measured, read from its file; not all studies do."""


def names() -> list[str]:
    """Return the names of all studies, in alphabetical order."""
    return sorted(module.name for module in iter_modules([str(_FOLDER)]) if module.name not in _NO_STUDIES)


def load(name: str) -> Study:
    """Import a study."""
    return cast(Study, import_module(f"simulations.{name}"))


def listing() -> str:
    """Return a line for each study: its name, what it asks, and how long it takes where that is known."""
    wide = max(map(len, names()))
    lines = [f"  {name:{wide}}  {_said(name)}" for name in names()]
    usage = "python -m simulations NAME [--quick] [--tables] [options]     python -m simulations NAME --help"
    return "\n".join([usage, *lines])


def _said(name: str) -> str:
    """Return a study's line, from its docstring: importing them all would take seconds."""
    module = _FOLDER / name / "__init__.py" if (_FOLDER / name).is_dir() else _FOLDER / f"{name}.py"
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    takes = re.search(r"^Takes (.+?)\.$", text, flags=re.MULTILINE)
    return text.partition("\n")[0].removesuffix(".") + (f" ({takes[1]})" if takes else "")
