"""The one place where settings are defined, checked and documented: a TOML file as frozen pydantic models.

An unknown key or a bad value is refused with the key, the value and what is allowed.
"""

import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError, model_validator

from fedsplit.common.errors import ConfigError
from fedsplit.common.tables import Section, one_line
from fedsplit.plan.combinations import refusal
from fedsplit.plan.learning import FirstLayerSettings, ProtocolSettings, PublicSettings, TrunkSettings, TuneSettings
from fedsplit.plan.sections import (
    AuditSettings,
    DataSettings,
    DeviceSettings,
    DroppingSettings,
    GuardSettings,
    ModelSettings,
    RunSettings,
)

INCIDENTAL = ("run.engine", "run.ray-address", "run.observers", "audit.attacks")
"""Settings on which nothing depends that a run comes to: it may be resumed with others."""


class Settings(Section):
    """All settings of one run."""

    run: RunSettings
    data: DataSettings
    devices: DeviceSettings
    model: ModelSettings
    dropping: DroppingSettings
    protocol: ProtocolSettings
    first_layer: FirstLayerSettings = FirstLayerSettings()
    trunk: TrunkSettings = TrunkSettings()
    public: PublicSettings | None = None
    guard: GuardSettings = GuardSettings()
    audit: AuditSettings = AuditSettings()
    tune: TuneSettings | None = None

    @property
    def donors(self) -> tuple[int, ...]:
        """The devices that give their records to everybody; they take no part as devices."""
        return tuple(sorted(set(self.public.devices or ()))) if self.public else ()

    @property
    def teaches(self) -> bool:
        """Whether devices' gradients step the first layer."""
        return self.first_layer.strategy != "frozen" and self.protocol.facts.teaches

    @model_validator(mode="after")
    def _together(self) -> "Settings":
        if why := refusal(self):
            raise ValueError(why)
        sought = (*self.tune.objectives, *self.tune.constraints) if self.tune else ()
        profile = self.devices.profile
        if "simulated_seconds" in sought and (
            not profile or None in (profile.release_seconds, profile.gradient_seconds)
        ):
            raise ValueError(
                "tune: simulated_seconds needs a [devices.profile] with release-seconds and gradient-seconds (as in "
                "the config.toml of a run): trials would measure beside each other"
            )
        if (self.model.name is None) == (self.model.builder is None):
            raise ValueError(f"model needs a name or a builder, not {'both' if self.model.name else 'neither'}")
        return self

    def to_toml(self) -> str:
        """Return a run's settings, defaults included, as a TOML file's text."""
        return tomli_w.dumps(self.tables())

    def tables(self) -> dict[str, Any]:
        """Return a run's settings, defaults included, as nested tables: undone by :func:`check_settings`."""
        return self.model_dump(by_alias=True, exclude_none=True, exclude={"tune"})

    def flat(self) -> dict[str, Any]:
        """Return the settings that have a value, defaults included, by dotted key."""
        return flattened(self.tables())

    def to_json(self) -> str:
        """Return the settings as one line, for :meth:`from_json`."""
        return self.model_dump_json(by_alias=True, exclude={"tune"})

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """Undo :meth:`to_json`."""
        return cls.model_validate_json(text)


def default_folder(settings: Settings) -> Path:
    """Return ``runs/NAME-TIMESTAMP``."""
    return Path("runs") / f"{settings.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"


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
        raise ConfigError(one_line(error, Settings)) from None


def flattened(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one, by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat.update(flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


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
