"""The run folder: every file of it has its name here."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.numpy import load

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.common.files import replacing
from fedsplit.device.bundle import WEIGHTS, Bundle
from fedsplit.plan.settings import Settings, load_settings

if TYPE_CHECKING:
    from fedsplit.plan.experiment import Experiment

STATE, LOG, NODES, METRICS, RESULT = "state.json", "run.log", "nodes.json", "metrics.jsonl", "result.json"
DEVICES = "devices.csv"
SUBMITTED = "submitted.toml"  # the settings as fedsplit run gives them to the process that trains


def check_fresh(folder: Path) -> None:
    """Refuse a folder with anything of another run in it; raises ConfigError."""
    if folder.exists() and any(path.name not in (STATE, LOG, SUBMITTED) for path in folder.iterdir()):
        raise ConfigError(f"out folder {folder} is not empty: choose another, or continue it with --resume")


@contextmanager
def submitting(folder: Path, settings: Settings) -> Iterator[None]:
    """Leave settings for the process that trains; in an error nothing is left.

    Raises
    ------
    ConfigError
        If the folder cannot be written.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / SUBMITTED) as new:
            new.write_text(settings.to_toml(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out folder {folder} cannot be written: {error.strerror}") from None
    try:
        yield
    except BaseException:
        (folder / SUBMITTED).unlink(missing_ok=True)
        if made:
            folder.rmdir()
        raise


def read_nodes(folder: Path) -> list[dict[str, Any]]:
    """Return what the server has seen of each node in a run, as of its last round.

    Raises
    ------
    ConfigError
        If there is nothing of the kind.
    """
    try:
        return list(json.loads((folder / NODES).read_text(encoding="utf-8")))
    except OSError:
        raise ConfigError(f"{folder} holds no {NODES}: it is written as nodes come") from None
    except ValueError:
        raise ConfigError(f"{folder / NODES} is damaged") from None


def run_settings(folder: Path) -> Settings:
    """Return the settings of a run that has a checkpoint; raises DataError."""
    if not (folder / "config.toml").exists():
        raise DataError(f"{folder} is not a run folder: it has no config.toml")
    if not (folder / "checkpoint" / WEIGHTS).exists():
        raise DataError(f"{folder} has no checkpoint: the run has not finished a round")
    return load_settings(folder / "config.toml")


def run_bundle(folder: Path) -> Bundle:
    """Return the device's half of a run's last checkpoint.

    Raises
    ------
    FedsplitError
        If the run has none, or its data set, which says what a record is, cannot be opened.
    """
    from fedsplit.plan.experiment import Experiment

    return bundle_of(Experiment(run_settings(folder)), folder)


def bundle_of(experiment: "Experiment", folder: Path) -> Bundle:
    """Return the device's half of a run, whose checkpoint's weights the experiment's first layer gets."""
    layer, source = experiment.model.first_layer, experiment.source
    path = folder / "checkpoint" / WEIGHTS
    try:
        layer.load_weights(load(path.read_bytes()))
    except (OSError, SafetensorError, RuntimeError):
        raise DataError(f"{path} is damaged, or of another model") from None
    dtype = experiment.settings.protocol.dtype
    return Bundle(layer, experiment.policy, dtype, source.scaling, source.task, source.outputs)


def open_run_folder(folder: Path, settings: Settings, *, resume: bool) -> None:
    """Make the run folder, or check that the one to resume belongs to these settings.

    Raises
    ------
    ConfigError
        If the folder cannot be written, holds something already, or is of a run with other settings.
    """
    config = folder / "config.toml"
    if resume:
        _check_same(config, settings)
        return
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out folder {folder} is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_fresh(folder)
        with replacing(config) as new:
            new.write_text(settings.to_toml(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out folder {folder} cannot be written: {error.strerror}") from None


def _check_same(config: Path, settings: Settings) -> None:
    if not config.exists():
        raise ConfigError(f"nothing to resume: {config} does not exist")
    old, new = load_settings(config).flat(), settings.flat()
    differing = sorted(k for k in old | new if old.get(k) != new.get(k) and k not in ("run.engine", "run.ray-address"))
    if differing:
        key = differing[0]
        raise ConfigError(f"cannot resume with other settings: {key} was {old.get(key)!r}, is {new.get(key)!r}")
