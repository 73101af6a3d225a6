"""What recordings hold, as their files have it: CSV, Parquet (with pyarrow), EDF and BDF (with edfio)."""

import csv
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.data.resampling import UNLABELLED, FloatArray, Labels, labels_on_grid

_MISSING = ("", "na", "n/a", "nan", "null", "none")
_ROWS = 100_000  # of a CSV file at a time: text takes many times the memory of numbers
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """Where files keep times, labels and channels; the defaults fit files that use the names used here.

    Attributes
    ----------
    columns : mapping of str to str
        Column or signal by channel, where its name is another.
    units : mapping of str to str
        Unit by channel, where the file does not say it right; a table (CSV, Parquet) never says it, and is taken to be
        in the wanted unit.
    time : str
        A table's column of seconds, or of ISO 8601 timestamps (without a zone: UTC).
    rate : float, optional
        The rate of a table's rows in Hz, in place of a time column.
    label : str
        A table's column of labels, which are compared as text. EDF files have annotations.
    upsample : bool
        Whether channels of a rate below the wanted one are interpolated, instead of refused.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    time: str = "time"
    rate: float | None = None
    label: str = "label"
    upsample: bool = False


@dataclass(frozen=True)
class Signal:
    """A channel as its file holds it: values (NaN: missing) at ascending seconds; unit None if the file says none."""

    times: FloatArray
    values: FloatArray
    unit: str | None = None


@dataclass(frozen=True)
class Raw:
    """What a file holds.

    Attributes
    ----------
    signals : list of Signal
        In the order in which they were asked for.
    labels : callable
        Takes start, rate and count of a grid and returns its labels.
    origin : float
        Seconds since 1970 (UTC) at time 0, if the file says it apart from its times.
    """

    signals: list[Signal]
    labels: Callable[[float, float, int], Labels]
    origin: float = 0.0


Reader = Callable[[Path, Sequence[str], Layout, Mapping[str, int] | None], Raw]
"""Takes a file, the columns or signals that are wanted, its layout, and numbers by label (None: labels are not read).

Raises DataError in one line, and ConfigError if a package is missing.
"""


def read_csv(path: Path, columns: Sequence[str], layout: Layout, numbers: Mapping[str, int] | None) -> Raw:
    """Read a table of text in UTF-8 with a header, separated by commas, semicolons or tabs.

    It is a :data:`Reader`.

    Parameters
    ----------
    path : Path
    columns : sequence of str
        The wanted columns.
    layout : Layout
        Which columns hold times and labels.
    numbers : mapping of str to int, optional
        Numbers by label. Without it labels are not read.

    Raises
    ------
    DataError
        If the file cannot be read, or a column is missing; in one line, without a value of the file.
    """
    wanted = _wanted(columns, layout, numbers)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            separator = max(",;\t", key=header.count)
            names = [name.strip() for row in csv.reader([header], delimiter=separator) for name in row]
            places = _places(path, names, [column for column, _ in wanted])
            parts = list(_parts(path, csv.reader(file, delimiter=separator), len(names), places, wanted))
    except (UnicodeDecodeError, csv.Error):
        raise DataError(f"{path}: cannot be read as CSV in UTF-8") from None
    if not parts:
        raise DataError(f"{path}: has no rows")
    return _table(path, [np.concatenate(column) for column in zip(*parts, strict=True)], len(columns), layout)


def read_parquet(path: Path, columns: Sequence[str], layout: Layout, numbers: Mapping[str, int] | None) -> Raw:
    """Read a Parquet table.

    It is a :data:`Reader`.

    Parameters
    ----------
    path : Path
    columns : sequence of str
        The wanted columns.
    layout : Layout
        Which columns hold times and labels.
    numbers : mapping of str to int, optional
        Numbers by label. Without it labels are not read.

    Raises
    ------
    DataError
        If the file cannot be read, or a column is missing; in one line, without a value of the file.
    ConfigError
        If pyarrow is missing.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(f"{path}: Parquet files need pyarrow: pip install 'fedsplit[recordings]'") from None
    wanted = _wanted(columns, layout, numbers)
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _places(path, names, [column for column, _ in wanted])
            table = file.read(columns=list({column for column, _ in wanted}))
    except pa.ArrowException as error:
        raise DataError(f"{path}: cannot be read as Parquet ({type(error).__name__})") from None
    if not table.num_rows:
        raise DataError(f"{path}: has no rows")
    found = [_arrow(table.column(column), convert) for column, convert in wanted]
    for (column, convert), array in zip(wanted, found, strict=True):
        if array is None:
            raise DataError(f"{path}: column {column!r} is {'no time' if convert is _times else 'not of numbers'}")
    return _table(path, found, len(columns), layout)


