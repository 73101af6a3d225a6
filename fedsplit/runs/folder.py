"""The run folder: every file of a run has its name, its owner and its readers here, and what it holds of a device."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.common.files import put, writing
from fedsplit.plan.settings import INCIDENTAL, Settings, load_settings

if TYPE_CHECKING:  # they bring torch, which who follows a run does without
    from fedsplit.device.bundle import Bundle
    from fedsplit.plan.experiment import Experiment


class Folder(Protocol):
    """What lists its files as :class:`RunFile`."""

    @property
    def path(self) -> Path:
        """Where it is."""


class Holds(Enum):
    """What a file of a run may hold of a single device, and so what ``fedsplit forget`` must do about it."""

    NOTHING = "settings, weights, or sums over all devices"
    ROWS = "a device's own row of counts"
    RECORDS = "releases or records of a device, or what was computed from them alone"
    NAMED = "what devices sent that go by names of their own: whose is whose is not known here"


@dataclass(frozen=True)
class RunFile:
    """A file, or a folder, of a run or a study; as an attribute of a folder's class it is that folder's path of it.

    Attributes
    ----------
    name : str
        Within the folder.
    owner : str
        Who writes it.
    readers : str
    holds : Holds
    """

    name: str
    owner: str
    readers: str
    holds: Holds = Holds.NOTHING

    @overload
    def __get__(self, folder: None, kind: type) -> "RunFile": ...
    @overload
    def __get__(self, folder: "Folder", kind: type) -> Path: ...
    def __get__(self, folder: "Folder | None", kind: type) -> "RunFile | Path":
        """Return the path in a folder, or of the class the entry itself."""
        return self if folder is None else folder.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """A run's folder; what is in it is listed here and nowhere else.

    Parameters
    ----------
    path : Path
        It need not be there yet.
    """

    path: Path

    config = RunFile("config.toml", "server", "all commands on a run")
    submitted = RunFile("submitted.toml", "fedsplit run", "the process that trains")
    state = RunFile("state.json", "server, which holds it locked", "who follows the run")
    log = RunFile("run.log", "server", "people, who follows the run")
    metrics = RunFile("metrics.jsonl", "server, a line a round", "compare, who follows the run, the curves")
    result = RunFile("result.json", "server, at the end", "compare, who follows the run")
    curves = RunFile("curves.png", "server, at the end", "people")
    nodes = RunFile("nodes.json", "server", "status", Holds.ROWS)
    devices = RunFile("devices.csv", "server's virtual clock, at the end", "people", Holds.ROWS)
    checkpoint = RunFile("checkpoint", "server, every round", "resume, export, serve, audit", Holds.RECORDS)
    checkpoint_new = RunFile("checkpoint.new", "server, for a moment", "resume", Holds.RECORDS)
    checkpoint_old = RunFile("checkpoint.old", "server, for a moment", "resume", Holds.RECORDS)
    releases = RunFile("releases", "server, beside the checkpoint", "resume", Holds.RECORDS)
    states = RunFile("nodes", "simulated devices: ledgers, patterns of pending chunks", "the same", Holds.RECORDS)
    recordings = RunFile("audit", "simulated devices and server, for an audit", "audit", Holds.RECORDS)
    report = RunFile("audit.json", "audit", "compare, tune", Holds.RECORDS)
    page = RunFile("audit.html", "audit, with reconstructed records", "people", Holds.RECORDS)
    objectives = RunFile("objectives.json", "tune, at the end of a trial's run", "tune")
    fleet = RunFile("fleet", "serve: what is normal for watched devices, by their names", "serve", Holds.NAMED)

    @classmethod
    def files(cls) -> dict[str, RunFile]:
        """Return every entry by its attribute's name."""
        return {name: entry for name, entry in vars(cls).items() if isinstance(entry, RunFile)}

    # -------------------------------------------------------------------- opening

    def check_fresh(self) -> None:
        """Refuse a folder with anything of another run in it; raises ConfigError."""
        beforehand = (self.state.name, self.log.name, self.submitted.name)
        if self.path.exists() and any(path.name not in beforehand for path in self.path.iterdir()):
            raise ConfigError(f"out folder {self.path} is not empty: choose another, or continue it with --resume")

    def make(self) -> None:
        """Make the folder; raises ConfigError if it cannot be."""
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def submitting(self, settings: Settings) -> Iterator[None]:
        """Leave settings for the process that trains; in an error nothing is left.

        Raises
        ------
        ConfigError
            If the folder cannot be written.
        """
        made = not self.path.exists()
        self.make()
        with self.writing():
            put(self.submitted, settings.to_toml())
        try:
            yield
        except BaseException:
            self.submitted.unlink(missing_ok=True)
            if made:
                self.path.rmdir()
            raise

    def writing(self) -> Any:
        """Return a context in which an OSError becomes a ConfigError that names the folder."""
        return writing(f"out folder {self.path}")

    def open(self, settings: Settings, *, resume: bool) -> None:
        """Make the folder, or check that the one to resume belongs to these settings.

        Raises
        ------
        ConfigError
            If the folder cannot be written, holds something already, or is of a run with other settings.
        """
        if resume:
            self._check_same(settings)
            return
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"out folder {self.path} is a file")
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            self.check_fresh()
            put(self.config, settings.to_toml())

    def _check_same(self, settings: Settings) -> None:
        if not self.config.exists():
            raise ConfigError(f"nothing to resume: {self.config} does not exist")
        old, new = load_settings(self.config).flat(), settings.flat()
        differing = sorted(k for k in old | new if old.get(k) != new.get(k) and k not in INCIDENTAL)
        if differing:
            key = differing[0]
            raise ConfigError(f"cannot resume with other settings: {key} was {old.get(key)!r}, is {new.get(key)!r}")

    # -------------------------------------------------------------------- reading

    def settings(self) -> Settings:
        """Return the run's settings.

        Raises
        ------
        DataError
            If there are none: it is no run folder.
        ConfigError
            If they are damaged.
        """
        if not self.config.exists():
            raise DataError(f"{self.path} is not a run folder: it has no {RunFolder.config.name}")
        return load_settings(self.config)

    def trained(self) -> Settings:
        """Return the settings of a run that has a checkpoint; raises as :meth:`settings`."""
        settings = self.settings()
        if not self.weights.exists():
            raise DataError(f"{self.path} has no checkpoint: the run has not finished a round")
        return settings

    @property
    def weights(self) -> Path:
        """The first layer's weights, in the checkpoint."""
        return self.checkpoint / "first_layer.safetensors"

    def node_rows(self) -> list[dict[str, Any]]:
        """Return what the server has seen of each node, as of its last round.

        Raises
        ------
        ConfigError
            If there is nothing of the kind.
        """
        try:
            return list(json.loads(self.nodes.read_text(encoding="utf-8")))
        except OSError:
            raise ConfigError(f"{self.path} holds no {self.nodes.name}: it is written as nodes come") from None
        except ValueError:
            raise ConfigError(f"{self.nodes} is damaged") from None

    def rounds(self) -> list[str]:
        """Return the lines of the rounds so far; one that is still being written is none."""
        return lines(self.metrics)


def lines(path: Path) -> list[str]:
    """Return a text file's whole lines, without their ends; none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError:
        return []


def run_bundle(folder: Path) -> "Bundle":
    """Return the device's half of a run's last checkpoint.

    Raises
    ------
    FedsplitError
        If the run has none, or its data set, which says what a record is, cannot be opened.
    """
    from fedsplit.plan.experiment import Experiment

    run = RunFolder(folder)
    return bundle_of(Experiment(run.trained()), run)


def bundle_of(experiment: "Experiment", run: RunFolder) -> "Bundle":
    """Return the device's half of a run, whose checkpoint's weights the experiment's first layer gets."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    from fedsplit.device.bundle import Bundle

    layer, source = experiment.model.first_layer, experiment.source
    try:
        layer.load_weights(load(run.weights.read_bytes()))
    except (OSError, SafetensorError, RuntimeError):
        raise DataError(f"{run.weights} is damaged, or of another model") from None
    dtype = experiment.settings.protocol.dtype
    return Bundle(layer, experiment.policy, dtype, source.scaling, source.task, source.outputs)
