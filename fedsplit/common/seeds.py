"""Random streams and schedules, derived by name."""

import math

import numpy as np

from fedsplit.common.errors import ConfigError
from fedsplit.common.plugins import resolve_function


def seed_of(*parts: int | str) -> int:
    """Derive a 63-bit seed from a run's seed and what it is for; equal arguments, equal stream."""
    words = [p if isinstance(p, int) else int.from_bytes(p.encode(), "little") for p in parts]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def scheduled(lr: float, schedule: str, round_number: int, rounds: int) -> float:
    """Return the learning rate of a round.

    Parameters
    ----------
    lr : float
        The rate of the first round.
    schedule : str
        ``constant``; ``cosine``, to zero after the last round; ``step``, times 0.1 after each third of the rounds; or
        ``module:function``, your own: it is given the round and the number of rounds and returns a factor.
    round_number : int
        Counted from 1.
    rounds : int
        All rounds of the run.

    Raises
    ------
    ConfigError
        If there is no such function, or it returns no finite number of at least 0.

    Examples
    --------
    >>> [scheduled(0.1, "cosine", number, 4) for number in (1, 3)]
    [0.1, 0.05]
    """
    if ":" in schedule:
        return lr * _own_factor(schedule, round_number, rounds)
    done = (round_number - 1) / rounds
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "step":
        return float(lr * 0.1 ** int(3 * done))
    return lr


def _own_factor(schedule: str, round_number: int, rounds: int) -> float:
    function = resolve_function(schedule, "schedule")
    try:
        factor = float(function(round_number, rounds))
    except Exception as error:  # a user's own code may raise anything
        raise ConfigError(f"schedule {schedule!r}: raised {type(error).__name__} in round {round_number}") from None
    if not 0 <= factor < math.inf:
        raise ConfigError(f"schedule {schedule!r} must return a finite factor of at least 0, got {factor:g}")
    return factor
