"""Which devices are there, and for how long: by chance in each round, by turns, or as a trace says.

A device's fate follows from the run's seed and its id: how devices are packed into nodes does not matter.
"""

import math
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import IntArray
from fedsplit.common.seeds import seed_of
from fedsplit.server.virtual.trace import NEVER, SECOND, Trace

AGAIN = 60 * SECOND  # until chance is asked once more, where too few are there
_HOPELESS = 1e-4  # the least probability, that enough devices are there, with which it is worth waiting


class Presence(ABC):
    """Says which of the devices 0..count-1 are there; all times are microseconds of simulated time."""

    @abstractmethod
    def there(self, now: int, round_number: int, attempt: int) -> NDArray[np.bool_]:
        """Return which devices are there as a round begins.

        Parameters
        ----------
        now : int
            Microseconds of simulated time.
        round_number : int
        attempt : int
            Counts from 0 how often the round has asked.

        Returns
        -------
        bool array (count,)
            By device.
        """

    @abstractmethod
    def next_change(self, now: int, devices: IntArray) -> int:
        """Return when to ask for some devices again, :data:`NEVER` if nothing will change."""

    @abstractmethod
    def gone_at(self, now: int) -> IntArray:
        """Return by device until when it stays; ``now`` if it is away."""

    @abstractmethod
    def hopeless(self, devices: IntArray, least: int) -> str | None:
        """Return why ``least`` of the devices will never be there at once, or None."""


class ByChance(Presence):
    """Every device is there with the same probability, in each round anew, and stays for the round."""

    def __init__(self, probability: float, count: int, seed: int) -> None:
        self._probability, self._count, self._seed = probability, count, seed

    def there(self, now: int, round_number: int, attempt: int) -> NDArray[np.bool_]:
        """Draw which devices are there in a round.

        Parameters
        ----------
        now, round_number, attempt : int
            As in :meth:`Presence.there`; the draw does not depend on the time.
        """
        draws = np.random.default_rng(seed_of(self._seed, "there", round_number, attempt)).random(self._count)
        return np.asarray(draws < self._probability)

    def next_change(self, now: int, devices: IntArray) -> int:
        """Return a minute later."""
        return now + AGAIN

    def gone_at(self, now: int) -> IntArray:
        """Return :data:`NEVER`: a dropout has its own probability."""
        return np.full(self._count, NEVER, dtype=np.int64)

    def hopeless(self, devices: IntArray, least: int) -> str | None:
        """Judge by the binomial probability that so many are there."""
        return _too_rare(len(devices), least, self._probability, f"availability {self._probability:g}")


class ByTurns(Presence):
    """Every device is there and away by turns, for exponentially distributed times (a Markov chain)."""

    def __init__(self, on: float, off: float, count: int, seed: int) -> None:
        self._means, self._seed = (off * SECOND, on * SECOND), seed
        self._on = np.random.default_rng(seed_of(seed, "first turn")).random(count) < on / (on + off)
        self._turn = np.zeros(count, dtype=np.int64)
        self._until = self._lasting(0)

    def _lasting(self, turn: int) -> IntArray:
        """Return how long each device's turn of that number lasts, at least a microsecond."""
        draws = np.random.default_rng(seed_of(self._seed, "turn", turn)).exponential(size=len(self._on))
        return np.maximum(1, np.rint(draws * np.where(self._on, self._means[1], self._means[0]))).astype(np.int64)

    def _advance(self, now: int) -> None:
        while (over := self._until <= now).any():
            turn = int(self._turn[over].min())
            those = over & (self._turn == turn)
            self._on[those] ^= True
            self._turn[those] += 1
            self._until[those] += self._lasting(turn + 1)[those]

    def there(self, now: int, round_number: int, attempt: int) -> NDArray[np.bool_]:
        """Return the devices whose turn it is to be there.

        Parameters
        ----------
        now, round_number, attempt : int
            As in :meth:`Presence.there`. Times must not go backwards; the other two do not matter.
        """
        self._advance(now)
        return self._on.copy()

    def next_change(self, now: int, devices: IntArray) -> int:
        """Return when the next turn of one of them ends."""
        self._advance(now)
        return int(self._until[devices].min())

    def gone_at(self, now: int) -> IntArray:
        """Return the end of each device's turn to be there, or ``now``."""
        self._advance(now)
        return np.where(self._on, self._until, now)

    def hopeless(self, devices: IntArray, least: int) -> str | None:
        """Judge by the share of the time that a device is there."""
        off, on = (mean / SECOND for mean in self._means)
        return _too_rare(len(devices), least, on / (on + off), f"availability on {on:g}, off {off:g}")


class ByTrace(Presence):
    """As a trace's column ``available`` says."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def there(self, now: int, round_number: int, attempt: int) -> NDArray[np.bool_]:
        """Return the devices that the trace has as available.

        Parameters
        ----------
        now, round_number, attempt : int
            As in :meth:`Presence.there`; only the time matters.
        """
        return np.asarray(self._trace.at(now)["available"] == 1)

    def next_change(self, now: int, devices: IntArray) -> int:
        """Return when the next row of any device begins."""
        return self._trace.next_change(now)

    def gone_at(self, now: int) -> IntArray:
        """Return when each device is away next."""
        return self._trace.gone_at(now)

    def hopeless(self, devices: IntArray, least: int) -> str | None:
        """Compare with the most that are there at any time."""
        most = self._trace.most_at_once(devices)
        return None if most >= least else f"the trace has at most {most} there at once"


def _too_rare(devices: int, least: int, probability: float, what: str) -> str | None:
    """Say if it is hardly ever that ``least`` of so many are there."""
    logs = [
        math.lgamma(devices + 1)
        - math.lgamma(k + 1)
        - math.lgamma(devices - k + 1)
        + k * math.log(probability)
        + ((devices - k) * math.log1p(-probability) if probability < 1 else (0.0 if k == devices else -math.inf))
        for k in range(least, devices + 1)
    ]
    likely = sum(map(math.exp, logs))
    return None if likely >= _HOPELESS else f"with {what} so many are there with a probability of {likely:.1g}"
