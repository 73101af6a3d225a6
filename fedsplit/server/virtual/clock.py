"""A clock that moves on by what devices would have needed, and says whose answers came in time.

All times are whole microseconds. The server's own work and evaluations take none.
"""

import csv
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import IntArray
from fedsplit.common.errors import RunError
from fedsplit.common.files import replacing
from fedsplit.common.seeds import seed_of
from fedsplit.server.virtual.profile import Profile
from fedsplit.server.virtual.trace import NEVER, QUANTITIES, SECOND

_ATTEMPTS = 100_000  # looks for devices, after which a round is given up
_FATES = ("late", "lost", "spare", "away")
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Work:
    """What one exchange asks of some devices.

    Attributes
    ----------
    devices : int64 array (devices,)
        Ids, ascending.
    bytes_down, bytes_up : int64 arrays (devices,)
        Of the message to each device and of its answer.
    seconds : float64 array (devices,)
        What one core of this machine needs for each device's part.
    counts : bool array (devices,), optional
        Whose answers are what the exchange is for, where it is over as soon as there are enough; default: all.
    """

    devices: IntArray
    bytes_down: IntArray
    bytes_up: IntArray
    seconds: NDArray[np.floating[Any]]
    counts: Flags | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of the devices of an exchange, in the order of :attr:`Work.devices`; each is in one of the four.

    Attributes
    ----------
    heard : bool array (devices,)
        Their answers came in time.
    late : bool array
        They came after the deadline.
    lost : bool array
        They worked and sent, and were never heard.
    spare : bool array
        They came after enough others had.
    finish : int64 array (devices,)
        Microseconds from the beginning of the exchange to the answer, had it not been lost.
    duration : int
        Microseconds that the exchange took the server.
    """

    heard: Flags
    late: Flags
    lost: Flags
    spare: Flags
    finish: IntArray
    duration: int


@dataclass
class Counts:
    """What the clock has seen of each device; int64 arrays (devices,).

    ``away`` counts rounds that began without it; ``asked``, ``heard``, ``late``, ``lost`` and ``spare`` exchanges;
    ``released`` are training records whose releases have left it, ``wasted`` those of them that were never heard,
    ``answered`` those whose gradient it has computed. ``busy`` are microseconds of its own computing.
    """

    away: IntArray
    asked: IntArray
    heard: IntArray
    late: IntArray
    lost: IntArray
    spare: IntArray
    bytes_down: IntArray
    bytes_up: IntArray
    released: IntArray
    wasted: IntArray
    answered: IntArray
    busy: IntArray


@dataclass
class _Round:
    """What has happened in a round so far."""

    number: int = 0
    exchanges: int = 0
    heard: set[int] = field(default_factory=set)
    fates: dict[str, set[int]] = field(default_factory=lambda: {name: set() for name in _FATES})


class VirtualClock:
    """Simulated time.

    Parameters
    ----------
    profile : Profile
    limit : float
        Seconds after which an exchange takes no more answers.
    seed : int
        Of the run.
    """

    def __init__(self, profile: Profile, limit: float, seed: int) -> None:
        self.profile = profile
        self.limit = round(limit * SECOND)
        self.now = 0
        self.counts = Counts(*(np.zeros(profile.count, dtype=np.int64) for _ in fields(Counts)))
        self._seed = seed
        self._round = _Round()

    def begin(self, round_number: int) -> None:
        """Begin a round."""
        self._round = _Round(round_number)

    def there(self, devices: IntArray, least: int, *, must: bool = True) -> IntArray:
        """Wait until enough devices are there, and return which ones.

        Parameters
        ----------
        devices : int64 array (devices,)
            Ids of the devices that count.
        least : int
            How many of them are enough.
        must : bool
            Whether the round needs so many. Otherwise, if there will never be so many, those that are there are
            returned.

        Raises
        ------
        RunError
            If the round needs more devices than there will ever be at once.
        """
        presence, number = self.profile.presence, self._round.number
        for attempt in range(_ATTEMPTS):
            found = presence.there(self.now, number, attempt)[devices]
            enough = int(found.sum()) >= least
            change = self.now if enough else presence.next_change(self.now, devices)
            in_vain = change >= NEVER or (not enough and attempt == 0 and presence.hopeless(devices, least) is not None)
            if enough or (in_vain and not must):
                away = devices[~found]
                self.counts.away[away] += 1
                self._round.fates["away"].update(away.tolist())
                return devices[found]
            if in_vain:
                break
            self.now = change
        raise RunError(
            f"round {number} cannot begin: after {self.now / SECOND:g} simulated seconds there are still not {least} "
            f"devices at once (devices.profile, protocol.min-nodes)"
        )

    def exchange(self, work: Work, enough: int | None = None) -> Outcome:
        """Move the clock on by an exchange.

        It is over with the answer of the ``enough``-th device that counts; without ``enough``, or where it is not
        reached, with the last answer if all have answered, else at the limit: a server cannot know that nobody else
        will come.
        """
        self._round.exchanges += 1
        finish = self.duration(work)
        gone = self.profile.presence.gone_at(self.now)[work.devices]
        lost = self._drop(work.devices) | (self.now + finish > gone)
        in_time = ~lost & (finish <= self.limit)
        heard, duration = in_time, int(finish.max(initial=0)) if in_time.all() else self.limit
        order = np.lexsort([work.devices, finish])  # of two at the same time the lower id is first
        counts = in_time if work.counts is None else in_time & work.counts
        first = order[counts[order]][:enough]
        if enough is not None and len(first) == enough:
            duration = int(finish[first[-1]])
            heard = in_time & ~counts & (finish <= duration)
            heard[first] = True
        outcome = Outcome(heard, ~lost & ~in_time, lost, in_time & ~heard, finish, duration)
        self._note(work, outcome)
        self.now += duration
        return outcome

    def duration(self, work: Work) -> IntArray:
        """Return how long each device needs from now on, in microseconds: int64 array (devices,)."""
        can = {name: values[work.devices] for name, values in self.profile.at(self.now).items()}
        down, up = (
            8e-6 * size / can[link] for size, link in ((work.bytes_down, "downlink"), (work.bytes_up, "uplink"))
        )
        return _micro(can["latency"] + down + work.seconds / can["compute"] + up)

    def _drop(self, devices: IntArray) -> Flags:
        draw = np.random.default_rng(seed_of(self._seed, "dropout", self._round.number, self._round.exchanges))
        return np.asarray(draw.random(self.profile.count)[devices] < self.profile.dropout)

    def _note(self, work: Work, outcome: Outcome) -> None:
        devices, counts, compute = work.devices, self.counts, self.profile.at(self.now)["compute"]
        counts.asked[devices] += 1
        counts.bytes_down[devices] += work.bytes_down
        counts.bytes_up[devices] += work.bytes_up
        counts.busy[devices] += _micro(work.seconds / compute[devices])
        for name in ("heard", "late", "lost", "spare"):
            those = devices[getattr(outcome, name)]
            getattr(counts, name)[those] += 1
            (self._round.heard if name == "heard" else self._round.fates[name]).update(those.tolist())

    def note_records(self, work: Work, outcome: Outcome, released: IntArray, answered: IntArray) -> None:
        """Count the records of an exchange that devices have released, and those whose gradient they have computed.

        Parameters
        ----------
        work : Work
        outcome : Outcome
            The releases of devices that are not heard are wasted.
        released, answered : int64 arrays (devices,)
            Records of each of ``work.devices``.
        """
        self.counts.released[work.devices] += released
        self.counts.wasted[work.devices] += np.where(outcome.heard, 0, released)
        self.counts.answered[work.devices] += answered

    def report(self) -> dict[str, Any]:
        """Return a round's metrics: seconds and mean bytes of a device so far, how many were heard and who was not."""
        fates = {name: sorted(devices) for name, devices in self._round.fates.items()}
        told = self.summary()
        sizes = {f"device_{name}": told[name]["mean"] for name in ("bytes_up", "bytes_down")}
        return {"simulated_seconds": self.now / SECOND, "heard": len(self._round.heard), **fates, **sizes}

    def summary(self) -> dict[str, Any]:
        """Return a run's figures: seconds, what a device that took part sent, who was heard how often."""
        took_part = (self.counts.asked > 0) | (self.counts.away > 0)
        counts = {name: values[took_part] for name, values in vars(self.counts).items()}
        heard, devices = counts["heard"], max(1, int(took_part.sum()))
        squares = int((heard**2).sum())
        return {
            "seconds": self.now / SECOND,
            **{
                name: {"mean": round(float(counts[name].sum()) / devices, 1), "most": int(counts[name].max(initial=0))}
                for name in ("bytes_up", "bytes_down")
            },
            **{name: int(counts[name].sum()) for name in ("heard", *_FATES, "released", "wasted")},
            "participation": {
                "least": int(heard.min()) if len(heard) else 0,
                "mean": round(float(heard.sum()) / devices, 3),
                "most": int(heard.max(initial=0)),
                # of 1 if all are heard as often, 1/devices if it is always the same one (Jain et al. 1984)
                "jain": round(float(heard.sum()) ** 2 / (devices * squares), 4) if squares else None,
            },
        }

    def save_table(self, path: Path) -> None:
        """Write a line for each device: what it can do at the end, and its counts; ``busy`` in seconds."""
        columns = {name: values.round(6) for name, values in self.profile.at(self.now).items() if name in QUANTITIES}
        columns |= {**vars(self.counts), "busy": self.counts.busy / SECOND}
        with replacing(path) as new, new.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["device", *columns])
            writer.writerows(zip(range(self.profile.count), *(c.tolist() for c in columns.values()), strict=True))

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {"now": self.now, "counts": vars(self.counts)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.now, self.counts = state["now"], Counts(**state["counts"])


def _micro(seconds: NDArray[np.floating[Any]]) -> IntArray:
    return np.asarray(np.rint(np.minimum(seconds * SECOND, NEVER / 2)), dtype=np.int64)
