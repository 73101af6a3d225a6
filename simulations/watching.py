"""Whether a service notices something new on watches of people whose data trained nothing, over TLS.

    fedsplit simulate configs/wearables-novelty.toml --out runs/novelty
    python -m simulations watching runs/novelty

Each of their six watches calibrates with the first third of its known exercises, and goes through the rest of all of
them, the new one last. Takes a picture of the fleet's page, too, `fleet.png`, if there is what the study `demo` needs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.certs import CA
from fedsplit.common.errors import ConfigError
from fedsplit.data import wearables
from fedsplit.device.bundle import Bundle
from fedsplit.device.home import Home
from fedsplit.device.monitor import Monitor, WithheldError
from fedsplit.device.predictor import Predictor
from fedsplit.device.remote import Remote
from fedsplit.runs.folder import run_bundle, run_settings
from fedsplit.service.tokens import add_token
from simulations.shared import browser
from simulations.shared.options import option
from simulations.shared.results import RESULTS, Results
from simulations.shared.serving import serving
from simulations.shared.settings import finished
from simulations.shared.tables import markdown

SECONDS = wearables.WINDOW / 50  # of a window
WATCHER = "nurse"
INLINE = ("run.engine=inline",)
Windows = NDArray[Any]


@dataclass(frozen=True)
class Options:
    """Which run, and how often an alarm may be false."""

    run: Path | None = option(
        None,
        help="folder of a finished run of configs/wearables-novelty.toml; without it one is trained",
        positional=True,
    )
    false_alarms: float = option(10.0, help="a day and device")
    watches: int = option(6, quick=1)
    set: tuple[str, ...] = option(
        (), quick=("run.rounds=2", "public.epochs=2"), help="KEY=VALUE for the run that is trained where none is given"
    )
    out: Path = option(Path("docs"), quick=RESULTS, help="folder of the picture")


@dataclass(frozen=True)
class Service:
    """Where the service is, and what its devices need to know."""

    url: str
    bundle: Bundle
    folder: Path
    tokens: dict[int, str]

    def watch(self, device: int) -> Monitor:
        """Make a new watch."""
        name, folder = f"watch-{device}", self.folder
        remote = Remote(self.url, self.bundle.model, self.tokens[device], folder / "certs" / CA)
        return Monitor(Predictor(self.bundle, Home.create(folder / name, [0]), remote), remote, name)


def study(options: Options) -> Results:
    """Watch all held-out devices, and take the picture."""
    with finished(options.run, "wearables-novelty", (*INLINE, *options.set)) as run, TemporaryDirectory() as name:
        novel, watched = held_out(run, options.watches)
        file = Path(name) / "tokens"
        token, tokens = add_token(file, WATCHER), {device: add_token(file, f"watch-{device}") for device in watched}
        limits = ("--watcher", WATCHER, "--false-alarms", str(options.false_alarms))
        with serving(run, Path(name), *limits) as url:
            service = Service(url, run_bundle(run), Path(name), tokens)
            found = [{"watch": device, "exercises": list(exercises(service, device, novel))} for device in watched]
            if browser.installed():
                photograph(url, token, len(watched), options.out)
    return {"novel": novel, "watches": found}


def held_out(run: Path, most: int) -> tuple[int, list[int]]:
    """Return a run's new exercise, and the first of the devices that it tests; raises ConfigError."""
    settings = run_settings(run)
    novel, devices = settings.data.novel, settings.devices.test
    if novel is None or not isinstance(devices, list):
        raise ConfigError(f"{run} is not a run of configs/wearables-novelty.toml")
    return novel, devices[:most]


def raw_windows(device: int) -> dict[int, Windows]:
    """Return a device's raw windows ``(windows, 6, 100)`` by exercise."""
    pool = wearables.load(overlap=False)
    assert pool.owners is not None
    mine = pool.owners == device
    raw = pool.scaling.undo(pool.x[mine])
    return {exercise: raw[pool.y[mine] == exercise] for exercise in np.unique(pool.y[mine]).tolist()}


def exercises(service: Service, device: int, novel: int) -> Iterator[dict[str, Any]]:
    """Calibrate a watch, go through its exercises, and yield when alarms were raised in each."""
    monitor, windows = service.watch(device), raw_windows(device)
    third = {exercise: len(records) // 3 for exercise, records in windows.items()}
    monitor.calibrate([records[: third[e]] for e, records in windows.items() if e != novel], SECONDS)
    for exercise in [*(e for e in windows if e != novel), novel]:
        yield {"exercise": exercise, **gone_through(monitor, windows[exercise][third[exercise] :])}


def gone_through(monitor: Monitor, records: Windows) -> dict[str, Any]:
    """Return how many windows were judged and how many withheld, and after how many seconds there were alarms."""
    monitor.begin()
    alarms, judged, withheld = [], 0, 0
    for number, record in enumerate(records, start=1):
        try:
            verdict = monitor.take(record)
        except WithheldError:
            withheld += 1
            continue
        judged += verdict is not None
        if verdict is not None and verdict.alarm:
            alarms.append(SECONDS * number)
    return {"judged": judged, "withheld": withheld, "alarms": alarms}


def photograph(url: str, token: str, watches: int, out: Path) -> None:
    """Take a picture of the fleet's page once it shows all watches."""
    out.mkdir(parents=True, exist_ok=True)
    with browser.browser() as driver:
        browser.resize(driver, *browser.DESKTOP)
        driver.get(f"{url}/fleet/")
        browser.wait(driver, "!document.getElementById('entry').hidden")
        browser.element(driver, "token").send_keys(token, "\ue007")
        browser.wait(driver, f"document.querySelectorAll('section').length == {watches}")
        browser.screenshot(driver, out / "fleet.png")


def tables(results: Results) -> str:
    """Return a row for every exercise of each watch."""
    columns = ("watch", "exercise", "windows judged", "withheld", "alarms", "the first after")
    return markdown(columns, [_cells(one["watch"], row) for one in results["watches"] for row in one["exercises"]])


def _cells(watch: int, row: dict[str, Any]) -> list[str]:
    first = f"{row['alarms'][0]:g} s" if row["alarms"] else "-"
    counts = [str(row["judged"]), str(row["withheld"]), str(len(row["alarms"]))]
    return [str(watch), wearables.CLASSES[row["exercise"]], *counts, first]
