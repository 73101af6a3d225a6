"""A device that is watched, on real recordings."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CONFIGS
from fastapi import FastAPI
from movements import FLEET, app_of
from predictions import listening

from fedsplit import simulate
from fedsplit.common.certs import CA
from fedsplit.data import Scaling, wearables
from fedsplit.device.home import Home
from fedsplit.runs.folder import run_bundle
from fedsplit.service.fleet import Fleet
from fedsplit.service.served import Served
from fedsplit.service.tokens import Tokens, add_token
from fedsplit.wire.query import EPISODE


def _recorded(app: FastAPI, bodies: list[bytes]) -> Any:
    """Return the application, which also notes the bodies of requests."""

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        async def listen() -> Any:
            message = await receive()
            bodies.append(message.get("body", b""))
            return message

        await app(scope, listen, send)

    return noting


def _watch_recordings(person: int, side: int) -> dict[str, np.ndarray]:
    """Return the raw samples ``(samples, 6)`` of somebody's exercises."""
    found = wearables._read()
    mine = (found["subject"] == person) & (found["side"] == side)
    chosen = np.flatnonzero(mine).tolist()
    return {wearables.CLASSES[found["y"][i]]: found["X"][i] for i in chosen}


def _cut(samples: np.ndarray) -> np.ndarray:
    windows = len(samples) // wearables.WINDOW
    return samples[: windows * wearables.WINDOW].reshape(windows, wearables.WINDOW, 6).transpose(0, 2, 1)


@pytest.mark.slow
def test_a_new_exercise_raises_an_alarm_and_ten_minutes_of_a_known_one_none(certificates: Path, tmp_path: Path) -> None:
    """The command as a process, over TLS, on a watch of somebody whose data trained nothing; no body holds a record."""
    run, novel = tmp_path / "run", "ROW"
    simulate(CONFIGS / "wearables-novelty.toml", overrides=["run.engine=inline", "audit.targets=0"], out=run)
    samples, third = _watch_recordings(9, 1), {}
    for exercise, recording in samples.items():
        border = len(recording) // 3
        third[exercise] = _cut(recording[:border])
        samples[exercise] = recording[border:]
    known = np.concatenate([samples["IR"]] * (30_000 // len(samples["IR"]) + 1))[:30_000]  # at 50 Hz
    for name, records in {"known": _cut(known), "new": _cut(samples[novel]), **third}.items():
        np.save(tmp_path / f"{name}.npy", records)
    run_bundle(run).save(tmp_path / "device")
    Home.create(tmp_path / "home", [0])
    token, bodies = add_token(tmp_path / "tokens", "watch-17"), []
    normal = [part for exercise in third if exercise != novel for part in ("--normal", f"{exercise}.npy")]
    app = app_of(Fleet(Served.of_run(run), run / FLEET, 10.0), Tokens(tmp_path / "tokens"))
    with listening(_recorded(app, bodies), certificates / "good") as url:  # type: ignore[arg-type]
        own = ["--device", "device", "--home", "home", "--name", "watch-17", "--seconds", "2", "--speed", "0", "--json"]
        there = ["--server", url, "--ca", str(certificates / "good" / CA)]
        alarms = {}
        for name, more in (("known", normal), ("new", [])):
            done = subprocess.run(
                [sys.executable, "-m", "fedsplit.cli", "monitor", f"{name}.npy", *own, *there, *more],
                cwd=tmp_path, env={**os.environ, "FEDSPLIT_TOKEN": token}, capture_output=True, text=True, timeout=200,
                check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            alarms[name] = [json.loads(line)["alarm"] for line in done.stdout.splitlines()]
    assert len(alarms["known"]) == 300 - EPISODE + 1 and not any(alarms["known"])
    assert all(alarms["new"]) and len(alarms["new"]) > 2
    _hold_no_record(b"".join(bodies), np.concatenate([_cut(known), _cut(samples[novel]), *third.values()]))


def _hold_no_record(sent: bytes, raw: np.ndarray) -> None:
    """Check that no four neighbouring numbers of a record are in what was sent, raw or scaled, in any usual dtype."""
    scaled = Scaling(tuple(wearables.MEAN.tolist()), tuple(wearables.STD.tolist())).apply(raw)
    for size, dtypes in ((32, ("<f8", ">f8")), (16, ("<f4", ">f4")), (8, ("<f2", ">f2"))):
        there = {sent[i : i + size] for i in range(len(sent) - size)}
        for numbers in (raw, scaled):
            for content in (numbers.astype(dtype).tobytes() for dtype in dtypes):
                pieces = {content[i : i + size] for i in range(0, len(content) - size, size)}
                assert not {piece for piece in pieces if len(set(piece)) > 4} & there
