"""Docstrings: functions of three or more arguments say what they are, and examples run."""

import ast
import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = Path(__file__).parents[2] / "fedsplit"
MANY = 3
OPEN = ("cli", "flower", "release", "runs", "server", "service", "tuning")
"""Rooms whose functions are still to be documented; nothing is added here, and a room that is done is taken out."""
DONE = sorted({path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} - set(OPEN))
WITH_EXAMPLES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


def undocumented(source: str) -> Iterator[str]:
    """Yield the public functions of three or more arguments that have no section ``Parameters``."""

    def walk(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
        for child in node.body:
            if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                yield from walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
                arguments = child.args.posonlyargs + child.args.args + child.args.kwonlyargs
                named = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
                said = "Parameters\n----------" in (ast.get_docstring(child) or "")
                if len(named) >= MANY and not said:
                    yield f"{prefix}{child.name}"

    return walk(ast.parse(source), "")


@pytest.mark.parametrize("room", DONE)
def test_functions_of_many_arguments_say_what_they_are(room: str) -> None:
    missing = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in sorted((PACKAGE / room).rglob("*.py"))
        for name in undocumented(path.read_text(encoding="utf-8"))
    ]
    assert not missing


def test_what_is_missing_is_found() -> None:
    source = '''
class Public:
    def many(self, a, b, c):
        """Do."""
    def said(self, a, b, c):
        """Do.

        Parameters
        ----------
        a, b, c : int
        """
    def few(self, a, b):
        """Do."""
class _Private:
    def many(self, a, b, c):
        """Do."""
'''
    assert list(undocumented(source)) == ["Public.many"]


def test_all_rooms_that_are_left_open_are_there() -> None:
    assert {"common", "data", "wire", "audit", "guard"} <= set(DONE)
    assert all((PACKAGE / room).is_dir() for room in OPEN)


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_run(path: Path) -> None:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    module: ModuleType = importlib.import_module(name.removesuffix(".__init__"))
    failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried and not failed