def read_edf(path: Path, columns: Sequence[str], layout: Layout, numbers: Mapping[str, int] | None) -> Raw:
    """Read signals of an EDF or BDF file by their labels, and its annotations as labels.

    It is a :data:`Reader`.

    Parameters
    ----------
    path : Path
    columns : sequence of str
        The wanted signals.
    layout : Layout
        Not used: the format says it all.
    numbers : mapping of str to int, optional
        Numbers by label. Without it labels are not read.

    Raises
    ------
    DataError
        If the file cannot be read, or a signal is missing; in one line, without a value of the file.
    ConfigError
        If edfio is missing.
    """
    try:
        import edfio
    except ImportError:
        raise ConfigError(f"{path}: EDF files need edfio: pip install 'fedsplit[recordings]'") from None
    read = edfio.read_bdf if path.suffix.lower() == ".bdf" else edfio.read_edf
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            file = read(path, header_encoding="latin-1")
            names = list(file.labels)
            places = _places(path, names, columns, "signal")
            if not file.is_continuous:
                raise DataError(f"{path}: has interruptions (EDF+D): export it as EDF+C, or as CSV with its times")
            signals = _edf_signals([file.signals[place] for place in places])
            origin = _edf_origin(file)
            marks = [] if numbers is None else [a for a in file.annotations if a.text.strip() in numbers]
    except (DataError, OSError):
        raise
    except Exception as error:  # edfio shows damage as whatever it stumbles over
        raise DataError(f"{path}: cannot be read as {path.suffix[1:].upper()} ({type(error).__name__})") from None
    for warning in warned:
        _log.warning("%s: %s", path, warning.message)
    spans = [(a.onset, a.onset + (a.duration or 0.0), (numbers or {})[a.text.strip()]) for a in marks]
    return Raw(signals, lambda start, rate, count: _marked(spans, start, rate, count), origin)


def _edf_signals(found: Sequence[Any]) -> list[Signal]:
    times: dict[tuple[int, float], FloatArray] = {}
    signals = []
    for signal in found:
        values, rate = np.asarray(signal.data, np.float64), float(signal.sampling_frequency)
        own = times.setdefault((len(values), rate), np.arange(len(values)) / rate)
        signals.append(Signal(own, values, signal.physical_dimension.strip()))
    return signals


def _edf_origin(file: Any) -> float:
    try:
        return float(file.startdatetime.replace(tzinfo=UTC).timestamp())
    except ValueError:  # taken out, so that nobody knows when it was
        return 0.0


def _marked(spans: list[tuple[float, float, int]], start: float, rate: float, count: int) -> Labels:
    """Number the samples within annotations; one without duration marks one sample."""
    labels = np.full(count, UNLABELLED, np.int16)
    for begin, end, number in spans:
        first, last = (max(0, int(np.ceil((at - start) * rate - 1e-6))) for at in (begin, end))
        part = labels[first : max(last, first + 1)]
        np.maximum(part, number, out=part)
    return labels


Converter = Callable[[Iterable[str]], Any]


def _wanted(columns: Sequence[str], layout: Layout, numbers: Mapping[str, int] | None) -> list[tuple[str, Converter]]:
    """Return the columns of a table in order, and what converts their text: channels, then time, then labels."""
    wanted: list[tuple[str, Converter]] = [(column, _floats) for column in columns]
    if layout.rate is None:
        wanted.append((layout.time, _times))
    if numbers is not None:
        known = numbers
        wanted.append((layout.label, lambda cells: np.array([known.get(c, UNLABELLED) for c in cells], np.int16)))
    return wanted


