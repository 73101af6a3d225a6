"""A study's options: fields of a dataclass, each with its value for ``--quick`` beside the full one."""

import argparse
import types
import typing
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, NoReturn

from fedsplit.common.errors import ConfigError

_NONE: Any = object()


def option(
    default: Any, *, quick: Any = _NONE, help: str = "", choices: Sequence[str] | None = None, positional: bool = False
) -> Any:
    """Return a field of a study's options.

    Parameters
    ----------
    default : object
    quick : object, optional
        Its value with ``--quick``, if that is another one. What the command line gives comes before both.
    help : str
    choices : sequence of str, optional
        All that is allowed.
    positional : bool
        Whether it is given without a name.
    """
    return field(
        default=default,
        metadata={
            "quick": default if quick is _NONE else quick,
            "help": help,
            "choices": choices,
            "positional": positional,
        },
    )


@dataclass(frozen=True)
class Asked:
    """What a command line asks of a study."""

    options: Any
    quick: bool
    tables: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog.rpartition(' ')[2]}: {message}")


def parse(name: str, doc: str, options: type[Any], arguments: Sequence[str]) -> Asked:
    """Read a study's options from the command line.

    Raises
    ------
    ConfigError
        If there is no such option, or its value is not allowed.
    """
    parser = _Parser(
        prog=f"python -m simulations {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the whole path with less of everything")
    parser.add_argument("--tables", action="store_true", help="print the tables of what was written before")
    hints = typing.get_type_hints(options)
    for each in fields(options):
        _add(parser, each, hints[each.name])
    given = vars(parser.parse_args(arguments))
    quick, tables = given.pop("quick"), given.pop("tables")
    usual = {each.name: each.metadata["quick"] if quick else each.default for each in fields(options)}
    chosen = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items() if _said(value)}
    return Asked(options(**(usual | chosen)), quick, tables)


def _add(parser: argparse.ArgumentParser, each: "Field[Any]", hint: Any) -> None:
    """Add a field to a parser; what is not given is None, or an empty list."""
    said = each.metadata
    more = {"help": said["help"], "default": None}
    if hint is bool:
        parser.add_argument(_flag(each.name), action="store_true", **more)
        return
    many, kind = _kind(hint)
    more |= {"type": kind, "choices": said["choices"]}
    if said["positional"]:
        parser.add_argument(each.name, nargs="*" if many else "?", **more)
    else:
        parser.add_argument(_flag(each.name), nargs="+" if many else None, **more)


def _said(value: Any) -> bool:
    return value is not None and value != []


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kind(hint: Any) -> tuple[bool, Any]:
    """Return whether a type hint is of several values, and the type of one of them."""
    kinds = [kind for kind in typing.get_args(hint) if kind not in (types.NoneType, Ellipsis)]
    return typing.get_origin(hint) is tuple, kinds[0] if kinds else hint
