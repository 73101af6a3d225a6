"""How much is found: areas under curves, and what comes of thresholds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fedsplit.server.novelty.detector import Detector
from fedsplit.server.novelty.space import Features, Normal, Space
from fedsplit.server.novelty.trunk import Judged, auc, judge
from fedsplit.wire.query import EPISODE
from simulations.health.data import KNOWN, Windows
from simulations.health.detectors import Method, Releases, Rows, Scorer

RATES = (10, 100)  # false alarms per device and day
SECONDS = 2.0  # of a window


def first_thirds(targets: Rows) -> Rows:
    """Return the rows of one device's known recordings that calibrate it."""
    parts = [np.flatnonzero(targets == r) for r in np.unique(targets[targets < KNOWN])]
    return np.concatenate([rows[: len(rows) // 3] for rows in parts])


def delays(normal: Scorer, rows: Features, targets: Rows, limit: float) -> Iterator[float]:
    """Yield the seconds until the novelty is noticed, upon each known recording; infinite if it never is."""
    new = rows[targets == KNOWN]
    for recording in np.unique(targets[targets < KNOWN]):
        stream = np.concatenate([rows[targets == recording][1 - EPISODE :], new])
        ends = range(EPISODE, len(stream) + 1)
        above = (i for i, end in enumerate(ends) if normal.episode_score(stream[end - EPISODE : end]) > limit)
        yield SECONDS * (next(above, np.inf) + 1)


@dataclass(frozen=True)
class Watched:
    """A device: how it was judged, by what, and the rows and targets of its tested windows."""

    judged: Judged
    normal: Scorer
    rows: Features
    targets: Rows

    def delays(self, limit: float) -> list[float | None]:
        """Return the seconds until the novelty is noticed, upon each known recording; None: it never is."""
        found = delays(self.normal, self.rows, self.targets, limit)
        return [delay if np.isfinite(delay) else None for delay in found]


def measured(
    method: Method, windows: Windows, releases: Releases, held_out: Sequence[int], *, own: bool, watching: bool
) -> list[dict[str, Any]]:
    """Return the measures of each person who was held out; with ``watching`` those at thresholds, too."""
    population = None if own else method.normal(releases.training)
    judged = {person: _watched(method, windows, releases, person, population) for person in held_out}
    found = []
    for person, mine in judged.items():
        others = [device.judged for other in held_out if other != person for device in judged[other]]
        at_thresholds = alarms(mine, others) if watching else {}
        found.append({"person": person, **areas([device.judged for device in mine]), **at_thresholds})
    return found


def _watched(
    method: Method, windows: Windows, releases: Releases, person: int, population: Scorer | None
) -> list[Watched]:
    """Judge the devices of a person, by their own first thirds where there is no population."""
    found, targets = [], releases.batches.targets
    for device in np.unique(windows.device[windows.person == person]):
        mine = np.flatnonzero(windows.device == device)
        first = first_thirds(targets[mine])
        rest = np.delete(mine, first)
        if population is None:
            assert method.own is not None
            normal = method.own(mine[first])
        else:
            normal = population
        rows = method.rows[rest]
        found.append(Watched(judge(cast(Normal, normal), rows, targets[rest], KNOWN), normal, rows, targets[rest]))
    return found


def areas(seen: Sequence[Judged]) -> dict[str, float]:
    """Return the measures that need no threshold, means over a person's devices."""
    return {
        "window": float(np.mean([auc(j.new, j.scores) for j in seen])),
        "precision": float(np.mean([precision(j.new, j.scores) for j in seen])),
        "episode": float(np.mean([auc(j.new_episodes, j.episodes) for j in seen])),
    }


def alarms(mine: Sequence[Watched], others: Sequence[Judged]) -> dict[str, Any]:
    """Return what comes of thresholds by other people's normal episodes."""
    known = np.concatenate([j.episodes[~j.new_episodes] for j in others])
    result: dict[str, Any] = {}
    detector = Detector(Space(np.zeros(0), np.zeros((0, 0))), known)  # for its threshold alone
    for rate in RATES:
        limit = detector.threshold(rate, SECONDS)
        above = [(device.judged.episodes > limit, device.judged.new_episodes) for device in mine]
        result[f"alarms {rate}"] = float(np.mean([a[~new].mean() for a, new in above]) * 86_400 / SECONDS)
        result[f"found {rate}"] = float(np.mean([a[new].mean() for a, new in above]))
        result[f"delays {rate}"] = [delay for device in mine for delay in device.delays(limit)]
    return result


def precision(new: NDArray[np.bool_], scores: Features) -> float:
    """Return the average precision of finding what is new."""
    found = new[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(found) / np.arange(1, len(found) + 1))[found].mean())
