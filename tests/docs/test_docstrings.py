"""Docstrings: functions of three or more arguments say what they are, and examples run."""

import ast
import doctest
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
import typer

from fedsplit.cli.main import cli

PACKAGE = Path(__file__).parents[2] / "fedsplit"
MANY = 3
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists())
WITH_EXAMPLES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


def typer_commands(app: typer.Typer) -> Iterator[Callable[..., Any]]:
    """Yield the functions that a program or one of its groups has registered as commands."""
    yield from (command.callback for command in app.registered_commands if command.callback)
    for group in app.registered_groups:
        if group.typer_instance:
            yield from typer_commands(group.typer_instance)


COMMANDS = list(typer_commands(cli))
EXEMPT = {f"{Path(inspect.getfile(f)).relative_to(PACKAGE)}: {f.__qualname__}" for f in COMMANDS}
"""Commands have no section ``Parameters``: typer shows their docstring, and each option's help text documents it."""


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


@pytest.mark.parametrize("room", ROOMS)
def test_functions_of_many_arguments_say_what_they_are(room: str) -> None:
    missing = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in sorted((PACKAGE / room).rglob("*.py"))
        for name in undocumented(path.read_text(encoding="utf-8"))
    }
    assert not missing - EXEMPT


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.__module__}.{command.__name__}")
def test_commands_are_documented_by_their_options(command: Callable[..., Any]) -> None:
    hints = get_type_hints(command, include_extras=True)
    infos = {name: getattr(hints[name], "__metadata__", (None,))[0] for name in inspect.signature(command).parameters}
    assert [name for name, info in infos.items() if not (info and info.help)] == []


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


def test_all_rooms_are_looked_at() -> None:
    assert {"common", "data", "wire", "audit", "guard", "server", "cli"} <= set(ROOMS)


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_run(path: Path) -> None:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    module: ModuleType = importlib.import_module(name.removesuffix(".__init__"))
    failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried and not failed
