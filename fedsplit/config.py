"""The one place where settings are defined, checked and documented: a TOML file as frozen pydantic models.

An unknown key or a bad value is refused with the key, the value and what is allowed.
"""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedsplit.errors import ConfigError
from fedsplit.first_layer import STRATEGIES

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=lambda name: name.replace("_", "-")
    )


class RunSettings(_Section):
    """``[run]``: the name (of the run folder), seed, rounds, engine, and rounds between evaluations (0: at the end)."""

    name: str = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    rounds: Positive
    engine: Literal["ray", "inline"] = "ray"
    evaluate_every: Annotated[int, Field(ge=0)] = 0


class DataSettings(_Section):
    """``[data]``: one of ``name`` (a packaged data set), ``folder`` (of .npz files) or ``builder`` (module:function).

    ``task`` and ``outputs`` (classes, or columns of a regression target) describe a user's own data.
    """

    name: str | None = None
    folder: str | None = None
    builder: str | None = None
    task: Literal["classification", "binary", "regression"] | None = None
    outputs: Positive | None = None


class DeviceSettings(_Section):
    """``[devices]``: how many there are (test devices included), how many a node hosts, who holds what.

    ``test``: a list of device ids, a number (the last ones) or ``"all"`` (every device that has test records).
    ``fraction`` of the training devices is sampled in each round.
    """

    count: Positive | None = None
    per_node: Positive = 1
    partition: Literal["natural", "iid", "dirichlet"] = "natural"
    alpha: Rate = 0.5
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    test: Literal["all"] | Positive | list[Annotated[int, Field(ge=0)]]


class ModelSettings(_Section):
    """``[model]``: a built-in ``name`` with the first layer's ``width`` and ``activation``, or a ``builder``.

    ``width`` is the first layer's output channels or units. ``builder`` is a module:function that takes nothing and
    returns a SplitModel.
    """

    name: Literal["sensor-cnn", "image-cnn", "mlp"] | None = None
    builder: str | None = None
    width: Positive = 32
    activation: Literal["relu", "leaky_relu", "tanh", "sigmoid", "gelu", "identity"] = "relu"


class DroppingSettings(_Section):
    """``[dropping]``: the policy and its budget; see :class:`fedsplit.dropping.Dropping`.

    ``mask = "keyed"`` keeps the same outputs of a record in all rounds; prediction is always keyed.
    """

    policy: Literal["none", "random", "at-most", "top-k"]
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    k: Positive | None = None
    mask: Literal["fresh", "keyed"] = "fresh"

    @model_validator(mode="after")
    def _budget(self) -> "DroppingSettings":
        needs = {"none": None, "random": "keep", "at-most": "k", "top-k": "k"}[self.policy]
        given = [key for key in ("keep", "k") if getattr(self, key) is not None]
        if given != ([needs] if needs else []):
            raise ValueError(
                f"policy {self.policy!r} takes {needs or 'neither keep nor k'}, got {' and '.join(given) or 'neither'}"
            )
        return self


class ProtocolSettings(_Section):
    """``[protocol]``: the mode (no default), records per device and round, the trunk's mini-batches, the wire.

    ``chunk``: a number of records, ``"epoch"`` (all of a device's records), or in single-pass ``"spread"`` (an even
    share in each round). ``timeout`` is the seconds a message may take.
    """

    mode: Literal["synchronous", "pipelined", "single-pass"]
    chunk: Positive | Literal["epoch", "spread"] = "epoch"
    batch_size: Positive = 64
    trunk_epochs: Positive = 1
    dtype: Literal["float16", "float32"] = "float16"
    max_staleness: Annotated[int, Field(ge=0)] = 1
    min_nodes: Positive = 1
    timeout: Rate = 600.0

    @model_validator(mode="after")
    def _spread(self) -> "ProtocolSettings":
        if self.chunk == "spread" and self.mode != "single-pass":
            raise ValueError(f"chunk 'spread' is for mode 'single-pass', not {self.mode!r}")
        return self


class FirstLayerSettings(_Section):
    """``[first-layer]``: the Flower strategy that aggregates it (or ``frozen``), its learning rate, its arguments.

    ``schedule`` as in :func:`fedsplit.schedule.scheduled`.
    """

    strategy: Literal["frozen", *STRATEGIES] = "FedAdam"  # type: ignore[valid-type]
    lr: Rate = 0.003
    schedule: Literal["constant", "cosine", "step"] = "constant"
    args: dict[str, Any] = Field(default_factory=dict)


