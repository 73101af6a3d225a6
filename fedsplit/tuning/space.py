"""What a search may change of the settings: ranges, choices, and alternatives for whole sections."""

import copy
import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedsplit.common.errors import ConfigError
from fedsplit.model.layer import FirstLayer
from fedsplit.plan.settings import Settings, check_settings
from fedsplit.release.policies import Bits, Random, TopK, settings_name

Plain = bool | int | float | str
Table = dict[str, Any]
_USUAL = (TopK(1), Random(1.0), Bits(1))


class Suggests(Protocol):
    """The part of ``optuna.Trial`` that a space draws from."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of some values."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Return an integer in a closed range.

        Parameters
        ----------
        name : str
            Of the parameter.
        low, high : int
            Both are in the range.
        log : bool
            Whether the draw is even in the logarithm.
        """

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a number in a closed range.

        Parameters
        ----------
        name : str
            Of the parameter.
        low, high : float
            Both are in the range.
        log : bool
            Whether the draw is even in the logarithm.
        """


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, integers if both are, evenly in their logarithm with ``log``."""

    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, key: str, table: Table) -> "Range":
        """Check ``{low, high, log}``; raises ConfigError."""
        if unknown := sorted(set(table) - {"low", "high", "log"}):
            raise ConfigError(f"{key}: unknown key {unknown[0]!r}; a range takes low, high and log")
        low, high, log = table.get("low"), table.get("high"), table.get("log", False)
        if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high)):
            raise ConfigError(f"{key}: low and high must be numbers, got low {low!r} and high {high!r}")
        if not all(math.isfinite(end) for end in (low, high)):  # type: ignore[arg-type]
            raise ConfigError(f"{key}: low and high must be finite, got low {low!r} and high {high!r}")
        if not isinstance(log, bool):
            raise ConfigError(f"{key}: log must be true or false, got {log!r}")
        if not low < high:  # type: ignore[operator]  # also for NaN
            raise ConfigError(f"{key}: low must be less than high, got low {low!r} and high {high!r}")
        if log and low <= 0:  # type: ignore[operator]
            raise ConfigError(f"{key}: with log low must be greater than 0, got {low!r}")
        return cls(low, high, log)  # type: ignore[arg-type]

    def draw(self, trial: Suggests, name: str) -> float:
        """Return a number."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: Mapping[Plain, Any]

    @classmethod
    def of(cls, key: str, values: Sequence[Any]) -> "Choice":
        """Check a list of values; raises ConfigError."""
        named = {v if isinstance(v, bool | int | float | str) else json.dumps(v, default=str): v for v in values}
        if len(named) < 2 or len(named) < len(values):
            raise ConfigError(f"{key}: a choice needs at least two different values, got {list(values)!r}")
        return cls(named)

    def draw(self, trial: Suggests, name: str) -> Any:
        """Return a value."""
        return self.values[trial.suggest_categorical(name, list(self.values))]


@dataclass(frozen=True)
class Alternatives:
    """One of some tables, each of which takes the place of a whole section; they may hold ranges and choices."""

    tables: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, key: str, tables: Sequence[Table]) -> "Alternatives":
        """Check a list of tables; a list in one stands for itself where the setting takes lists; raises ConfigError."""
        if len(tables) < 2 or not all(tables):
            raise ConfigError(f"tune.space.{key}: alternatives need at least two tables, and none may be empty")
        texts = [next((v for v in table.values() if isinstance(v, str)), "") for table in tables]
        names = [t if t and texts.count(t) == 1 else f"{t or 'table'}-{i}" for i, t in enumerate(texts, start=1)]
        parts = ({k: _part(key, k, v) for k, v in _flattened(table, "")} for table in tables)
        return cls(dict(zip(names, parts, strict=True)))

    def draw(self, trial: Suggests, name: str) -> Table:
        """Return a table of values."""
        chosen = trial.suggest_categorical(name, list(self.tables))
        table: Table = {}
        for key, part in self.tables[chosen].items():
            drawn = part.draw(trial, f"{name}.{chosen}.{key}") if isinstance(part, Range | Choice) else part
            _put(table, key, drawn)
        return table


Dimension = Range | Choice | Alternatives


def _dimension(key: str, value: Any) -> Dimension:
    """Return the dimension that a value in ``[tune.space]`` stands for; raises ConfigError."""
    name = f"tune.space.{key}"
    if isinstance(value, dict):
        return Range.of(name, value)
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        return Alternatives.of(key, value)
    if isinstance(value, list):
        return Choice.of(name, value)
    raise ConfigError(f"{name} must be a list of values or a range {{low = ..., high = ...}}, got {value!r}")


def _part(section: str, key: str, value: Any) -> Any:
    """Return the range or choice that a value in an alternative stands for, or the value."""
    if isinstance(value, dict):
        return Range.of(f"tune.space.{section}.{key}", value)
    if not isinstance(value, list):
        return value
    is_value = _takes_lists(f"{section}.{key}") and not all(isinstance(v, list) for v in value)
    return value if is_value else Choice.of(f"tune.space.{section}.{key}", value)


def _put(table: Table, key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
    table[last] = value


@dataclass
class _Probe:
    """Takes what it is given of a space, else the first of everything, and notes what else there would have been."""

    given: Mapping[str, Any]
    asked: dict[str, list[Any]] = field(default_factory=dict)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.asked[name] = list(choices)
        return self.given.get(name, choices[0])

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return int(self.suggest_categorical(name, [low, high]))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self.suggest_categorical(name, [low, high]))


@dataclass(frozen=True)
class Space:
    """Settings to search, around those that are set.

    ``[tune.space]`` mirrors the settings. For a value stands a range (``{low = 16, high = 400, log = true}``) or a list
    of choices; for a section a list of tables, each of which takes its place as a whole and may hold ranges and choices
    itself (so that ``k`` belongs to one policy and ``keep`` to another).

    Attributes
    ----------
    base : dict
        The tables of settings around which is searched.
    dimensions : dict
        By dotted key.
    """

    base: Table
    dimensions: Mapping[str, Dimension]

    @classmethod
    def of(cls, settings: Settings, tables: Table) -> "Space":
        """Read ``[tune.space]``; raises ConfigError."""
        found = dict(_flattened(tables, ""))
        if not found:
            raise ConfigError("tune.space: there is nothing to search")
        for key in found:
            _described(key)  # raises
        read = {key: _dimension(key, value) for key, value in found.items()}
        whole_sections_first = dict(sorted(read.items(), key=lambda item: not isinstance(item[1], Alternatives)))
        return cls(settings.tables(), whole_sections_first)

    def draw(self, trial: Suggests) -> Table:
        """Return the tables of one trial's settings."""
        tables = copy.deepcopy(self.base)
        for key, dimension in self.dimensions.items():
            _put(tables, key, dimension.draw(trial, key))
        return tables

    def check(self, fits: Callable[[Settings], None]) -> None:
        """Try every choice and both ends of every range, one at a time; raises ConfigError, which names it."""
        for given, tables in self._corners():
            try:
                fits(check_settings(tables))
            except ConfigError as error:
                what = ", ".join(f"{key} = {value!r}" for key, value in given.items()) or "the first of everything"
                raise ConfigError(f"tune.space: {what}: {error}") from None

    def _corners(self) -> Iterator[tuple[Mapping[str, Any], Table]]:
        queue: list[dict[str, Any]] = [{}]
        seen: set[tuple[str, Any]] = set()
        while queue:
            probe = _Probe(queue.pop(0))
            yield probe.given, self.draw(probe)
            for name, options in probe.asked.items():
                # what belongs to an alternative is tried with it
                within = {k: v for k, v in probe.given.items() if name.startswith(f"{k}.{v}.")}
                fresh = [v for v in options[1:] if (name, v) not in seen]
                seen.update((name, v) for v in fresh)
                queue += [{**within, name: v} for v in fresh]


