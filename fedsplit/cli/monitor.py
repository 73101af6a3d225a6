"""The command ``fedsplit monitor``."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsplit.cli.console import stderr
from fedsplit.common.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fedsplit.data import Scaling
    from fedsplit.data.formats import Layout
    from fedsplit.data.recipe import Recipe
    from fedsplit.device.bundle import Bundle
    from fedsplit.device.monitor import Monitor

    Stretch = tuple[Any, Any]  # records in order, and when each is complete

Texts = list[str] | None


def monitor(
    recording: Annotated[
        Path, typer.Argument(help="What is replayed: consecutive records as .npy, .npz or .csv, or with --recipe raw.")
    ],
    device: Annotated[Path, typer.Option(help="What fedsplit export wrote.")],
    home: Annotated[Path, typer.Option(help="The device's own folder, made by fedsplit node init.")],
    server: Annotated[str, typer.Option(help="The service, https://HOST:PORT.")],
    name: Annotated[str, typer.Option(help="What the device is called there: its token's name.")],
    normal: Annotated[
        list[Path] | None, typer.Option(help="Calibrate first: a recording of something normal; repeatable.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="How recordings become records (windows.toml).")] = None,
    column: Annotated[Texts, typer.Option(help="With --recipe: CHANNEL=NAME of it in these files; repeatable.")] = None,
    unit: Annotated[Texts, typer.Option(help="With --recipe: CHANNEL=UNIT of it in these files.")] = None,
    time_: Annotated[str, typer.Option("--time", help="With --recipe: column of times in CSV and Parquet.")] = "time",
    file_rate: Annotated[float | None, typer.Option(help="With --recipe: rows a second, if no column says it.")] = None,
    seconds: Annotated[float | None, typer.Option(help="From one record to the next; a recipe says it, too.")] = None,
    speed: Annotated[float, typer.Option(help="How much faster than in life it is replayed; 0: at once.")] = 1.0,
    ca: Annotated[Path | None, typer.Option(help="The authority (ca.crt) of the server's certificate.")] = None,
    insecure: Annotated[bool, typer.Option(help="No TLS: for a trial on one machine.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each episode.")] = False,
) -> None:
    """Replay a recording that stays here, and say when something new happens in it; the token is in FEDSPLIT_TOKEN."""
    from fedsplit.cli.predict import remote
    from fedsplit.cli.windows import layout_of
    from fedsplit.device.bundle import Bundle
    from fedsplit.device.home import Home
    from fedsplit.device.monitor import Monitor, WithheldError
    from fedsplit.device.predictor import Predictor
    from fedsplit.wire.query import EPISODE, LONGEST, SHORTEST

    own = Home(home)
    bundle = Bundle.load(device, own.allowed)
    if not bundle.task.watches:
        raise ConfigError(f"the model in {device} predicts: see fedsplit predict")
    if not 0 <= speed < float("inf"):
        raise ConfigError(f"--speed must be at least 0, got {speed:g}")
    read: Callable[[Path], list[Stretch]]
    if recipe is None:
        if column or unit or time_ != "time" or file_rate is not None:
            raise ConfigError("--column, --unit, --time and --file-rate say how recordings are read with --recipe")
        if seconds is None or not SHORTEST <= seconds <= LONGEST:
            said = f"--seconds from one record to the next must be {SHORTEST:g} to {LONGEST:g}"
            raise ConfigError(f"{said}, got {seconds}, or --recipe say it")
        step, read = seconds, partial(_records, shape=bundle.layer.input_shape, seconds=seconds)
    else:
        if seconds is not None:
            raise ConfigError("--seconds: is in the recipe already")
        made = _checked(recipe, bundle)
        step, read = made.stride, partial(_windows, recipe=made, layout=layout_of(made, column, unit, time_, file_rate))
    stretches = read(recording)
    if all(len(records) < EPISODE for records, _ in stretches):
        raise DataError(f"{recording}: has no {EPISODE} consecutive records, which are judged together")
    own.check()
    service = remote(server, bundle.model, ca, insecure=insecure)
    watched = Monitor(Predictor(bundle, own, service), service, name)
    if normal:
        known = [records for path in normal for records, _ in read(path)]
        threshold = watched.calibrate(known, step)
        stderr.print(f"calibrated with {sum(map(len, known))} records: alarms above {threshold:.3f}", highlight=False)
    episodes = alarms = 0
    withheld = None
    for passed, record in _in_time(stretches, watched, speed):
        try:
            found = watched.take(record)
        except WithheldError as error:
            withheld = error
            said = json.dumps({"seconds": passed, "withheld": str(error)}) if as_json else f"{_clock(passed)}  {error}"
            print(said, flush=True)
            continue
        if found is None:
            continue
        episodes, alarms = episodes + 1, alarms + found.alarm
        if as_json:
            line = {"seconds": passed, "score": found.episode, "threshold": found.threshold, "alarm": found.alarm}
            print(json.dumps(line), flush=True)
        else:
            said = "ALARM" if found.alarm else "normal"
            print(f"{_clock(passed)}  {found.episode:6.2f} of {found.threshold:.2f}  {said}", flush=True)
    if withheld and not episodes:
        raise withheld
    stderr.print(f"{alarms} of {episodes} episodes of {EPISODE} records raised an alarm", highlight=False)


def _records(path: Path, shape: tuple[int, ...], seconds: float) -> list["Stretch"]:
    """Read a file of records that follow each other."""
    import numpy as np

    from fedsplit.cli.predict import read_records

    records = read_records(path, shape)
    if records.shape[1:] != shape or not len(records):
        raise DataError(f"{path}: must hold records of shape {shape}, got an array of shape {records.shape}")
    return [(records, seconds * np.arange(1, len(records) + 1))]


def _windows(path: Path, recipe: "Recipe", layout: "Layout") -> list["Stretch"]:
    """Read a recording and cut it into windows; a gap ends a stretch."""
    import numpy as np

    windows = recipe.cut(recipe.read(path, layout, labelled=False))
    if not len(windows):
        raise DataError(f"{path}: no window is left, all have gaps")
    gaps = np.flatnonzero(np.diff(windows.times) > 1.5 * recipe.stride) + 1
    return list(zip(np.split(windows.x, gaps), np.split(windows.times, gaps), strict=True))


def _checked(path: Path, bundle: "Bundle") -> "Recipe":
    """Read a recipe that goes with a model."""
    from fedsplit.data.recipe import read_recipe

    recipe, wanted = read_recipe(path), bundle.layer.input_shape
    if recipe.shape != wanted:
        raise DataError(f"{path} makes records of shape {recipe.shape}, the model takes {wanted}")
    if recipe.stride < recipe.seconds:  # a device that is watched has no ledger of segments
        raise DataError(f"{path} makes windows that overlap: what they share would leave several times, and count once")
    if _changes(recipe.scaling) and _changes(bundle.scaling):
        raise DataError(f"{path} scales records, and so does the model, which wants subtract 0 and divide 1")
    return recipe


def _changes(scaling: "Scaling") -> bool:
    return any(scaling.subtract) or any(number != 1 for number in scaling.divide)


def _in_time(stretches: list["Stretch"], watched: "Monitor", speed: float) -> Iterator[tuple[float, Any]]:
    """Yield each record, and when it is complete, at that time; what follows a gap begins a new episode."""
    began = time.monotonic()
    for records, times in stretches:
        watched.begin()
        for record, passed in zip(records, times.tolist(), strict=True):
            if speed and (wait := began + passed / speed - time.monotonic()) > 0:
                time.sleep(min(wait, threading.TIMEOUT_MAX))
            yield passed, record


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
