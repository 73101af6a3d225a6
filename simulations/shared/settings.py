"""Settings of studies, and the records and runs that they take."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fedsplit.data import Records, Source
from fedsplit.plan.settings import Settings, check_settings, load_settings
from simulations.shared.study import CONFIGS

Changes = dict[str, dict[str, Any]]
DIGITS: tuple[str, ...] = ("run.rounds=4", "run.engine=inline")  # of digits.toml, which trains in seconds


def changed(settings: Settings, changes: Changes) -> Settings:
    """Return the settings with some keys of some sections changed; None removes a key."""
    raw = settings.tables()
    for section, values in changes.items():
        raw[section] = {k: v for k, v in (raw.get(section, {}) | values).items() if v is not None}
    return check_settings(raw)


def joined(parts: Sequence[Records]) -> Records:
    """Return the records of several devices as one."""
    return Records(np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts]))


def training(source: Source, without: Sequence[int] = ()) -> list[Records]:
    """Return what each device has to train with, but for some devices, and for those that have nothing."""
    parts = [source.device(device).train for device in range(source.count) if device not in without]
    return [part for part in parts if len(part)]


def tested(source: Source) -> Records:
    """Return the test records of all devices that test."""
    return joined([source.device(device).test for device in source.test_devices])


@contextmanager
def finished(run: Path | None, config: str = "digits", overrides: Sequence[str] = DIGITS) -> Iterator[Path]:
    """Give the folder of a finished run, or train one of small digits for as long as it is needed."""
    if run is not None:
        yield run
        return
    from fedsplit.runs.simulation import simulate

    with TemporaryDirectory() as folder:
        simulate(load_settings(CONFIGS / f"{config}.toml", overrides), out=Path(folder) / "run")
        yield Path(folder) / "run"
