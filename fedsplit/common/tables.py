"""Tables of settings as pydantic models, and what is wrong with them in one line."""

import difflib
from collections.abc import Sequence
from typing import get_args

from pydantic import BaseModel, ConfigDict, ValidationError


class Section(BaseModel):
    """A frozen table: keys with hyphens, unknown ones refused, values of exactly the type they must have."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=lambda name: name.replace("_", "-")
    )


def one_line(error: ValidationError, root: type[BaseModel]) -> str:
    """Say the first problem of a ValidationError in one line; an unknown key says the nearest valid one."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    steps = [str(step) for step in first["loc"]]
    steps += [first["ctx"]["key"]] if "key" in first.get("ctx", {}) else []  # a section that looks at its keys itself
    known: list[str] = []  # the location without pydantic's names for the branches of a union
    for step in steps:
        if step not in _allowed_keys(root, known) and first["type"] != "extra_forbidden":
            break
        known.append(step)
    key = ".".join(known)
    if first["type"] == "extra_forbidden":
        allowed = _allowed_keys(root, steps[:-1])
        near = difflib.get_close_matches(steps[-1], allowed, n=1, cutoff=0.0)
        kind = "section" if _section(root, [*steps[:-1], *near]) else "key"
        return f"{key}: unknown {kind}; nearest valid key is {'.'.join([*steps[:-1], *near])!r}"
    if first["type"] == "missing":
        choices = _allowed_values(root, steps)
        return f"{key}: missing{f'; allowed: {choices}' if choices else ''}"
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}" if key else str(first["ctx"]["error"])
    same = [p["msg"] for p in problems if list(map(str, p["loc"]))[: len(known)] == known]
    said = " or ".join(dict.fromkeys(m[0].lower() + m[1:].removeprefix("nput ") for m in same))
    return f"{key}: {said.replace('i' + 'should', 'should')}, got {first['input']!r}"


def _section(root: type[BaseModel], steps: Sequence[str]) -> type[BaseModel] | None:
    model = root
    for step in steps:
        found = [f.annotation for f in model.model_fields.values() if f.alias == step]
        kinds = [k for f in found for k in (f, *get_args(f)) if isinstance(k, type) and issubclass(k, BaseModel)]
        if not kinds:
            return None
        model = kinds[0]
    return model


def _allowed_keys(root: type[BaseModel], steps: Sequence[str]) -> list[str]:
    model = _section(root, steps)
    return [str(f.alias) for f in model.model_fields.values()] if model else []


def _allowed_values(root: type[BaseModel], steps: Sequence[str]) -> str:
    model = _section(root, steps[:-1])
    if model is None:
        return ""
    annotation = next((f.annotation for f in model.model_fields.values() if f.alias == steps[-1]), None)
    options = [value for option in (annotation, *get_args(annotation)) for value in get_args(option)]
    return ", ".join(repr(v) for v in options if isinstance(v, str))
