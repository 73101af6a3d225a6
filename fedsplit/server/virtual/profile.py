"""What each device can do: drawn from distributions by its id, or as a trace says."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.errors import ConfigError
from fedsplit.common.seeds import seed_of
from fedsplit.plan.profiles import LogNormal, OnOff, ProfileSettings
from fedsplit.server.virtual.presence import ByChance, ByTrace, ByTurns, Presence
from fedsplit.server.virtual.trace import QUANTITIES, Trace

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Profile:
    """The devices of a run.

    Attributes
    ----------
    count : int
        Ids are below.
    drawn : dict
        float64 arrays (devices,) of ``compute`` (relative to one core of this machine), ``uplink`` and ``downlink``
        (Mbit/s), ``latency`` (seconds of a round trip).
    trace : Trace or None
        What it tells wins.
    presence : Presence
    dropout : float
        The probability that a device is lost in an exchange.
    """

    count: int
    drawn: dict[str, Values]
    trace: Trace | None
    presence: Presence
    dropout: float

    @classmethod
    def of(cls, settings: ProfileSettings, count: int, seed: int) -> "Profile":
        """Draw the devices of a run from its seed.

        Parameters
        ----------
        settings : ProfileSettings
        count : int
            Devices. Device i is the same whatever the count.
        seed : int
            The run's.

        Raises
        ------
        ConfigError
            If the speed of the links is not given, or the trace cannot be read.
        DataError
            If the trace does not describe these devices.
        """
        settings = settings.filled()
        trace = Trace.read(settings.trace, count, settings.trace_period) if settings.trace else None
        told = trace.columns if trace else {}
        drawn = {}
        for name in QUANTITIES:
            chosen = getattr(settings, name)
            if chosen is None:
                if name not in told:
                    raise ConfigError(f"devices.profile.{name}: missing: give it, a preset or a trace that has it")
                chosen = 1.0
            drawn[name] = _draw(chosen, count, seed_of(seed, "profile", name))
        return cls(count, drawn, trace, _presence(settings, trace, count, seed), settings.dropout or 0.0)

    def at(self, now: int) -> dict[str, Values]:
        """Return what the devices can do at a time in microseconds, as :attr:`drawn`."""
        return {**self.drawn, **self.trace.at(now)} if self.trace else self.drawn


def _draw(chosen: float | LogNormal, count: int, seed: int) -> Values:
    if not isinstance(chosen, LogNormal):
        return np.full(count, float(chosen))
    return np.asarray(chosen.median * np.exp(chosen.sigma * np.random.default_rng(seed).standard_normal(count)))


def _presence(settings: ProfileSettings, trace: Trace | None, count: int, seed: int) -> Presence:
    if trace is not None and trace.says_who_is_there:
        return ByTrace(trace)
    if isinstance(settings.availability, OnOff):
        return ByTurns(settings.availability.on, settings.availability.off, count, seed)
    return ByChance(settings.availability or 1.0, count, seed)
