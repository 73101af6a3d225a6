"""What tests of a device are given to watch: recordings, a run and a home."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from movements import NEW, RATES, done_by, moving, normal_of, watched_settings

from fedsplit import simulate
from fedsplit.device.home import Home
from fedsplit.runs.folder import run_bundle
from fedsplit.service.served import Served


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the records of six devices, of which the last two only test."""
    folder = tmp_path_factory.mktemp("devices")
    for device in range(6):
        x, y = done_by(device, RATES if device < 4 else (*RATES, NEW))
        test = "_test" if device >= 4 else ""
        np.savez(folder / f"{device}.npz", **{f"x{test}": x, f"y{test}": y})
    return folder


@pytest.fixture(scope="session")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder of the task, trained once."""
    out = tmp_path_factory.mktemp("runs") / "run"
    simulate(watched_settings(folder), out=out)
    return out


@pytest.fixture
def watching(run: Path, tmp_path: Path) -> Served:
    return Served.of_run(run)


@pytest.fixture
def own(tmp_path: Path) -> Home:
    home = Home.create(tmp_path / "home", [4])
    (home.folder / "limits.toml").write_text("equations = 0.9\nleverage = 1.0\n")
    return home


@pytest.fixture
def asks(run: Path, own: Home, tmp_path: Path) -> list[Any]:
    """Return the command's arguments but for the recording and the server."""
    run_bundle(run).save(tmp_path / "device")
    for number, records in enumerate(normal_of()):
        np.save(tmp_path / f"normal-{number}.npy", records)
    np.save(tmp_path / "known.npy", moving(RATES[1] * 1.08, 20, 51))
    np.save(tmp_path / "new.npy", moving(NEW, 12, 51))
    return ["--device", tmp_path / "device", "--home", own.folder, "--name", "watch", "--insecure"]
