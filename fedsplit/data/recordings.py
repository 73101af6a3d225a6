"""A user's own recordings of several channels, read at one rate and in the wanted units.

Times are in seconds. What cannot be used is refused in one line that names the file and the channel.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.errors import DataError
from fedsplit.data.formats import Layout, Reader, Signal, read_csv, read_edf, read_parquet
from fedsplit.data.resampling import UNLABELLED, Labels, native_rate, on_grid

READERS: dict[str, Reader] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".edf": read_edf,
    ".bdf": read_edf,
}

# What may become what: the quantity that a unit measures, and how much of it.
UNITS: dict[str, tuple[str, float]] = {
    "V": ("voltage", 1.0),
    "mV": ("voltage", 1e-3),
    "uV": ("voltage", 1e-6),
    "nV": ("voltage", 1e-9),
    "m/s2": ("acceleration", 1.0),
    "g": ("acceleration", 9.80665),
    "mg": ("acceleration", 9.80665e-3),
    "rad/s": ("rotation", 1.0),
    "deg/s": ("rotation", math.pi / 180),
    "T": ("magnetic field", 1.0),
    "mT": ("magnetic field", 1e-3),
    "uT": ("magnetic field", 1e-6),
}
_SPELLINGS = {"m/s^2": "m/s2", "m/s²": "m/s2", "dps": "deg/s", "°/s": "deg/s"}
_LARGEST = 1e30  # numbers are float32, of which this leaves room to interpolate and to scale
_SLOWER = 0.99  # of the wanted rate: a recorder's clock may be that slow


@dataclass(frozen=True)
class Channel:
    """A wanted channel and its unit. Without a unit values stay as in the file, which then must not name one."""

    name: str
    unit: str = ""


@dataclass(frozen=True)
class Recording:
    """Channels sampled together.

    Attributes
    ----------
    path : Path
        For the errors of what is made of it.
    values : float32 array (channels, samples)
        In the wanted units; NaN in gaps.
    rate : float
        In Hz, of all channels.
    labels : int16 array (samples,) or None
        Numbers of labels, -1 where there is none.
    start : float
        Time of the first sample in seconds: as the file's time column has it, or since 1970 (UTC) where it has dates.
    """

    path: Path
    values: NDArray[np.float32]
    rate: float
    labels: Labels | None = None
    start: float = 0.0

    @property
    def samples(self) -> int:
        """How many samples each channel has, those in gaps included."""
        return int(self.values.shape[1])


def read_recording(
    path: Path | str,
    channels: Sequence[Channel],
    rate: float,
    *,
    fill: float = 0.0,
    numbers: Mapping[str, int] | None = None,
    otherwise: int = UNLABELLED,
    layout: Layout | None = None,
) -> Recording:
    """Read some channels of a recording at one rate.

    Parameters
    ----------
    path : Path or str
        A file with one of the suffixes in :data:`READERS`. CSV and Parquet: a column for each channel. EDF and BDF: a
        signal for each, without interruptions.
    channels : sequence of Channel
        In the order of the result.
    rate : float
        In Hz; :mod:`fedsplit.data.resampling` says how other rates become it, and with which error.
    fill : float
        The longest time in seconds between two samples of a channel that is bridged by a straight line.
    numbers : mapping of str to int, optional
        By label: its number. Where several are at once, the highest counts. None: labels are not read.
    otherwise : int
        The number where there is none of these labels.
    layout : Layout, optional
        How the file holds this.

    Raises
    ------
    ConfigError
        If the format needs a package that is not installed.
    DataError
        In one line with the file and the channel: if it cannot be read, lacks a channel, or a channel is constant,
        empty, too slow or in a unit that cannot become the wanted one.

    Notes
    -----
    Missing numbers of a channel are left out before its rate is found: the channels of a table may have their own.
    """
    path, layout = Path(path), layout or Layout()
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: must be a file of one of {', '.join(READERS)}")
    columns = [layout.columns.get(channel.name, channel.name) for channel in channels]
    try:
        raw = READERS[path.suffix.lower()](path, columns, layout, numbers)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from None
    where = [f"{path}: channel {channel.name!r}" for channel in channels]
    signals = [_converted(*each, layout) for each in zip(raw.signals, channels, where, strict=True)]
    rates = [_native(signal, rate, layout, at) for signal, at in zip(signals, where, strict=True)]
    start = float(min(signal.times[0] for signal in signals))
    count = int((max(signal.times[-1] for signal in signals) - start) * rate + 1e-6) + 1
    values = [
        on_grid(signal.times, signal.values, native=native, start=start, rate=rate, count=count, fill=fill)
        for signal, native in zip(signals, rates, strict=True)
    ]
    labels = None
    if numbers is not None:
        labels = raw.labels(start, rate, count)
        labels[labels == UNLABELLED] = otherwise
    return Recording(path, np.stack(values), rate, labels, raw.origin + start)


def conversion(found: str, wanted: str) -> float | None:
    """Return what numbers in one unit are multiplied by to be in another; None if they cannot be.

    >>> conversion("uV", "mV")
    0.001
    """
    found, wanted = _spelled(found), _spelled(wanted)
    if found == wanted:
        return 1.0
    if found not in UNITS or wanted not in UNITS or UNITS[found][0] != UNITS[wanted][0]:
        return None
    return float(f"{UNITS[found][1] / UNITS[wanted][1]:.15g}")


def _spelled(unit: str) -> str:
    plain = unit.strip().replace("\u00b5", "u").replace("\u03bc", "u")  # both of Unicode's micro signs
    return _SPELLINGS.get(plain, plain)


def _converted(signal: Signal, channel: Channel, where: str, layout: Layout) -> Signal:
    """Return what is known of a signal, in the wanted unit."""
    unit = layout.units.get(channel.name, channel.unit if signal.unit is None else signal.unit)
    factor = conversion(unit, channel.unit)
    if factor is None and not channel.unit:
        raise DataError(f"{where} is in {unit}: say which unit is wanted, as in --channel {channel.name}={unit}")
    if factor is None:
        raise DataError(f"{where} is in {unit or 'no unit that its file says'}, which cannot become {channel.unit}")
    known = ~np.isnan(signal.values)
    if (np.abs(signal.values[known]) * max(1.0, factor) > _LARGEST).any():
        raise DataError(f"{where} holds infinity, or numbers as large")
    if not known.any():
        raise DataError(f"{where} holds no numbers")
    times = signal.times if known.all() else signal.times[known]  # not copied: signals of a file share them
    values = signal.values[known] * factor
    if values.min() == values.max():
        raise DataError(f"{where} is constant: its sensor may have been off")
    return Signal(times, values, channel.unit)


def _native(signal: Signal, rate: float, layout: Layout, where: str) -> float:
    native = native_rate(signal.times, where)
    if native < _SLOWER * rate and not layout.upsample:
        said = "if times are seconds and that is right, --upsample interpolates it"
        raise DataError(f"{where} has {native:.4g} Hz, less than the {rate:g} Hz that are wanted ({said})")
    return native