def _floats(cells: Iterable[str]) -> FloatArray:
    return np.array([np.nan if cell.lower() in _MISSING else float(cell) for cell in cells])


def _times(cells: Iterable[str]) -> FloatArray:
    cells = list(cells)
    try:
        return _floats(cells)
    except ValueError:
        return np.array([np.nan if cell.lower() in _MISSING else _timestamp(cell) for cell in cells])


def _timestamp(text: str) -> float:
    found = datetime.fromisoformat(text)
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _places(path: Path, names: Sequence[str], wanted: Sequence[str], kind: str = "column") -> list[int]:
    for name in wanted:
        if names.count(name) != 1:
            known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            several = "several" if name in names else "no"
            raise DataError(f"{path}: has {several} {kind} {name!r}; it has {known or 'none'}")
    return [names.index(name) for name in wanted]


def _parts(
    path: Path, rows: Iterator[list[str]], width: int, places: list[int], wanted: list[tuple[str, Converter]]
) -> Iterator[list[Any]]:
    """Convert some rows at a time."""
    line = 2
    while part := list(islice(rows, _ROWS)):
        for i, row in enumerate(part):
            if len(row) not in (0, width):
                raise DataError(f"{path}: row {line + i} has {len(row)} cells, the header {width}")
        cells = [[row[place].strip() for row in part if row] for place in places]
        if cells[0]:
            yield [_converted(path, *each, line) for each in zip(cells, wanted, strict=True)]
        line += len(part)


def _converted(path: Path, cells: list[str], wanted: tuple[str, Converter], line: int) -> Any:
    column, convert = wanted
    try:
        return convert(cells)
    except ValueError:  # told again cell by cell, without its text: that is a record's value
        for i, cell in enumerate(cells):
            try:
                convert([cell])
            except ValueError:
                kind = "neither seconds nor an ISO 8601 timestamp" if convert is _times else "no number"
                raise DataError(f"{path}: row {line + i} of column {column!r} is {kind}") from None
        raise DataError(f"{path}: column {column!r} has seconds and timestamps: it must have one of them") from None


def _arrow(column: Any, convert: Converter) -> Any:
    """Return an Arrow column as an array; None if its type does not fit."""
    import pyarrow as pa

    text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    try:
        if convert is _times and pa.types.is_timestamp(column.type):
            nanoseconds = column.cast(pa.timestamp("ns", column.type.tz)).cast(pa.int64())
            return nanoseconds.to_numpy() / 1e9
        if convert in (_floats, _times) and not text:
            numeric = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
            fits = any(is_numeric(column.type) for is_numeric in numeric)
            return np.asarray(column.cast(pa.float64()).to_numpy(), np.float64) if fits else None
        return convert("" if cell is None else cell.strip() for cell in column.cast(pa.string()).to_pylist())
    except (ValueError, pa.ArrowException):
        return None


def _table(path: Path, found: list[Any], channels: int, layout: Layout) -> Raw:
    """Put a table's columns together, as :func:`_wanted` orders them."""
    values, others = found[:channels], found[channels:]
    times = others.pop(0) if layout.rate is None else np.arange(len(values[0])) / layout.rate
    if np.isnan(times).any():
        raise DataError(f"{path}: column {layout.time!r} lacks the time of {np.isnan(times).sum()} rows")
    if not (np.isfinite(times).all() and (np.diff(times) > 0).all()):
        later = "with --file-rate rows are taken as evenly spaced"
        raise DataError(f"{path}: column {layout.time!r} must be finite and rise from row to row ({later})")
    labels = others[0] if others else np.empty(0, np.int16)
    return Raw(
        [Signal(times, each) for each in values],
        lambda start, rate, count: labels_on_grid(times, labels, start=start, rate=rate, count=count),
    )
