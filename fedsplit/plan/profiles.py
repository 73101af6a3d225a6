"""What the devices of a simulation would need: ``[devices.profile]`` and its presets."""

import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedsplit.common.tables import Section
from fedsplit.plan.values import Rate, Seconds, Turn


class LogNormal(Section):
    """A lognormal distribution over devices: exp(ln median + sigma z), with z normal."""

    median: Rate
    sigma: Annotated[float, Field(ge=0, le=10)]


class OnOff(Section):
    """Times, in mean seconds and exponentially distributed, for which a device is there and away by turns."""

    on: Turn
    off: Turn


class ProfileSettings(Section):
    """``[devices.profile]``: what each device can do, on a virtual clock. In simulation only.

    A lognormal quantity is a table ``{ median = m, sigma = s }``; each device draws its own value.

    Attributes
    ----------
    preset
        Typical figures for all keys below. A key that is given wins over the preset's.
    compute
        Speed, relative to one core of this machine.
    uplink
        Mbit/s (10^6 bits) from the device.
    downlink
        Mbit/s (10^6 bits) to the device.
    latency
        Seconds of a round trip, once per exchange.
    availability
        The probability that a device is there in a round, or the mean seconds for which it is on and off by turns.
    dropout
        The probability that a device is lost during an exchange.
    trace
        A CSV file of what devices could do at which time; see :class:`fedsplit.server.virtual.trace.Trace`.
    trace_period
        Seconds after which the trace begins again.
    release_seconds
        Seconds that one core of this machine needs to release one record. Measured, anew for each run, if absent.
    gradient_seconds
        Seconds that one core of this machine needs for one record's gradient. Measured if absent.
    """

    preset: Literal["phones-4g", "wearables-ble", "hospital-lan"] | None = None
    compute: Rate | LogNormal | None = None
    uplink: Rate | LogNormal | None = None
    downlink: Rate | LogNormal | None = None
    latency: Annotated[float, Field(ge=0, allow_inf_nan=False)] | LogNormal | None = None
    availability: Annotated[float, Field(gt=0, le=1)] | OnOff | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    trace: str | None = None
    trace_period: Seconds | None = None
    release_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    gradient_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    def filled(self) -> "ProfileSettings":
        """Return the profile with the preset's figures in place of those that are not given, or an ideal device's."""
        ideal = {"compute": 1.0, "latency": 0.0, "availability": 1.0, "dropout": 0.0}
        given = self.model_dump(by_alias=True, exclude_none=True)
        return ProfileSettings.model_validate({**ideal, **presets().get(self.preset or "", {}), **given})

    @model_validator(mode="after")
    def _period(self) -> "ProfileSettings":
        if self.trace_period is not None and self.trace is None:
            raise ValueError("trace-period is for a trace")
        return self


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Return the typical figures of some kinds of devices; the file says where they come from."""
    return tomllib.loads((Path(__file__).parent / "presets.toml").read_text(encoding="utf-8"))
