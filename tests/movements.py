"""Devices that move as they always did, or in a new way, and what watches them."""

from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI

from fedsplit.device.home import Home
from fedsplit.device.monitor import Monitor
from fedsplit.device.predictor import Predictor
from fedsplit.device.remote import Remote
from fedsplit.plan.settings import check_settings
from fedsplit.runs.folder import RunFolder, run_bundle
from fedsplit.service.app import service
from fedsplit.service.fleet import Fleet, add_fleets
from fedsplit.service.served import Served
from fedsplit.service.tokens import Tokens

FLEET = RunFolder.fleet.name
RATES = (0.25, 0.45, 0.65)  # radians a sample: what a device does in its recordings
NEW = 1.3


def moving(rate: float, count: int, seed: int) -> np.ndarray:
    """Return records (2, 32) of one movement, at any phase."""
    rng = np.random.default_rng([seed, round(1000 * rate)])
    time = np.arange(32) + rng.uniform(0, 30, size=(count, 1, 1))
    waves = np.sin(rate * time + np.array([0.0, 1.0])[:, None])
    return (waves + 0.1 * rng.normal(size=waves.shape)).astype(np.float32)


def done_by(device: int, rates: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return 20 records of each movement, as this device does it."""
    x = np.concatenate([moving(rate * (1 + 0.02 * device), 20, device) for rate in rates])
    return x, np.repeat(np.arange(len(rates)), 20)


def watched_settings(folder: Path, **changes: dict[str, Any]) -> Any:
    chosen: dict[str, Any] = {
        "run": {"name": "watched", "rounds": 15, "engine": "inline"},
        "data": {"folder": str(folder), "task": "novelty", "outputs": 3},
        "devices": {"test": [4, 5]},
        "public": {"devices": [0], "epochs": 5},
        "model": {"name": "sensor-cnn", "width": 8},
        "dropping": {"policy": "top-k", "k": 32},
        "protocol": {"mode": "release-once", "batch-size": 32},
        "trunk": {"lr": 0.005, "schedule": "cosine", "thinning": 0.5},
    }
    for section, values in changes.items():
        chosen[section] = chosen.get(section, {}) | values
    return check_settings(chosen)


def fleet_of(served: Served, tmp_path: Path, false_alarms: float = 500.0) -> Fleet:
    return Fleet(served, tmp_path / FLEET, false_alarms)


def app_of(fleet: Fleet, tokens: Tokens | None = None, watchers: tuple[str, ...] = ()) -> FastAPI:
    app = service([fleet.served], tokens)
    add_fleets(app, [fleet], watchers)
    return app


def monitor_of(run: Path, home: Home, url: str, name: str = "watch", token: str | None = None) -> Monitor:
    bundle = run_bundle(run)
    remote = Remote(url, bundle.model, token, None)
    return Monitor(Predictor(bundle, home, remote), remote, name)


def normal_of(device: int = 4) -> list[np.ndarray]:
    return [moving(rate * (1 + 0.02 * device), 12, 50) for rate in RATES]