def usual_space(settings: Settings, layer: FirstLayer) -> Table:
    """Return the ``[tune.space]`` of settings that have none: dropping policies and their numbers, and learning rates.

    With noise the policy stays, and how much noise is searched. A policy from outside is searched beside the usual.
    """
    chosen = settings.dropping
    policy = chosen.built()
    tables: Table = {"trunk": {"lr": _around(settings.trunk.lr)}}
    if policy.noisy is not None:
        tables["dropping"] = dict(policy.search(layer))
    else:
        own = [{"policy": chosen.policy, **chosen.numbers, **policy.search(layer)}] if chosen.own else []
        usual = [{"policy": settings_name(p), **found} for p in _USUAL if (found := p.search(layer))]
        tables["dropping"] = [{**table, "mask": chosen.mask} for table in own + usual]
    if settings.teaches:
        tables["first-layer"] = {"lr": _around(settings.first_layer.lr)}
    return tables


def _around(rate: float) -> Table:
    return {"low": rate / 5, "high": rate * 5, "log": True}


def _flattened(tables: Table, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        if isinstance(value, dict) and not {"low", "high"} & set(value):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _takes_lists(key: str) -> bool:
    node = _described(key)
    return any(option.get("type") == "array" for option in (node, *node.get("anyOf", [])))


def _described(key: str) -> Mapping[str, Any]:
    """Return a setting's JSON schema; raises ConfigError if there is no such setting."""
    schema = Settings.model_json_schema(by_alias=True)
    node, known = schema, list[str]()
    for step in key.split("."):
        keys = {k: v for k, v in node.get("properties", {}).items() if known or k != "tune"}
        if step not in keys:
            if node.get("additionalProperties") not in (False, None):
                return {}  # a strategy's own arguments
            near = difflib.get_close_matches(step, keys, n=1, cutoff=0.0)
            hint = f"; nearest setting is {'.'.join([*known, *near])!r}" if near else ""
            raise ConfigError(f"tune.space.{key}: unknown setting{hint}")
        known.append(step)
        node = keys[step]
        options = [node, *node.get("anyOf", []), *node.get("allOf", [])]
        refs = [option["$ref"].rpartition("/")[2] for option in options if "$ref" in option]
        node = schema["$defs"][refs[0]] if refs else node
    return node
