"""What changes from round to round: learning rates, the devices that take part, the records they are asked for."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedsplit.common.seeds import seed_of

Row = tuple[int, int, int, int]


@dataclass
class Schedule:
    """Asks each device for the next part of its own random order of its records.

    Attributes
    ----------
    once : bool
        Whether no record is asked for twice.
    chunk : int or str
        Records per device and round; ``epoch``: all of them; ``spread`` (once): an even share of each
        device's records in every round.
    fraction : float
        Of the devices that have training records, sampled anew in each round.
    rounds, seed : int
        Of the run.
    sampling : str
        ``uniform``: every device is as likely; ``size``: one after another without replacement, each with a
        probability proportional to its number of records. With a fixed ``chunk`` records are then about as likely on
        any device; with a growing one large devices count twice, by how often they are asked and by how much they give.
        ``fair``: those whose releases came least often so far, by chance among equals.
    over_sampling : float
        How many times as many devices are asked as are wanted.
    position : dict
        By device: records asked for so far (once) or chunks.
    heard : dict
        By device: how often its releases came.
    """

    once: bool
    chunk: int | str
    fraction: float
    rounds: int
    seed: int
    sampling: str = "uniform"
    over_sampling: float = 1.0
    position: dict[int, int] = field(default_factory=dict)
    heard: dict[int, int] = field(default_factory=dict)
    _counts: dict[int, int] = field(default_factory=dict)

    def set_counts(self, counts: Mapping[int, int]) -> None:
        """Say which devices are there and how many training records each has."""
        self._counts = {int(d): int(n) for d, n in counts.items() if n}

    @property
    def largest_round(self) -> int:
        """The most records that any round can bring, of the devices that are there."""
        sizes = sorted(n if isinstance(self.chunk, str) else min(n, self.chunk) for n in self._counts.values())
        return sum(sizes[-self._asked(len(sizes)) :])

    def enough(self, asked: int) -> int | None:
        """Return how many of the devices that are asked are to answer in a round; None: all of them.

        Of a cohort some have nothing left to release, and are not asked: then fewer are wanted, too.
        """
        if self.over_sampling == 1 or not asked:
            return None
        devices = len(self._counts)
        return math.ceil(asked * self._wanted(devices) / self._asked(devices))

    def waiting(self) -> list[int]:
        """Return the devices that have records which they will still be asked for, ascending."""
        return sorted(d for d, n in self._counts.items() if not self.once or self.position.get(d, 0) < n)

    def leave_out(self, devices: Collection[int]) -> None:
        """Forget some devices until counts are set again."""
        self._counts = {d: n for d, n in self._counts.items() if d not in devices}

    def rows(self, round_number: int) -> dict[int, Row]:
        """Return (device, pass, start, stop) by device, and advance the positions."""
        rows = {}
        for device in self._sample(round_number):
            row = self._row(device, self._counts[device], round_number)
            if row[2] < row[3]:
                rows[device] = row
                self.position[device] = row[3] if self.once else self.position.get(device, 0) + 1
        return rows

    def not_released(self, device: int, start: int) -> None:
        """Ask again for what a device could not release; where records come round again anyway, its turn is over."""
        if self.once:
            self.position[device] = start

    def note_heard(self, devices: Iterable[int]) -> None:
        """Count devices whose releases came."""
        for device in devices:
            self.heard[device] = self.heard.get(device, 0) + 1

    def _sample(self, round_number: int) -> list[int]:
        devices = sorted(self._counts)
        if self.fraction == 1.0 or not devices:
            return devices
        rng = np.random.default_rng(seed_of(self.seed, "cohort", round_number))
        size = self._asked(len(devices))
        if self.sampling == "fair":
            return sorted(sorted(rng.permutation(devices).tolist(), key=lambda d: self.heard.get(d, 0))[:size])
        counts = np.array([self._counts[d] for d in devices])
        likely = counts / counts.sum() if self.sampling == "size" else None
        return sorted(rng.choice(devices, size, replace=False, p=likely).tolist())

    def _asked(self, devices: int) -> int:
        """Return how many of so many devices are asked in a round."""
        return min(devices, math.ceil(self.over_sampling * self._wanted(devices)))

    def _wanted(self, devices: int) -> int:
        return max(1, round(self.fraction * devices))

    def _row(self, device: int, count: int, round_number: int) -> Row:
        at = self.position.get(device, 0)
        if self.once:
            return device, 0, at, self._single_pass_stop(at, count, round_number)
        if isinstance(self.chunk, str):
            return device, at, 0, count
        chunks = -(-count // self.chunk)
        start = at % chunks * self.chunk
        return device, at // chunks, start, min(start + self.chunk, count)

    def _single_pass_stop(self, at: int, count: int, round_number: int) -> int:
        if self.chunk == "epoch":
            return count
        if isinstance(self.chunk, str):
            return count * round_number // self.rounds
        return min(at + self.chunk, count)
