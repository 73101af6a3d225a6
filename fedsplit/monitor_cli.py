"""The command ``fedsplit monitor``."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsplit.console import stderr
from fedsplit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fedsplit.data import Scaling
    from fedsplit.prediction.bundle import Bundle
    from fedsplit.prediction.monitor import Monitor

    Stretch = tuple[Any, Any]  # records in order, and when each is complete


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
    seconds: Annotated[float | None, typer.Option(help="From one record to the next; a recipe says it, too.")] = None,
    speed: Annotated[float, typer.Option(help="How much faster than in life it is replayed; 0: at once.")] = 1.0,
    ca: Annotated[Path | None, typer.Option(help="The authority (ca.crt) of the server's certificate.")] = None,
    insecure: Annotated[bool, typer.Option(help="No TLS: for a trial on one machine.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each episode.")] = False,
) -> None:
    """Replay a recording that stays here, and say when something new happens in it; the token is in FEDSPLIT_TOKEN."""
    from fedsplit.home import Home
    from fedsplit.prediction.bundle import Bundle
    from fedsplit.prediction.monitor import Monitor, WithheldError
    from fedsplit.prediction.predictor import Predictor
    from fedsplit.prediction_cli import remote
    from fedsplit.wire import EPISODE

    bundle = Bundle.load(device)
    if bundle.task != "novelty":
        raise ConfigError(f"the model in {device} predicts: see fedsplit predict")
    if not 0 <= speed < float("inf"):
        raise ConfigError(f"--speed must be at least 0, got {speed:g}")
    stretches, step = _read(recording, bundle, recipe, seconds)
    if all(len(records) < EPISODE for records, _ in stretches):
        raise DataError(f"{recording}: has no {EPISODE} consecutive records, which are judged together")
    own = Home(home)
    own.check()
    service = remote(server, bundle.model, ca, insecure=insecure)
    watched = Monitor(Predictor(bundle, own, service), service, name)
    if normal:
        known = [records for path in normal for records, _ in _read(path, bundle, recipe, seconds)[0]]
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


def _read(path: Path, bundle: "Bundle", recipe: Path | None, seconds: float | None) -> tuple[list["Stretch"], float]:
    """Return a recording's stretches without gaps, and the seconds from one record to the next."""
    import numpy as np

    from fedsplit.data.formats import Layout
    from fedsplit.data.recipe import read_recipe
    from fedsplit.prediction_cli import read_records
    from fedsplit.wire import LONGEST, SHORTEST

    wanted = bundle.layer.input_shape
    if recipe is None:
        if seconds is None or not SHORTEST <= seconds <= LONGEST:
            said = f"--seconds from one record to the next must be {SHORTEST:g} to {LONGEST:g}"
            raise ConfigError(f"{said}, got {seconds}, or --recipe say it")
        records = read_records(path, wanted)
        if records.shape[1:] != wanted or not len(records):
            raise DataError(f"{path}: must hold records of shape {wanted}, got an array of shape {records.shape}")
        return [(records, seconds * np.arange(1, len(records) + 1))], seconds
    if seconds is not None:
        raise ConfigError("--seconds: is in the recipe already")
    made = read_recipe(recipe)
    if made.shape != wanted:
        raise DataError(f"{recipe} makes records of shape {made.shape}, the model takes {wanted}")
    if made.stride < made.seconds:  # a device that is watched has no ledger of segments
        raise DataError(
            f"{recipe} makes windows that overlap: what they share would leave several times, and count once"
        )
    if _changes(made.scaling) and _changes(bundle.scaling):
        raise DataError(f"{recipe} scales records, and so does the model, which wants subtract 0 and divide 1")
    windows = made.cut(made.read(path, Layout(), labelled=False))
    if not len(windows):
        raise DataError(f"{path}: no window is left, all have gaps")
    gaps = np.flatnonzero(np.diff(windows.times) > 1.5 * made.stride) + 1
    return list(zip(np.split(windows.x, gaps), np.split(windows.times, gaps), strict=True)), made.stride


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
