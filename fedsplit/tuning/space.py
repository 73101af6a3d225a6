"""What a search may change of the settings: ranges, choices, and alternatives for whole sections."""

import copy
import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedsplit.config import Settings, check_settings
from fedsplit.errors import ConfigError

Plain = bool | int | float | str
Table = dict[str, Any]


class Suggests(Protocol):
    """The part of ``optuna.Trial`` that a space draws from."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of some values."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Return an integer in a closed range."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a number in a closed range."""


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
        named = {v if isinstance(v, bool | int | float | str) else json.dumps(v): v for v in values}
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
        """Check a list of tables; raises ConfigError."""
        if len(tables) < 2 or not all(tables):
            raise ConfigError(f"{key}: alternatives need at least two tables, and none may be empty")
        texts = [next((v for v in table.values() if isinstance(v, str)), "") for table in tables]
        names = [t if t and texts.count(t) == 1 else f"{t or 'table'}-{i}" for i, t in enumerate(texts, start=1)]
        parts = ({k: _dimension(f"{key}.{k}", v, fixed=True) for k, v in table.items()} for table in tables)
        return cls(dict(zip(names, parts, strict=True)))

    def draw(self, trial: Suggests, name: str) -> Table:
        """Return a table of values."""
        chosen = trial.suggest_categorical(name, list(self.tables))
        return {
            key: part.draw(trial, f"{name}.{chosen}.{key}") if isinstance(part, Range | Choice) else part
            for key, part in self.tables[chosen].items()
        }


Dimension = Range | Choice | Alternatives


def _dimension(key: str, value: Any, *, fixed: bool = False) -> Any:
    """Return the dimension that a value stands for; where it may be ``fixed``, anything else as it is."""
    if isinstance(value, dict) and {"low", "high"} & set(value):
        return Range.of(key, value)
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value) and not fixed:
        return Alternatives.of(key, value)
    if isinstance(value, list):
        return Choice.of(key, value)
    if fixed:
        return value
    raise ConfigError(f"{key} must be a list of values or a range {{low = ..., high = ...}}, got {value!r}")


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
        known = Settings.model_json_schema(by_alias=True)
        for key in found:
            _check_known(key, known)
        read = {key: _dimension(f"tune.space.{key}", value) for key, value in found.items()}
        whole_sections_first = dict(sorted(read.items(), key=lambda item: not isinstance(item[1], Alternatives)))
        return cls(settings.tables(), whole_sections_first)

    def draw(self, trial: Suggests) -> Table:
        """Return the tables of one trial's settings."""
        tables = copy.deepcopy(self.base)
        for key, dimension in self.dimensions.items():
            *sections, last = key.split(".")
            table = tables
            for section in sections:
                table = table.setdefault(section, {})
            table[last] = dimension.draw(trial, key)
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


def usual_space(settings: Settings, width: int) -> Table:
    """Return the ``[tune.space]`` of settings that have none: dropping policies and budgets, and learning rates.

    Parameters
    ----------
    settings : Settings
    width : int
        Outputs of the first layer.
    """
    few, many = max(1, width // 64), max(2, width // 4)
    tables: Table = {
        "dropping": [
            {"policy": "top-k", "k": {"low": few, "high": many, "log": True}},
            {"policy": "random", "keep": {"low": 0.02, "high": 0.5, "log": True}},
            {"policy": "bits", "bits": 1},
        ],
        "trunk": {"lr": _around(settings.trunk.lr)},
    }
    if settings.first_layer.strategy != "frozen" and settings.protocol.mode != "release-once":
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


def _check_known(key: str, schema: Mapping[str, Any]) -> None:
    """Refuse a key that is no setting; raises ConfigError."""
    node, known = schema, list[str]()
    for step in key.split("."):
        keys = {k: v for k, v in node.get("properties", {}).items() if known or k != "tune"}
        if step not in keys:
            if node.get("additionalProperties") not in (False, None):
                return  # a strategy's own arguments
            near = difflib.get_close_matches(step, keys, n=1, cutoff=0.0)
            hint = f"; nearest setting is {'.'.join([*known, *near])!r}" if near else ""
            raise ConfigError(f"tune.space.{key}: unknown setting{hint}")
        known.append(step)
        node = keys[step]
        options = [node, *node.get("anyOf", []), *node.get("allOf", [])]
        refs = [option["$ref"].rpartition("/")[2] for option in options if "$ref" in option]
        node = schema["$defs"][refs[0]] if refs else node
