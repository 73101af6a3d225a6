"""Devices that are watched: what is normal for each, scores of what it does, and a page of them all.

A device calibrates with releases of normal recordings; then it sends episodes, and is told whether they are something
new. Neither here nor on the page is there ever a record.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedsplit.common.errors import ConfigError, DataError, WireError
from fedsplit.common.files import replacing
from fedsplit.server.novelty.space import Normal
from fedsplit.service.app import TOKEN, body_of, problems
from fedsplit.service.pages import add_page
from fedsplit.service.served import Served
from fedsplit.wire.query import EPISODE, LONGEST, SHORTEST, WATCHED_NAME
from fedsplit.wire.release import Release

_PAGE = Path(__file__).parent / "fleet_page"
_KEPT, _SHOWN = 600, 120  # episodes of a device
_MOST_RECORDINGS = 256  # that a device may call normal
_MOST = 10_000  # devices, each with some kilobytes for every recording that it called normal
_UNKNOWN = "{device!r} has not calibrated: it must send what is normal first"


@dataclass
class Watched:
    """A device: what is normal for it, how long a record takes, and its last episodes (unix time, score, alarm)."""

    normal: Normal
    seconds: float
    threshold: float
    episodes: deque[tuple[float, float, bool]] = field(default_factory=lambda: deque(maxlen=_KEPT))


class Fleet:
    """The devices that a novelty model watches.

    Parameters
    ----------
    served : Served
        Of a task that watches.
    folder : Path
        Where what is normal for devices is kept.
    false_alarms : float
        A day and device, above 0.

    Raises
    ------
    ConfigError
        If the folder cannot be used.
    DataError
        If a file in it is damaged, or the run has tested too few normal records for a threshold.
    """

    def __init__(self, served: Served, folder: Path, false_alarms: float) -> None:
        assert served.detector is not None
        self.served, self.detector = served, served.detector
        self._folder, self._false_alarms = folder, false_alarms
        self._space = sha256(self.detector.space.mean.tobytes() + self.detector.space.whitening.tobytes()).digest()
        self._limit(1.0)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.devices = {path.stem: self._read(path) for path in sorted(folder.glob("*.safetensors"))}
        except OSError as error:
            raise ConfigError(f"{folder} cannot be used: {error.strerror}") from None

    def _limit(self, seconds: float) -> float:
        return self.detector.threshold(self._false_alarms, seconds)

    def _read(self, path: Path) -> Watched:
        try:
            found = load(path.read_bytes())
            centres, spreads, (seconds,) = found["centres"], found["spreads"], found["seconds"].tolist()
            if found["space"].tobytes() != self._space or not SHORTEST <= seconds <= LONGEST:
                raise ValueError
            if centres.shape != (len(spreads), len(self.detector.space.mean)) or not np.isfinite(centres).all():
                raise ValueError
            if not (np.isfinite(spreads).all() and spreads.min(initial=1) > 0):
                raise ValueError
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise DataError(f"{path} is damaged, or of another model: without it the device calibrates anew") from None
        return Watched(Normal(centres, spreads), seconds, self._limit(seconds))

    def calibrate(self, device: str, release: Release, recordings: Sequence[int], seconds: float) -> Watched:
        """Take a device's records as what is normal for it, in place of what was.

        Parameters
        ----------
        recordings : sequence of int
            How many records each recording has.

        Raises
        ------
        WireError
            If the records are others, or too few or too alike to say what is normal.
        """
        if sum(recordings) != len(release.counts) or min(recordings) < 1:
            raise WireError(f"recordings must be counts of the {len(release.counts)} records")
        if len(recordings) > _MOST_RECORDINGS:
            raise WireError(f"recordings must be at most {_MOST_RECORDINGS}, got {len(recordings)}")
        units = self.served.units(release)
        if not np.isfinite(units).all():
            raise WireError("values give no finite scores")
        try:
            normal = Normal.of(units, np.repeat(np.arange(len(recordings)), recordings))
        except DataError as error:
            raise WireError(str(error)) from None
        watched = Watched(normal, seconds, self._limit(seconds))
        content = {"centres": normal.centres, "spreads": normal.spreads, "seconds": np.array([seconds])}
        with replacing(self._folder / f"{device}.safetensors") as new:
            new.write_bytes(save(content | {"space": np.frombuffer(self._space, np.uint8)}))
        self.devices[device] = watched
        return watched

    def judge(self, device: str, release: Release) -> dict[str, Any]:
        """Return the scores of an episode's records, the episode's, the threshold, and whether that is an alarm.

        Raises
        ------
        WireError
            If there are not :data:`EPISODE` records.
        """
        if len(release.counts) != EPISODE:
            raise WireError(f"an episode must be {EPISODE} records, got {len(release.counts)}")
        watched, units = self.devices[device], self.served.units(release)
        scores, score = watched.normal.scores(units), watched.normal.episode_score(units)
        if not (np.isfinite(scores).all() and np.isfinite(score)):
            raise WireError("values give no finite scores")
        alarm = bool(score > watched.threshold)
        watched.episodes.append((round(time.time(), 3), score, alarm))
        return {"scores": scores.tolist(), "episode": score, "threshold": watched.threshold, "alarm": alarm}


def add_fleets(app: FastAPI, fleets: Sequence[Fleet], watchers: Sequence[str]) -> None:
    """Add calibration, scores and the page to a service.

    Parameters
    ----------
    app : FastAPI
        If it has tokens, a device has the name of its token and sees only itself.
    fleets : sequence of Fleet
    watchers : sequence of str
        Names of the tokens that see all devices.
    """
    by_name = {fleet.served.name: fleet for fleet in fleets}
    busy = asyncio.Lock()  # the trunk has hooks while it works

    def known(request: Request, name: str) -> tuple[Fleet, str]:
        owner: str = request.app.state.let_in(request)
        if name not in by_name:
            raise HTTPException(404, f"there is no model {name[:64]!r} here that watches devices")
        return by_name[name], owner

    @asynccontextmanager
    async def releases(name: str, device: str, request: Request) -> AsyncIterator[tuple[Fleet, Release]]:
        fleet, owner = known(request, name)
        if not WATCHED_NAME.fullmatch(device):
            raise HTTPException(422, "a device's name must be 1..64 letters, digits, '_', '.' and '-'")
        if owner not in ("", device):
            raise HTTPException(403, f"this token is of {owner!r}: a device is called what its token is called")
        if device not in fleet.devices and len(fleet.devices) >= _MOST:
            raise HTTPException(503, f"{_MOST} devices are watched already")
        async with body_of(request, fleet.served) as payload:
            try:
                release = fleet.served.read(payload)
                async with busy:
                    yield fleet, release
            except WireError as error:
                raise HTTPException(422, str(error)) from None

    octets = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
    extra = {"requestBody": {"required": True, **octets}, **TOKEN}
    asked = problems(400, 401, 403, 404, 408, 413, 422, 429, 503)

    @app.post("/v1/models/{name}/devices/{device}/normal", openapi_extra=extra, responses=asked)
    async def normal(
        name: str,
        device: str,
        request: Request,
        recordings: Annotated[str, Query(pattern=r"^\d{1,6}(,\d{1,6})*$", max_length=10_000)],
        seconds: Annotated[float, Query(ge=SHORTEST, le=LONGEST)],
    ) -> Response:
        """Say what is normal for a device: a packed query of some recordings' records, and how many each has."""
        async with releases(name, device, request) as (fleet, release):
            counts = [int(count) for count in recordings.split(",")]
            watched = await asyncio.to_thread(fleet.calibrate, device, release, counts, seconds)
        return JSONResponse({"device": device, "records": len(release.counts), "threshold": watched.threshold})

    @app.post("/v1/models/{name}/devices/{device}/episode", openapi_extra=extra, responses={**asked, **problems(409)})
    async def episode(name: str, device: str, request: Request) -> Response:
        """Say how new an episode is: a packed query of its records."""
        async with releases(name, device, request) as (fleet, release):
            if device not in fleet.devices:
                raise HTTPException(409, _UNKNOWN.format(device=device))
            return JSONResponse(await asyncio.to_thread(fleet.judge, device, release))

    @app.get("/v1/models/{name}/devices", openapi_extra=TOKEN, responses=problems(401, 404, 422, 429))
    async def devices(
        name: str, request: Request, last: Annotated[int, Query(ge=1, le=_KEPT)] = _SHOWN
    ) -> dict[str, Any]:
        """The devices that are watched, and their last scores."""
        fleet, owner = known(request, name)
        rows = [
            {
                "name": device,
                "threshold": watched.threshold,
                "seconds": watched.seconds,
                "episodes": [*watched.episodes][-last:],
            }
            for device, watched in sorted(fleet.devices.items())
            if owner in ("", device, *watchers)
        ]
        return {"episode": EPISODE, "now": round(time.time(), 3), "devices": rows}

    add_page(app, "fleet", _PAGE)