class TrunkSettings(_Section):
    """``[trunk]``: its optimizer and learning rate; ``schedule`` as in :func:`fedsplit.schedule.scheduled`."""

    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    lr: Rate = 0.001
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "cosine", "step"] = "constant"

    @model_validator(mode="after")
    def _momentum(self) -> "TrunkSettings":
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum is for optimizer 'sgd', not {self.optimizer!r}")
        return self


class Settings(_Section):
    """All settings of one run."""

    run: RunSettings
    data: DataSettings
    devices: DeviceSettings
    model: ModelSettings
    dropping: DroppingSettings
    protocol: ProtocolSettings
    first_layer: FirstLayerSettings = FirstLayerSettings()
    trunk: TrunkSettings = TrunkSettings()

    @model_validator(mode="after")
    def _together(self) -> "Settings":
        if self.protocol.mode == "single-pass" and self.run.evaluate_every:
            raise ValueError("run.evaluate-every must be 0 in mode 'single-pass': test records are exposed once too")
        if (self.model.name is None) == (self.model.builder is None):
            raise ValueError(f"model needs a name or a builder, not {'both' if self.model.name else 'neither'}")
        return self

    def to_toml(self) -> str:
        """Return the settings, defaults included, as a TOML file's text."""
        return tomli_w.dumps(self.model_dump(by_alias=True, exclude_none=True))

    def to_json(self) -> str:
        """Return the settings as one line, for :meth:`from_json`."""
        return self.model_dump_json(by_alias=True)

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """Undo :meth:`to_json`."""
        return cls.model_validate_json(text)


def load_settings(path: Path | str, overrides: Sequence[str] = ()) -> Settings:
    """Read a settings file.

    Parameters
    ----------
    path : Path or str
    overrides : sequence of str
        ``section.key=value`` with a TOML value (a bare word is a string); they win over the file.

    Raises
    ------
    ConfigError
        In one line: the key, the value and what is allowed.
    """
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"settings file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings file {path}: not valid TOML: {error}") from None
    for override in overrides:
        _override(raw, override)
    return check_settings(raw)


def check_settings(raw: dict[str, Any]) -> Settings:
    """Build settings from nested tables; raises ConfigError."""
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"--set must look like section.key=value, got {override!r}")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = raw
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override!r}: {part!r} is not a table")
    table[parts[-1]] = value


def _one_line(error: ValidationError) -> str:
    """Say the first problem of a ValidationError in one line; an unknown key says the nearest valid one."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    steps = [str(step) for step in first["loc"]]
    known: list[str] = []  # the location without pydantic's names for the branches of a union
    for step in steps:
        if step not in _allowed_keys(known) and first["type"] != "extra_forbidden":
            break
        known.append(step)
    key = ".".join(known)
    if first["type"] == "extra_forbidden":
        allowed = _allowed_keys(steps[:-1])
        near = difflib.get_close_matches(steps[-1], allowed, n=1, cutoff=0.0)
        kind = "key" if len(steps) > 1 else "section"
        return f"{key}: unknown {kind}; nearest valid key is {'.'.join([*steps[:-1], *near])!r}"
    if first["type"] == "missing":
        choices = _allowed_values(steps)
        return f"{key}: missing{f'; allowed: {choices}' if choices else ''}"
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}" if key else str(first["ctx"]["error"])
    same = [p["msg"] for p in problems if list(map(str, p["loc"]))[: len(known)] == known]
    said = " or ".join(dict.fromkeys(m[0].lower() + m[1:].removeprefix("nput ") for m in same))
    return f"{key}: {said.replace('i' + 'should', 'should')}, got {first['input']!r}"


def _section(steps: Sequence[str]) -> type[BaseModel] | None:
    model: type[BaseModel] = Settings
    for step in steps:
        found = [f.annotation for f in model.model_fields.values() if f.alias == step]
        if not found or not isinstance(found[0], type) or not issubclass(found[0], BaseModel):
            return None
        model = found[0]
    return model


def _allowed_keys(steps: Sequence[str]) -> list[str]:
    model = _section(steps)
    return [str(f.alias) for f in model.model_fields.values()] if model else []


def _allowed_values(steps: Sequence[str]) -> str:
    model = _section(steps[:-1])
    if model is None:
        return ""
    annotation = next((f.annotation for f in model.model_fields.values() if f.alias == steps[-1]), None)
    values = getattr(annotation, "__args__", ())
    return ", ".join(repr(v) for v in values if isinstance(v, str))
