"""How long a run takes, and what ``result.json`` says of it in the end."""

import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import flwr
import numpy as np
import torch

from fedsplit.guard.gaussian import epsilon
from fedsplit.server.progress import Progress

DELTA = 1e-5  # of the epsilon that results tell


class Stopwatch:
    """A run's seconds: until its nodes are there, in its rounds, and in all.

    Parameters
    ----------
    clock : callable
        Returns the time in seconds.
    created : float, optional
        When the run was made; default: now.
    """

    def __init__(self, clock: Callable[[], float], created: float | None = None) -> None:
        self.clock = clock
        self.created = clock() if created is None else created
        self.training = 0.0
        self._registered = self._lap = self.created

    def begin(self) -> None:
        """Note that the nodes are there, and the first round begins."""
        self._registered = self._lap = self.clock()

    def lap(self) -> float:
        """Note that a round is over; return its seconds."""
        now = self.clock()
        seconds, self._lap = now - self._lap, now
        self.training += seconds
        return seconds

    def table(self) -> dict[str, float]:
        """Return the seconds so far."""
        return {
            "startup": round(self._registered - self.created, 3),
            "training": round(self.training, 3),
            "total": round(self.clock() - self.created, 3),
        }


def outcome(progress: Progress, watch: Stopwatch, guard_mode: str, **known: Any) -> dict[str, Any]:
    """Return a run's result: its scores, its totals and the versions of the software.

    Parameters
    ----------
    progress : Progress
    watch : Stopwatch
    guard_mode : str
        The setting ``guard.mode``, or ``by each owner`` in a deployment.
    **known
        ``name``, ``seed``, ``devices`` and ``nodes``.
    """
    evaluation = progress.evaluation or {"test_accuracy": None, "test_loss": None}
    totals = {**vars(progress.totals)}
    ledger, refused, test_refused = (totals.pop(key) for key in ("ledger", "refused", "test_refused"))
    return {
        "name": known["name"],
        **evaluation,
        "rounds": progress.round_number,
        "devices": known["devices"],
        "nodes": known["nodes"],
        **totals,
        "samples_per_second": round(totals["samples"] / watch.training, 1) if watch.training else None,
        "seconds": watch.table(),
        "ledger": _ledger(ledger),
        "guard": {"mode": guard_mode, "refused": refused, "test_refused": test_refused},
        "seed": known["seed"],
        "versions": {
            "fedsplit": version("fedsplit"),
            "flwr": flwr.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def _ledger(most: dict[str, float]) -> dict[str, Any]:
    """Return the most that has left of any training record, for people: what has no bound says so."""
    precision, fisher, leverage = (most.get(key, 0.0) for key in ("precision", "fisher", "leverage"))
    return {
        "releases": int(most.get("releases", 0)),
        "equations": int(most.get("equations", 0)),
        "bits": int(most.get("bits", 0)),
        "gradient_leverage": most.get("gradient", 0.0),
        "leverage": None if np.isnan(leverage) else leverage,
        "epsilon": "unbounded" if np.isinf(precision) else epsilon(precision, DELTA),
        "delta": DELTA,
        "dfil": "unbounded" if np.isinf(fisher) else fisher,
    }
