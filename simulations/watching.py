"""Watches the wrists of three people whose data trained nothing, over TLS, and takes a picture of the fleet's page.

    fedsplit simulate configs/wearables-novelty.toml --out runs/novelty
    python simulations/watching.py runs/novelty --out docs

Each of their six watches calibrates with the first third of its known exercises, and goes through the rest of all of
them, the new one last. Prints when alarms were raised. The picture needs what `simulations/demo.py` needs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from demo import DESKTOP, browser, element, installed, resize, screenshot, wait
from processes import free_port, wait_for_port

from fedsplit.common.certs import CA, make_certificates
from fedsplit.data import wearables
from fedsplit.device.bundle import Bundle
from fedsplit.device.home import Home
from fedsplit.device.monitor import Monitor, WithheldError
from fedsplit.device.predictor import Predictor
from fedsplit.device.remote import Remote
from fedsplit.plan.settings import load_settings
from fedsplit.runs.folder import run_bundle
from fedsplit.service.tokens import add_token

SECONDS = wearables.WINDOW / 50  # of a window
WATCHER = "nurse"


def raw_windows(device: int) -> dict[int, np.ndarray]:
    """Return a device's raw windows ``(windows, 6, 100)`` by exercise."""
    pool = wearables.load(overlap=False)
    assert pool.owners is not None
    mine = pool.owners == device
    raw = pool.scaling.undo(pool.x[mine])
    return {exercise: raw[pool.y[mine] == exercise] for exercise in np.unique(pool.y[mine]).tolist()}


@contextmanager
def serving(run: Path, folder: Path, false_alarms: float) -> Iterator[str]:
    """Serve a run over TLS; the value is its address."""
    make_certificates(folder / "certs", ["127.0.0.1"])
    port = free_port()
    command = [str(Path(sys.executable).with_name("fedsplit")), "serve", str(run), "--port", str(port)]
    command += ["--certs", str(folder / "certs"), "--tokens", str(folder / "tokens"), "--watcher", WATCHER]
    process = subprocess.Popen([*command, "--false-alarms", str(false_alarms)])
    try:
        wait_for_port("127.0.0.1", port)
        yield f"https://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def watch(device: int, novel: int, bundle: Bundle, folder: Path, url: str, token: str) -> str:
    """Calibrate a watch, go through its exercises, and say when alarms were raised."""
    name = f"watch-{device}"
    remote = Remote(url, bundle.model, token, folder / "certs" / CA)
    home = Home.create(folder / name, [0])
    monitor = Monitor(Predictor(bundle, home, remote), remote, name)
    windows = raw_windows(device)
    third = {exercise: len(records) // 3 for exercise, records in windows.items()}
    monitor.calibrate([records[: third[e]] for e, records in windows.items() if e != novel], SECONDS)
    said = []
    for exercise in [*(e for e in windows if e != novel), novel]:
        rest = windows[exercise][third[exercise] :]
        monitor.begin()
        verdicts, withheld = [], 0
        for number, record in enumerate(rest, start=1):
            try:
                verdicts.append((number, monitor.take(record)))
            except WithheldError:
                withheld += 1
        alarms = [number for number, verdict in verdicts if verdict and verdict.alarm]
        first = f" (first after {SECONDS * alarms[0]:g} s)" if alarms else ""
        kept = f" ({withheld} windows withheld)" if withheld else ""
        judged = sum(verdict is not None for _, verdict in verdicts)
        said.append(f"{wearables.CLASSES[exercise]} {len(alarms)} of {judged}{first}{kept}")
    return f"{name}: alarms in {', '.join(said)}"


def main() -> None:
    """Watch all held-out devices, and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run of configs/wearables-novelty.toml")
    parser.add_argument("--false-alarms", type=float, default=10.0, help="a day and device")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    settings = load_settings(options.run / "config.toml")
    novel, devices = settings.data.novel, settings.devices.test
    assert novel is not None and isinstance(devices, list)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = {who: add_token(folder / "tokens", who) for who in (WATCHER, *(f"watch-{d}" for d in devices))}
        with serving(options.run, folder, options.false_alarms) as url:
            for device in devices:
                print(watch(device, novel, run_bundle(options.run), folder, url, tokens[f"watch-{device}"]), flush=True)
            if not installed():
                return
            with browser() as driver:
                resize(driver, *DESKTOP)
                driver.get(f"{url}/fleet/")
                wait(driver, "!document.getElementById('entry').hidden")
                element(driver, "token").send_keys(tokens[WATCHER], "\ue007")
                wait(driver, f"document.querySelectorAll('section').length == {len(devices)}")
                screenshot(driver, options.out / "fleet.png")


if __name__ == "__main__":
    main()
