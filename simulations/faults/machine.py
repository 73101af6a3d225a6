"""Faults of a machine: a disk that is full, clocks that are wrong."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from simulations.shared.processes import Deployment, deployment


@contextmanager
def small_disk(place: Path) -> Iterator[Callable[[], None]]:
    """Mount a file system of 700 kB; the value is a function that makes it larger."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(place)], check=True)

    def grow() -> None:
        subprocess.run(["mount", "-o", "remount,size=50m", str(place)], check=True)

    try:
        yield grow
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def clocks(folder: Path) -> dict[str, str]:
    """Start nodes whose clocks are wrong; return what becomes of each."""
    found = {}
    with deployment(folder) as trial:
        for number, shift in enumerate(("-200s", "+60s")):
            trial.make_node(f"n{number}", [number])
            found[f"clock {shift}"] = _started(trial, f"n{number}", shift)
    return found


def _started(trial: Deployment, name: str, shift: str) -> str:
    preload = {"LD_PRELOAD": faketime_library(), "FAKETIME": shift, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    before, trial.environment = trial.environment, {**trial.environment, **preload}
    process = trial.start_node(name)
    trial.environment = before
    try:
        trial.wait_for(name, "connected to", timeout=20)
    except RuntimeError:
        return f"exit code {process.poll()}: {trial.log(name).strip().splitlines()[-1]}"
    return "connects"


def faketime_installed() -> bool:
    """Whether there is Debian's package faketime."""
    return bool(list(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")))


def faketime_library() -> str:
    """Return the path of libfaketime."""
    return str(min(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")))
