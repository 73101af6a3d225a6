"""The pages of the site that are made of the code: settings, commands, and the reference of each room.

MkDocs calls :func:`on_files`; mkdocstrings uses :class:`Roles`. Nothing here is written to disk: a page cannot fall
behind the code.
"""

import json
import re
from collections.abc import Iterator
from importlib import import_module
from inspect import cleandoc
from pkgutil import walk_packages
from typing import Any, get_args

import click
import griffe
import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

ROOMS = (
    "common",
    "data",
    "model",
    "release",
    "wire",
    "guard",
    "plan",
    "audit",
    "device",
    "server",
    "runs",
    "tuning",
    "service",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages (an event of MkDocs)."""
    pages = {"settings": settings_page(), "commands": commands_page(), **{room: room_page(room) for room in ROOMS}}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def room_page(room: str) -> str:
    """Return a room's page: what it is for, and each of its modules for mkdocstrings."""
    package = import_module(f"fedsplit.{room}")
    names = sorted(
        module.name
        for module in walk_packages(package.__path__, f"{package.__name__}.")
        if not module.name.rpartition(".")[2].startswith("_")
    )
    blocks = "\n\n".join(f"::: {name}" for name in names)
    return f"# {room}\n\n{(package.__doc__ or '').strip()}\n\n{blocks}\n"


# Settings


def settings_page() -> str:
    """Return a table for each section of a settings file: key, type, default, meaning."""
    from fedsplit.plan.settings import Settings

    intro = (
        "# Settings\n\nOne TOML file describes one run. `--set section.key=value` overrides a key. An unknown key or a "
        "value that is not allowed ends the command with one line and exit code 2. A key without a default must be "
        "given where its section is.\n"
    )
    return "\n".join([intro, *_sections(Settings, "")])


def _sections(model: type[BaseModel], name: str) -> Iterator[str]:
    """Yield the text of a section and of those inside it."""
    rows, inner = [], []
    meanings = meanings_of(model)
    schema = model.model_json_schema(by_alias=True)
    for key, (alias, field) in zip(model.model_fields, schema["properties"].items(), strict=True):
        section = f"{name}.{alias}" if name else alias
        part = section_of(model, key)
        if part is not None:
            inner.append((part, section))
        if part is None or name:
            kind = f"table, see `[{section}]`" if part else _kind(field, schema)
            default = "" if alias in schema.get("required", ()) else _toml(field.get("default"))
            rows.append(f"| `{alias}` | {kind} | {default} | {meanings.get(key, '')} |")
    if name:
        summary = cleandoc(model.__doc__ or "").partition("\n\nAttributes\n")[0]
        yield f"## `[{name}]`\n\n{_roles(_sentence(summary))}\n"
        yield "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows, ""])
    for part, section in inner:
        yield from _sections(part, section)


def section_of(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """Return the model behind a key if the key is a table of its own (``[devices.profile]``), else None."""
    annotation = model.model_fields[key].annotation
    parts = [part for part in (annotation, *get_args(annotation)) if isinstance(part, type)]
    return next((p for p in parts if issubclass(p, BaseModel) and p.__name__.endswith("Settings")), None)


def meanings_of(model: type[BaseModel]) -> dict[str, str]:
    """Return what each key means, from the ``Attributes`` of the section's docstring, on one line each."""
    parsed = griffe.Docstring(cleandoc(model.__doc__ or "")).parse("numpy", warnings=False)
    attributes = (part.value for part in parsed if part.kind is griffe.DocstringSectionKind.attributes)
    return {item.name: _roles(_cell(item.description)) for items in attributes for item in items}


def _kind(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """Say in words what a JSON schema allows."""
    if "$ref" in field:
        return _table(schema["$defs"][field["$ref"].rpartition("/")[2]], schema)
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_kind(part, schema) for part in field["anyOf"] if part.get("type") != "null"))
    if "allOf" in field:
        return _kind(field["allOf"][0], schema)
    if "enum" in field or "const" in field:
        return ", ".join(_toml(value) for value in field.get("enum", [field.get("const")]))
    kind = {"array": "list", "object": "table", "boolean": "`true`, `false`"}.get(field.get("type", ""))
    if field.get("type") == "array":
        return f"list of {_kind(field['items'], schema)}"
    return (kind or field.get("type", "any")) + _range(field)


def _table(part: dict[str, Any], schema: dict[str, Any]) -> str:
    if "properties" not in part:
        return _kind(part, schema)
    return "table (" + "; ".join(f"`{key}`: {_kind(value, schema)}" for key, value in part["properties"].items()) + ")"


def _range(field: dict[str, Any]) -> str:
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "maxItems": "at most"}
    bounds = [f"{word} {_number(field[key])}" for key, word in words.items() if key in field]
    return f" {', '.join(bounds)}" if bounds else ""


def _toml(value: Any) -> str:
    return "" if value is None or isinstance(value, dict) else f"`{json.dumps(value)}`"


# Commands


def commands_page() -> str:
    """Return the help of every command: what it does, its arguments and options."""
    from fedsplit.cli.main import cli

    program = typer.main.get_command(cli)
    return "# Command line\n\n" + "\n".join(_commands(program, "fedsplit"))


def _commands(command: click.Command, name: str) -> Iterator[str]:
    if isinstance(command, click.Group):
        for key, child in sorted(command.commands.items()):
            yield from _commands(child, f"{name} {key}")
        return
    context = click.Context(command, info_name=name)
    records = [part.get_help_record(context) for part in command.params if part.name != "help"]
    rows = [f"| `{names}` | {_cell(meaning)} |" for names, meaning in filter(None, records)]
    yield f"## `{name}`\n\n{cleandoc(command.help or '')}\n"
    yield "\n".join(["| argument or option | meaning |", "|---|---|", *rows, ""])


# Text


class Roles(griffe.Extension):
    """Turn the roles of docstrings (``:func:`name```) into links, or code where there is nothing to link to."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change an object's docstring (an event of griffe)."""
        if obj.docstring is not None:
            obj.docstring.value = _linked(_headed(obj.docstring.value))


_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc|obj):`~?([\w.]+)`")


def _headed(text: str) -> str:
    """Put examples under a heading of their own, or they would be read as part of the section before."""
    return text if "Examples\n---" in text else text.replace("\n\n>>> ", "\n\nExamples\n--------\n>>> ", 1)


def _linked(text: str) -> str:
    def link(match: re.Match[str]) -> str:
        name = match[1]
        if not name.startswith("fedsplit."):
            return f"`{name}`"
        return f'<autoref optional identifier="{name}"><code>{name.rpartition(".")[2]}</code></autoref>'

    return _ROLE.sub(link, text)


def _roles(text: str) -> str:
    """Show roles as code, and reStructuredText's code as Markdown's."""
    return _ROLE.sub(r"`\1`", text).replace("``", "`")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _sentence(summary: str) -> str:
    """Return a section's summary without its own name before the colon."""
    said = summary.partition("``: ")[2] or summary
    return said[0].upper() + said[1:]


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.15g}"
