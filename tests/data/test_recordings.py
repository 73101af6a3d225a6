"""Recordings: what is in the files comes out, at any rate, with gaps; and what cannot be used is refused in a line."""

import datetime
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import edfio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.data import open_source
from fedsplit.data.formats import Layout
from fedsplit.data.preparing import HeldOut, find_owners, prepare
from fedsplit.data.recipe import RECIPE, Recipe, check_recipe, read_recipe
from fedsplit.data.recordings import UNITS, Channel, Recording, conversion, read_recording
from fedsplit.data.resampling import native_rate, on_grid, resample
from fedsplit.data.windows import cut

SECRET = "7654.25"  # a record's value: no error text may hold it
RATE = 100.0
XY = [Channel("ax", "g"), Channel("ay", "g")]
NUMBERS = {"rest": 0, "walk": 1}


def waves(seconds: float = 10.0, rate: float = RATE, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return times and two channels of slow waves and noise."""
    times = np.arange(round(seconds * rate)) / rate
    rng = np.random.default_rng(seed)
    phases = 2 * np.pi * np.outer([1.5, 0.7], times) + rng.uniform(0, 6, (2, 1))
    return times, np.sin(phases) + 0.1 * rng.normal(size=(2, len(times)))


def write_csv(path: Path, columns: dict[str, Any], separator: str = ",") -> Path:
    rows = [separator.join(columns), *(separator.join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def table(seconds: float = 10.0, rate: float = RATE, seed: int = 0) -> dict[str, Any]:
    times, (ax, ay) = waves(seconds, rate, seed)
    return {"time": times, "ax": ax, "ay": ay, "label": np.where(times % 4 < 2, "rest", "walk")}


def write_edf(path: Path, signals: list[tuple[str, str, float, np.ndarray]], **settings: Any) -> Path:
    """Write signals (label, unit, rate, values)."""
    kind, file = (edfio.BdfSignal, edfio.Bdf) if path.suffix == ".bdf" else (edfio.EdfSignal, edfio.Edf)
    made = [kind(v, sampling_frequency=r, label=n, physical_dimension=u) for n, u, r, v in signals]
    file(made, **settings).write(path)
    return path


# --- formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_comes_out_as_it_went_in(separator: str, tmp_path: Path):
    columns = table()
    path = write_csv(tmp_path / "a.csv", columns | {"time": columns["time"] + 5}, separator)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n")  # as spreadsheets write it
    found = read_recording(path, XY[::-1], RATE, numbers=NUMBERS)
    np.testing.assert_array_equal(found.values, np.array([columns["ay"], columns["ax"]], np.float32))
    np.testing.assert_array_equal(found.labels, [NUMBERS[name] for name in columns["label"]])
    assert (found.rate, found.start, found.values.dtype, found.samples) == (RATE, 5.0, np.float32, 1000)


def test_a_csv_without_times_has_rows_at_a_rate(tmp_path: Path):
    columns = table()
    del columns["time"]
    found = read_recording(write_csv(tmp_path / "a.tsv", columns, "\t"), XY, RATE, layout=Layout(rate=RATE))
    np.testing.assert_array_equal(found.values[0], columns["ax"].astype(np.float32))
    assert found.labels is None and found.start == 0.0


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Be where local time is not UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(("zone", "hours"), [("", 0), ("Z", 0), ("+02:00", 2)])
def test_times_may_be_timestamps(zone: str, hours: int, tmp_path: Path, elsewhere: None):
    columns = table(seconds=2)
    noon = datetime.datetime(2026, 3, 1, 12)
    stamps = [(noon + datetime.timedelta(seconds=t)).isoformat(timespec="milliseconds") + zone for t in columns["time"]]
    found = read_recording(write_csv(tmp_path / "a.csv", columns | {"time": stamps}), XY, RATE)
    np.testing.assert_array_equal(found.values[0], columns["ax"].astype(np.float32))
    assert found.start == noon.replace(tzinfo=datetime.UTC).timestamp() - 3600 * hours


def test_a_csv_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    columns = table()
    monkeypatch.setattr("fedsplit.data.formats._ROWS", 7)
    path = write_csv(tmp_path / "a.csv", columns)
    np.testing.assert_array_equal(read_recording(path, XY, RATE).values[1], columns["ay"].astype(np.float32))
    path.write_text(path.read_text() + "10.0,x,1,rest\n")
    with pytest.raises(DataError, match="row 1002 of column 'ax' is no number"):
        read_recording(path, XY, RATE)


@pytest.mark.parametrize("times", ["seconds", "timestamps", "text"])
def test_a_parquet_comes_out_as_it_went_in(times: str, tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    columns = table()
    columns["label"] = (columns["label"] == "walk").astype(np.int8)
    columns["ay"] = [None if i == 40 else v for i, v in enumerate(columns["ay"])]
    stamps = pa.array((columns["time"] * 1e6).round().astype(np.int64), pa.timestamp("us", "UTC"))
    if times != "seconds":
        columns["time"] = stamps if times == "timestamps" else [str(t) for t in stamps.to_pylist()]
    (tmp_path / "label=3").mkdir()  # which some readers take for a column
    pq.write_table(pa.table(columns), path := tmp_path / "label=3" / "a.parquet")
    found = read_recording(path, XY, RATE, numbers={"0": 0, "1": 1})
    np.testing.assert_array_equal(found.values[0], columns["ax"].astype(np.float32))
    np.testing.assert_array_equal(found.labels, columns["label"])
    assert np.flatnonzero(np.isnan(found.values[1])).tolist() == [40] and found.start == 0.0


@pytest.mark.parametrize(("suffix", "bits"), [(".edf", 16), (".bdf", 24)])
def test_an_edf_has_signals_units_rates_and_annotations(suffix: str, bits: int, tmp_path: Path):
    ecg, chest = waves(10, 100)[1][0] * 900, waves(10, 50, seed=1)[1][0] * 2
    marks = [edfio.EdfAnnotation(2.0, 3.0, "walk"), edfio.EdfAnnotation(0, None, "Lights off")]
    marks += [edfio.EdfAnnotation(8.0, None, "walk")]
    signals = [("ECG", "uV", 100, ecg), ("chest", "g", 50, chest)]
    begin = {"recording": edfio.Recording(startdate=datetime.date(2026, 3, 1)), "starttime": datetime.time(12)}
    path = write_edf(tmp_path / f"a{suffix}", signals, annotations=marks, **begin)
    wanted = [Channel("chest", "m/s2"), Channel("ECG", "mV")]
    found = read_recording(path, wanted, 50, numbers=NUMBERS, otherwise=0)
    step = 4 / 2**bits * 9.80665
    np.testing.assert_allclose(found.values[0], chest * 9.80665, rtol=1e-6, atol=step)
    assert found.start == datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.UTC).timestamp()
    assert found.labels is not None and set(np.flatnonzero(found.labels)) == {*range(100, 250), 400}
    full = read_recording(path, [Channel("ECG", "uV")], 100)
    np.testing.assert_allclose(full.values[0], ecg, rtol=1e-6, atol=2000 / 2**bits)
    np.testing.assert_allclose(found.values[1], resample(ecg, 100, 50) / 1e3, atol=5 / 2**bits + 1e-6)


def test_a_damaged_edf_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """What is missing at its end is said; what makes no sense is refused."""
    path = write_edf(tmp_path / "a.edf", [("ax", "g", 100, waves()[1][0])])
    whole = path.read_bytes()
    path.write_bytes(whole[:-150])
    assert read_recording(path, XY[:1], RATE).samples == 900
    assert "Incomplete data record" in caplog.text
    for content in (b"", whole[:300], b"x" * 5000):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as EDF"):
            read_recording(path, XY[:1], RATE)


def test_an_edf_with_interruptions_is_refused(tmp_path: Path):
    signals = [("ax", "g", 100, waves()[1][0])]
    path = write_edf(tmp_path / "a.edf", signals, annotations=[edfio.EdfAnnotation(0, None, "x")])
    content = path.read_bytes()
    assert content.count(b"+5\x14\x14") == 1
    path.write_bytes(content.replace(b"+5\x14\x14", b"+7\x14\x14"))
    with pytest.raises(DataError, match="has interruptions"):
        read_recording(path, XY[:1], RATE)


@pytest.mark.parametrize(("package", "suffix"), [("edfio", ".edf"), ("pyarrow", ".parquet")])
def test_a_missing_package_is_named(package: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / f"a{suffix}").touch()
    with pytest.raises(ConfigError, match=rf"need {package}: pip install 'fedsplit\[recordings\]'"):
        read_recording(tmp_path / f"a{suffix}", XY, RATE)


# --- units -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "wanted", "factor"),
    [
        ("uV", "mV", 1e-3),
        ("\u00b5V", "V", 1e-6),
        ("\u03bcV", "uV", 1.0),
        ("g", "m/s2", 9.80665),
        ("m/s^2", "g", 1 / 9.80665),
        ("dps", "rad/s", np.pi / 180),
        ("bpm", "bpm", 1.0),
        ("mV", "g", None),
        ("", "mV", None),
        ("MV", "mV", None),
        ("bpm", "Hz", None),
    ],
)
def test_units_become_each_other(found: str, wanted: str, factor: float | None):
    assert conversion(found, wanted) == (None if factor is None else pytest.approx(factor, rel=1e-12))


@given(st.sampled_from(sorted(UNITS)), st.sampled_from(sorted(UNITS)))
def test_units_go_there_and_back(one: str, other: str):
    there, back = conversion(one, other), conversion(other, one)
    assert (there is None) == (back is None)
    assert there is None or back is None or there * back == pytest.approx(1, rel=1e-12)


def test_a_table_is_in_the_unit_that_its_owner_says(tmp_path: Path):
    columns = table()
    columns["Accel X"] = columns.pop("ax")
    layout = Layout(columns={"ax": "Accel X"}, units={"ax": "m/s2"})
    found = read_recording(write_csv(tmp_path / "a.csv", columns), XY, RATE, layout=layout)
    np.testing.assert_allclose(found.values, [columns["Accel X"] / 9.80665, columns["ay"]], rtol=1e-6)


# --- resampling ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(source=st.floats(20, 500), rate=st.floats(20, 500), part=st.floats(0.01, 0.42), phase=st.floats(0, 6))
def test_a_sine_keeps_its_amplitude_to_a_thousandth(source: float, rate: float, part: float, phase: float):
    low = min(source, rate)
    seconds, frequency = 200 / low, part * low
    values = np.sin(2 * np.pi * frequency * np.arange(int(seconds * source)) / source + phase)
    found = resample(values, source, rate)
    times = np.arange(len(found)) / rate
    assert times[-1] <= (len(values) - 1) / source + 1e-9 and times[-1] + 1 / rate > (len(values) - 1) / source - 1e-9
    inner = (times > 33 / low) & (times < times[-1] - 33 / low)
    assert inner.any()
    np.testing.assert_allclose(found[inner], np.sin(2 * np.pi * frequency * times + phase)[inner], atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(factor=st.floats(1.2, 10), part=st.floats(0, 1))
def test_what_a_lower_rate_cannot_hold_is_kept_out(factor: float, part: float):
    frequency = 50 + part * (50 * factor - 50)  # from half the lower rate to half the source's
    values = np.sin(2 * np.pi * frequency * np.arange(int(200 * factor)) / (100 * factor) + 0.3)
    assert np.abs(resample(values, 100 * factor, 100))[33:-33].max() < 1e-3


def test_a_constant_and_a_line_stay_what_they_are():
    np.testing.assert_allclose(resample(np.full(300, 7.0), 100, 37), 7.0, rtol=1e-12)
    np.testing.assert_allclose(resample(np.arange(300.0), 100, 50), np.arange(0, 300, 2), atol=1e-2)
    assert len(resample(np.array([3.0]), 100, 50)) == 1 and len(resample(np.array([3.0, 4.0]), 100, 50)) == 1
    values = np.arange(5.0)
    assert resample(values, 100, 100) is values


def test_times_that_were_rounded_leave_the_values_alone():
    """128 Hz in milliseconds: intervals of 7 and 8."""
    values = np.random.default_rng(0).normal(size=3000)
    times = np.round(np.arange(3000) / 128, 3)
    native = native_rate(times, "here")
    assert native == pytest.approx(128, rel=1e-3)
    found = on_grid(times, values, native=native, start=0, rate=128, count=3000, fill=0)
    np.testing.assert_array_equal(found, values.astype(np.float32))


@pytest.mark.parametrize(("frequency", "lost"), [(15.0, 0.0), (0.5, 0.2)])
def test_times_that_were_rounded_are_taken_as_even(frequency: float, lost: float):
    """Milliseconds at 128 Hz, which to believe would cost 3 % at 15 Hz; also where every fifth sample is lost."""
    exact = np.arange(12_800) / 128
    here = np.random.default_rng(0).uniform(size=len(exact)) >= lost
    here[[0, -1]] = True
    times, values = np.round(exact[here], 3), np.sin(2 * np.pi * frequency * exact[here])
    native = native_rate(times, "here")
    found = on_grid(times, values, native=native, start=0, rate=50, count=5000, fill=0.1)
    expected = np.sin(2 * np.pi * frequency * np.arange(5000) / 50)
    assert np.nanmax(np.abs(found - expected)[40:-40]) < 2e-3


def test_times_that_are_irregular_are_believed():
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.uniform(0.006, 0.014, 3000))
    found = on_grid(
        times - times[0], np.sin(4 * times), native=native_rate(times, ""), start=0, rate=50, count=1450, fill=0
    )
    expected = np.sin(4 * (np.arange(1450) / 50 + times[0]))
    assert np.abs(found - expected)[40:-40].max() < 2e-3


def test_a_clock_that_is_a_little_slow_is_corrected(tmp_path: Path):
    """After 100 s it is 26 samples behind, so that taking its samples as even ones would be seen."""
    times = np.arange(4974) / 49.74
    columns = {"time": times, "ax": np.sin(3 * times), "ay": np.cos(3 * times)}
    found = read_recording(write_csv(tmp_path / "a.csv", columns), XY, 50)
    assert abs(found.samples - 5000) <= 1
    expected = np.sin(3 * np.arange(found.samples) / 50)
    np.testing.assert_allclose(found.values[0][:-40], expected[:-40], atol=1e-3)


def test_labels_of_single_samples_survive_a_lower_rate(tmp_path: Path):
    columns = table() | {"label": np.array(["rest", "walk"])[(np.arange(1000) % 101 == 0).astype(int)]}
    labels = read_recording(write_csv(tmp_path / "a.csv", columns), XY, 20, numbers=NUMBERS).labels
    assert labels is not None and labels.sum() == 10


# --- gaps ------------------------------------------------------------------------------------------------------


def gappy(tmp_path: Path, fill: float, rate: float = RATE, **missing: slice) -> Recording:
    """Return a recording of a file that lacks rows, or numbers of a channel."""
    columns = table()
    rows = np.ones(1000, bool)
    for name, where in missing.items():
        if name == "rows":
            rows[where] = False
        else:
            columns[name] = columns[name].astype(object)
            columns[name][where] = ""
    return read_recording(write_csv(tmp_path / "a.csv", {k: v[rows] for k, v in columns.items()}), XY, rate, fill=fill)


def test_short_gaps_are_bridged_and_longer_ones_stay(tmp_path: Path):
    _, values = waves()
    for missing in ({"rows": slice(200, 209)}, {"ax": slice(200, 209)}):
        bridged = gappy(tmp_path, fill=0.1, **missing).values
        assert np.isfinite(bridged).all()
        line = np.linspace(values[0, 199], values[0, 209], 11)
        np.testing.assert_allclose(bridged[0, 199:210], line, atol=1e-5)
        left = gappy(tmp_path, fill=0.099, **missing).values
        assert np.flatnonzero(np.isnan(left[0])).tolist() == list(range(200, 209))
        assert np.isnan(left[1]).any() == ("rows" in missing)
        np.testing.assert_array_equal(
            np.delete(left[0], range(200, 209)), np.delete(values[0], range(200, 209)).astype(np.float32)
        )


def test_windows_that_touch_a_gap_are_left_out_and_counted(tmp_path: Path):
    found = cut(gappy(tmp_path, fill=0.0, ay=slice(250, 260)), 1, 0.5)
    touched = [s for s in range(0, 901, 50) if s < 260 and s + 100 > 250]
    assert found.starts.tolist() == [s for s in range(0, 901, 50) if s not in touched]
    assert found.left_out == {"gaps": len(touched), "labels": 0} and np.isfinite(found.x).all()


def test_a_gap_between_two_samples_of_a_lower_rate_is_one_still(tmp_path: Path):
    """Or a window would hold two samples as neighbours that are not."""
    for first in range(300, 320):
        recording = gappy(tmp_path, fill=0.0, rate=5, rows=slice(first, first + 4))
        assert np.isnan(recording.values).any(axis=0).sum() >= 1, first
    assert np.isfinite(gappy(tmp_path, fill=0.06, rate=5, rows=slice(300, 304)).values).all()


def test_channels_of_a_table_may_have_their_own_rates(tmp_path: Path):
    """The slow one's cells are empty in between."""
    columns = table()
    slow = np.full(1000, "", object)
    slow[::4] = columns["ay"][::4]
    found = read_recording(write_csv(tmp_path / "a.csv", columns | {"ay": slow}), XY, 25)
    assert found.samples == 250
    np.testing.assert_array_equal(found.values[1], columns["ay"][::4].astype(np.float32))
    with pytest.raises(DataError, match=r"'ay' has 25 Hz, less than the 50 Hz .* --upsample"):
        read_recording(tmp_path / "a.csv", XY, 50)
    fast = read_recording(tmp_path / "a.csv", XY, 50, layout=Layout(upsample=True)).values[1]
    np.testing.assert_allclose(fast[:498:2][40:-40], found.values[1][:249][40:-40], atol=0.2)


# --- windows ---------------------------------------------------------------------------------------------------


def made(samples: int, labels: list[int] | None = None, rate: float = 1.0) -> Recording:
    values = np.arange(2.0 * samples, dtype=np.float32).reshape(2, samples)
    return Recording(Path("a.csv"), values, rate, None if labels is None else np.array(labels, np.int16))


@given(length=st.integers(1, 12), step=st.integers(1, 15), samples=st.integers(12, 60), hole=st.integers(0, 59))
def test_windows_share_segments_as_they_share_samples(length: int, step: int, samples: int, hole: int):
    recording = made(samples)
    recording.values[0, min(hole, samples - 1)] = np.nan
    found = cut(recording, length, step)
    if step >= length:
        assert found.segments is None
        return
    assert found.segments is not None
    covers: dict[int, set[tuple[int, ...]]] = {}
    for start, own, x in zip(found.starts, found.segments.tolist(), found.x, strict=True):
        assert len(set(own)) == len(own) and min(own) >= 0
        np.testing.assert_array_equal(x, recording.values[:, start : start + length])
        for sample in range(start, start + length):
            covers.setdefault(sample, set()).add(tuple(own))
    for i, one in enumerate(found.segments.tolist()):
        for j, other in enumerate(found.segments.tolist()):
            assert bool(set(one) & set(other)) == (abs(found.starts[i] - found.starts[j]) < length)
    for sample, windows in covers.items():  # one segment stands for each sample, in all windows that have it
        assert set.intersection(*map(set, windows)), sample


def test_segments_are_the_pieces_of_half_overlapping_windows():
    segments = cut(made(10), 4, 2).segments
    assert segments is not None and segments.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]


def test_a_label_is_that_of_more_than_half_the_samples():
    labels = [*(0, 0, 0, 1), *(0, 0, 1, 1), *(2, -1, 2, 2), *(-1, -1, 1, 1)]
    found = cut(made(16, labels), 4, 4)
    assert found.y is not None and found.y.tolist() == [0, 2] and found.starts.tolist() == [0, 8]
    assert found.left_out == {"gaps": 0, "labels": 2}


def test_an_event_makes_a_window_anomalous():
    labels = [*(0, 0, 0, 0), *(0, 0, 1, 0), *(0, -1, 0, 0), *(-1, 1, -1, -1)]
    found = cut(made(16, labels), 4, 4, events=True)
    assert found.y is not None and found.y.tolist() == [0, 1, 1] and found.starts.tolist() == [0, 4, 12]


def test_no_window_crosses_the_border():
    train, test = cut(made(20), 4, 2).split(11)
    assert train.starts.tolist() == [0, 2, 4, 6] and test.starts.tolist() == [12, 14, 16]
    assert train.segments is not None and test.segments is not None
    assert not set(train.segments.ravel()) & set(test.segments.ravel())


def test_a_recording_can_be_replayed(tmp_path: Path):
    """In order, each window when it is complete; without labels, since nobody has them then."""
    recipe = check_recipe(RECIPE_TABLE | {"subtract": [1.0, 2.0], "divide": [2.0, 4.0]})
    columns = table()
    del columns["label"]
    recording = recipe.read(write_csv(tmp_path / "a.csv", columns), Layout(), labelled=False)
    windows = recipe.cut(recording)
    assert windows.y is None and windows.times.tolist() == [1.0 + 0.5 * i for i in range(19)]
    for complete, x in zip(windows.times, windows.x, strict=True):
        end = round(complete * RATE)
        raw = recording.values[:, end - 100 : end]
        np.testing.assert_allclose(x, (raw - [[1], [2]]) / [[2], [4]], rtol=1e-5, atol=1e-6)


# --- recipe ----------------------------------------------------------------------------------------------------

RECIPE_TABLE = {
    "channels": ["ax", "ay"],
    "units": ["g", "g"],
    "rate": 100.0,
    "seconds": 1.0,
    "stride": 0.5,
    "classes": ["rest", "walk"],
}


def test_a_recipe_survives_its_file(tmp_path: Path):
    recipe = check_recipe(RECIPE_TABLE | {"subtract": [0.1, 0.0], "divide": [1.0, 3.0], "otherwise": "rest"})
    (tmp_path / RECIPE).write_text(recipe.to_toml())
    assert read_recipe(tmp_path / RECIPE) == recipe
    assert recipe.shape == (2, 100) and recipe.numbers == NUMBERS and recipe.task == "classification"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"chanels": ["a"]}, "chanels: unknown key; nearest valid key is 'channels'"),
        ({"channels": ["ax", "ax"]}, "none may come twice"),
        ({"units": ["g"]}, "units must be 2, one for each channel, got 1"),
        ({"divide": [1.0, 1.0]}, "subtract and divide go together"),
        ({"divide": [1.0, 0.0], "subtract": [0.0, 0.0]}, "divide"),
        ({"seconds": 1.234567}, "seconds must be a whole number of samples, got 1.23457 s of 100 Hz"),
        ({"stride": 1e-3}, "stride must be a whole number of samples"),
        ({"rate": float("nan")}, "rate: "),
        ({"rate": "100"}, "rate: should be a valid number"),
        ({"classes": None}, "labels need either classes, or both normal and anomalous"),
        ({"classes": None, "normal": ["N"]}, "labels need either classes, or both normal and anomalous"),
        ({"normal": ["N"]}, "labels need either classes, or both normal and anomalous"),
        ({"classes": ["one"]}, "classes must be at least 2"),
        ({"classes": ["one", "one"]}, "labels: none may come twice"),
        ({"otherwise": "run"}, "otherwise must be one of rest, walk, got 'run'"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(change: dict[str, Any], part: str, tmp_path: Path):
    raw = {key: value for key, value in (RECIPE_TABLE | change).items() if value is not None}
    with pytest.raises(ConfigError) as refused:
        check_recipe(raw)
    assert part in str(refused.value) and "\n" not in str(refused.value)


def test_only_donors_are_measured(tmp_path: Path, main: Callable[..., None]):
    for seed, scale in enumerate((1.0, 50.0)):
        columns = table(seed=seed)
        write_csv(tmp_path / f"p{seed}.csv", columns | {"ax": scale * columns["ax"], "ay": scale * columns["ay"] + 3})
    main(*windows_command(tmp_path), "--donor", "p0", "--test-share", 0.2)
    recipe = read_recipe(tmp_path / "out" / RECIPE)
    _, values = waves()
    train = np.array([values[0], values[1] + 3])[:, :800]
    np.testing.assert_allclose(recipe.subtract, train.mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(recipe.divide, train.std(axis=1), rtol=1e-4)
    x = np.load(tmp_path / "out" / "p0.npz")["x"]
    np.testing.assert_allclose(x[0, 1], (train[1, :100] - recipe.subtract[1]) / recipe.divide[1], atol=1e-4)  # type: ignore[index]


# --- the command -----------------------------------------------------------------------------------------------


def windows_command(folder: Path, out: str = "out", *recordings: str) -> list[Any]:
    paths = [folder / name for name in recordings] or sorted(p for p in folder.iterdir() if p.suffix == ".csv")
    what = ["--channel", "ax=g", "--channel", "ay=g", "--class", "rest", "--class", "walk"]
    return ["windows", *paths, "--out", folder / out, *what, "--rate", 100, "--seconds", 1, "--stride", 0.5]


def opened(folder: Path, **changes: Any) -> Any:
    given = {"name": None, "builder": None, "task": "classification", "outputs": 2, "count": None, "test": "all"}
    return open_source(**(given | {"folder": str(folder), "partition": "natural", "alpha": 1.0, "seed": 0} | changes))


def test_a_folder_of_recordings_becomes_devices(
    tmp_path: Path, main: Callable[..., None], capsys: pytest.CaptureFixture[str]
):
    for device, days in {"p1": 2, "p0": 1}.items():
        (tmp_path / device).mkdir()
        for day in range(days):
            write_csv(tmp_path / device / f"day{day}.csv", table(seed=day))
        (tmp_path / device / "notes.txt").write_text("not a recording")
    command = windows_command(tmp_path, "out", "p1", "p0")
    main(*command, "--donor", "p0", "--test-share", 0.25)
    said = capsys.readouterr().out
    assert 'task = "classification", outputs = 2' in said and "records of shape (2, 100)" in said
    source = opened(tmp_path / "out")
    assert source.count == 2 and source.input_shape == (2, 100)
    (one, two) = (source.device(0), source.device(1))
    # of 14 windows within 7.5 s and 4 behind, those at 1.5, 3.5, 5.5 and 7.5 s are of two classes by halves
    assert (len(one.train), len(one.test)) == (11, 3) and (len(two.train), len(two.test)) == (22, 6)
    np.testing.assert_array_equal(two.train.x[:11], one.train.x)
    assert two.train.segments is not None and two.test.segments is not None
    assert not set(two.train.segments[:11].ravel()) & set(two.train.segments[11:].ravel())
    assert not set(two.train.segments.ravel()) & set(two.test.segments.ravel())
    np.testing.assert_array_equal(two.train.segments[:11], one.train.segments)  # new recordings change no earlier one

    like = ["windows", tmp_path / "p1", tmp_path / "p0", "--out", tmp_path / "again", "--test-share", 0.25]
    main(*like, "--like", tmp_path / "out" / RECIPE)
    for file in sorted((tmp_path / "out").iterdir()):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "out", "p0", "p1"]


def test_some_recordings_may_be_for_tests(tmp_path: Path, main: Callable[..., None]):
    (tmp_path / "p").mkdir()
    for day in range(3):
        write_csv(tmp_path / "p" / f"day{day}.csv", table(seed=day))
    main(*windows_command(tmp_path, "out", "p"), "--donor", "p", "--test-files", "*2.csv")
    device = opened(tmp_path / "out").device(0)
    assert len(device.test) * 2 == len(device.train)
    _, values = waves(seed=2)
    recipe = read_recipe(tmp_path / "out" / RECIPE)
    np.testing.assert_allclose(recipe.scaling.undo(device.test.x)[0], values[:, :100], atol=1e-5)


def test_monitoring_has_normal_and_anomalous(tmp_path: Path, main: Callable[..., None]):
    monitor = ["--normal", "N", "--anomalous", "V", "--anomalous", "S", "--otherwise", "N"]
    for device in ("p0", "p1"):
        columns = table() | {"label": np.full(1000, "", object)}
        if device == "p0":
            columns["label"][[210, 610]] = ["V", "S"]
        write_csv(tmp_path / f"{device}.csv", columns)
    what = ["--channel", "ax=g", "--channel", "ay=g", "--rate", 100, "--seconds", 1]
    main("windows", tmp_path / "p0.csv", "--out", tmp_path / "out", *what, *monitor, "--donor", "p0")
    found = opened(tmp_path / "out", task="binary", outputs=1).device(0).train
    assert found.y.tolist() == [0, 0, 1, 0, 0, 0, 1, 0, 0, 0] and found.segments is None
    main("windows", tmp_path / "p1.csv", "--out", tmp_path / "own", "--like", tmp_path / "out" / RECIPE)
    assert not opened(tmp_path / "own", task="binary", outputs=1).device(0).train.y.any()


# --- what is refused -------------------------------------------------------------------------------------------


def constant(columns: dict[str, Any]) -> None:
    columns["ax"][:] = 3.0


def empty(columns: dict[str, Any]) -> None:
    columns["ay"] = [""] * 1000


def cells(name: str, value: str, *places: int) -> Callable[[dict[str, Any]], None]:
    def change(columns: dict[str, Any]) -> None:
        columns[name] = [value if i in places else v for i, v in enumerate(columns[name])]

    return change


def only(label: str) -> Callable[[dict[str, Any]], None]:
    return cells("label", label, *range(1000))


def scaled(columns: dict[str, Any]) -> None:
    columns["time"] = columns["time"] * 1000


def irregular(columns: dict[str, Any]) -> None:
    columns["time"] = np.cumsum(np.random.default_rng(0).exponential(size=1000))


def late(columns: dict[str, Any]) -> None:
    columns["time"][500:] += 1e6


BAD = {
    "no channel": (lambda c: c.pop("ay"), [], "has no column 'ay'; it has time, ax, label"),
    "no time": (lambda c: c.pop("time"), [], "has no column 'time'; it has ax, ay, label"),
    "no label": (lambda c: c.pop("label"), [], "has no column 'label'"),
    "twice": (lambda c: c.update({" ax": c["ax"]}), [], "has several column 'ax'"),
    "constant": (constant, [], "channel 'ax' is constant"),
    "empty": (empty, [], "channel 'ay' holds no numbers"),
    "infinite": (cells("ax", "inf", 5), [], "channel 'ax' holds infinity"),
    "text": (cells("ax", f"{SECRET}x", 5), [], "row 7 of column 'ax' is no number"),
    "no timestamp": (cells("time", f"{SECRET}x", 5), [], "row 7 of column 'time' is neither seconds nor"),
    "time lacks": (cells("time", "", 5, 6), [], "column 'time' lacks the time of 2 rows"),
    "backwards": (cells("time", "0.5", 5), [], "column 'time' must be finite and rise from row to row"),
    "milliseconds": (scaled, [], "channel 'ax' has 0.1 Hz, less than the 100 Hz that are wanted (if times are seconds"),
    "irregular": (irregular, [], "channel 'ax' has no steady sampling rate"),
    "late": (late, [], "channel 'ax' has a gap of 11.6 days"),
    "gaps": (cells("ax", "", *range(0, 1000, 50)), [], "no window is left (19 with gaps)"),
    "no labels": (only("sit"), [], "no window is left (19 without one label)"),
    "one class": (only("rest"), [], "none of all 19 windows is walk"),
    "slow": (lambda c: None, ["--rate", "200"], "channel 'ax' has 100 Hz, less than the 200 Hz"),
    "short": (lambda c: None, ["--seconds", "20"], "has 10 s, which is shorter than a window of 20 s"),
    "unit": (lambda c: None, ["--unit", "ax=mV"], "channel 'ax' is in mV, which cannot become g"),
    "unit of none": (lambda c: None, ["--unit", "az=mV"], "--unit must be CHANNEL=..., a channel of ax, ay, got 'az'"),
    "column of none": (lambda c: None, ["--column", "ax"], "--column must be CHANNEL=..., a channel of ax, ay"),
    "stride": (lambda c: None, ["--stride", "0.333"], "stride must be a whole number of samples, got 0.333 s of 100"),
    "share": (lambda c: None, ["--test-share", "1"], "--test-share must be at least 0 and below 1, got 1"),
    "files": (lambda c: None, ["--test-files", "*.edf"], "--test-files *.edf: no recording has such a name"),
    "both": (lambda c: None, ["--test-files", "*", "--test-share", "0.5"], "either --test-share or --test-files"),
    "only tests": (lambda c: None, ["--test-files", "*"], "donors: a channel holds no numbers to train with"),
    "file rate": (lambda c: None, ["--file-rate", "0"], "--file-rate must be above 0, got 0"),
    "otherwise": (lambda c: None, ["--otherwise", "sit"], "otherwise must be one of rest, walk, got 'sit'"),
    "donor": (lambda c: None, ["--donor", "p9"], "--donor must name one or more of p, got p, p9"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_refused(case: str, tmp_path: Path, refused: Callable[..., str]):
    change, arguments, part = BAD[case]
    columns = table()
    change(columns)
    path = write_csv(tmp_path / "p.csv", columns)
    said = refused(*windows_command(tmp_path), "--donor", "p", *arguments)
    assert part in said and SECRET not in said
    assert arguments or str(path) in said or "windows" in said
    assert [p.name for p in tmp_path.iterdir()] == ["p.csv"]  # nothing half done is left


def test_recordings_without_normal_data_or_anomalies_are_refused(tmp_path: Path, refused: Callable[..., str]):
    what = ["--channel", "ax=g", "--channel", "ay=g", "--rate", 100, "--seconds", 1, "--donor", "p"]
    monitor = [*what, "--normal", "rest", "--anomalous", "walk"]
    for label, part in {"walk": "device 'p' has no normal data", "rest": "none of all 10 windows is walk"}.items():
        columns = table()
        only(label)(columns)
        write_csv(tmp_path / "p.csv", columns)
        said = refused("windows", tmp_path / "p.csv", "--out", tmp_path / "out", *monitor)
        assert part in said and "label column 'label'" in said


def test_an_edf_must_fit_too(tmp_path: Path, refused: Callable[..., str]):
    _, (ax, ay) = waves()
    write_edf(tmp_path / "p.edf", [("ax", "mV", 100, ax), ("ay", "g", 100, ay), ("ay", "g", 100, ay)])
    command = ["windows", tmp_path / "p.edf", "--out", tmp_path / "out", "--rate", 100, "--seconds", 1]
    command += ["--class", "rest", "--class", "walk", "--donor", "p"]
    assert "channel 'ax' is in mV, which cannot become g" in refused(*command, "--channel", "ax=g")
    assert "channel 'ax' is in mV: say which unit is wanted, as in --channel ax=mV" in refused(*command, "--channel=ax")
    assert "has no signal 'az'; it has ax, ay, ay" in refused(*command, "--channel", "az=g")
    assert "has several signal 'ay'" in refused(*command, "--channel", "ay=g")
    assert "no window is left (10 without one label)" in refused(*command, "--channel", "ax=mV")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "has no column 'ax'; it has none"),
        (b"time,ax,ay,label\n", "has no rows"),
        (b"time,ax,ay,label\n0,1\n", "row 2 has 2 cells, the header 4"),
        (b"time,ax,ay,label\n\xff,1,1,1\n", "cannot be read as CSV in UTF-8"),
        (b"time,ax,ay,label\n0,1,2,rest\n", "is constant"),
    ],
)
def test_what_is_no_table_is_refused(content: bytes, part: str, tmp_path: Path, refused: Callable[..., str]):
    (tmp_path / "p.csv").write_bytes(content)
    assert part in refused(*windows_command(tmp_path), "--donor", "p")


def test_timestamps_of_a_parquet_may_be_large_strings_and_must_not_be_too_late(tmp_path: Path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns, stamps = table(), [f"2024-01-01T00:00:{t:09.6f}" for t in table()["time"]]
    pq.write_table(pa.table(columns | {"time": pa.array(stamps, pa.large_string())}), tmp_path / "p.parquet")
    read = read_recording(tmp_path / "p.parquet", [Channel("ax")], RATE)
    np.testing.assert_array_equal(read.values[0], columns["ax"].astype(np.float32))
    late = pa.array(np.arange(len(stamps)) * 20_000 + 4 * 10**16).cast(pa.timestamp("us"))  # in the year 3237
    pq.write_table(pa.table(columns | {"time": late}), tmp_path / "q.parquet")
    with pytest.raises(DataError, match=r"q\.parquet: column 'time' is no time"):
        read_recording(tmp_path / "q.parquet", [Channel("ax")], RATE)


def test_a_parquet_must_fit_too(tmp_path: Path, refused: Callable[..., str]):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    command = [*windows_command(tmp_path, "out", "p.parquet"), "--donor", "p"]
    columns = table()
    for change, part in {
        "ax": "column 'ax' is not of numbers",
        "time": "column 'time' is no time",
    }.items():
        pq.write_table(pa.table(columns | {change: [SECRET + "x"] * 1000}), tmp_path / "p.parquet")
        said = refused(*command)
        assert part in said and SECRET not in said
    pq.write_table(pa.table(columns | {"ax": [[1.0]] * 1000}), tmp_path / "p.parquet")
    assert "column 'ax' is not of numbers" in refused(*command)
    (tmp_path / "p.parquet").write_bytes(b"PAR1 but not really")
    assert "cannot be read as Parquet" in refused(*command)


def test_paths_and_options_that_do_not_fit_are_refused(tmp_path: Path, refused: Callable[..., str]):
    write_csv(tmp_path / "p.csv", table())
    (tmp_path / "other").mkdir()
    write_csv(tmp_path / "other" / "p.csv", table())
    (tmp_path / "none").mkdir()
    command, donor = windows_command(tmp_path, "out", "p.csv"), ["--donor", "p"]
    assert "would both be device 'p': rename one" in refused(*command, tmp_path / "other" / "p.csv", *donor)
    assert "none: holds no recordings (.csv, " in refused(*command, tmp_path / "none", *donor)
    assert "no.csv: cannot be read (No such file" in refused(*command, tmp_path / "no.csv", *donor)
    assert "q.xls: must be a file of one of .csv, " in refused(*command, tmp_path / "q.xls", *donor)
    assert "--donor must name one or more of p, got none" in refused(*command)
    assert "must be a new or an empty folder" in refused(*command, *donor, "--out", tmp_path / "other")
    assert "--rate is needed, or the recipe" in refused(*command[:9], "--seconds", 1, "--channel", "ax")

    recipe = check_recipe(RECIPE_TABLE | {"subtract": [0.0, 0.0], "divide": [1.0, 1.0]})
    (tmp_path / RECIPE).write_text(recipe.to_toml())
    like = ["windows", tmp_path / "p.csv", "--out", tmp_path / "out", "--like", tmp_path / RECIPE]
    assert f"--rate: is in the recipe {tmp_path / RECIPE} already" in refused(*like, "--rate", 50)
    assert "has constants already" in refused(*like, "--donor", "p")
    assert "no.toml: No such file" in refused(*like[:-1], tmp_path / "no.toml")
    (tmp_path / RECIPE).write_text("rate = ")
    assert "windows.toml: not valid TOML" in refused(*like)


def test_folders_that_cannot_be_written_are_told(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    write_csv(tmp_path / "p.csv", table())
    recipe = check_recipe(RECIPE_TABLE | {"subtract": [0.0, 0.0], "divide": [1.0, 1.0]})
    (tmp_path / RECIPE).write_text(recipe.to_toml())
    like = ["windows", tmp_path / "p.csv", "--like", tmp_path / RECIPE, "--out"]
    assert "p.csv/x: cannot be written (" in refused(*like, tmp_path / "p.csv" / "x")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "--out .: cannot be written (" in refused(*like, ".")
    assert not any((tmp_path / "here").iterdir())


def test_names_are_shown_as_they_are(tmp_path: Path, main: Callable[..., None], capsys: pytest.CaptureFixture[str]):
    labels = ["[/b]" if label == "rest" else label for label in table()["label"]]
    write_csv(tmp_path / "p[b].csv", table() | {"label": labels})
    made = ["--channel", "ax", "--rate", "50", "--seconds", "1", "--class", "[/b]", "--class", "walk"]
    main("windows", tmp_path / "p[b].csv", "--out", tmp_path / "out", *made, "--donor", "p[b]")
    assert "p[b]" in (said := capsys.readouterr().out) and "[/b]" in said


def test_numbers_that_float32_cannot_hold_are_refused(tmp_path: Path):
    write_csv(tmp_path / "p.csv", table() | {"ax": [1e39, 0.0] * 500})
    with pytest.raises(DataError, match=r"p\.csv: channel 'ax' holds infinity, or numbers as large"):
        read_recording(tmp_path / "p.csv", [Channel("ax")], 50.0)
    write_csv(tmp_path / "p.csv", table() | {"ax": [1e29, 0.0] * 500})
    with pytest.raises(DataError, match="holds infinity, or numbers as large"):
        read_recording(tmp_path / "p.csv", [Channel("ax", "nV")], 50.0, layout=Layout(units={"ax": "V"}))


def test_a_recording_that_fails_leaves_no_folder(tmp_path: Path):
    write_csv(tmp_path / "a.csv", table())
    write_csv(tmp_path / "b.csv", table() | {"ax": [1] * 1000})
    recipe: Recipe = check_recipe(RECIPE_TABLE | {"subtract": [0.0, 0.0], "divide": [1.0, 1.0]})
    owners = find_owners([tmp_path / "b.csv", tmp_path / "a.csv"])
    assert [owner.name for owner in owners] == ["a", "b"]
    with pytest.raises(DataError, match=r"b\.csv: channel 'ax' is constant"):
        prepare(recipe, owners, tmp_path / "out", Layout(), HeldOut(), all_labels=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "b.csv"]


# --- monitoring ------------------------------------------------------------------------------------------------


def _novelty(tmp_path: Path, **settings: Any) -> Any:
    """Make records of one recording of 40 s, rest and walk by turns, in windows of 1 s; the last half tests."""
    write_csv(tmp_path / "p0.csv", table(seconds=40.0))
    recipe = check_recipe(
        {"channels": ["ax", "ay"], "units": ["g", "g"], "rate": RATE, "seconds": 1.0, "stride": 1.0, "recordings": 3}
        | {"subtract": [0.0, 0.0], "divide": [1.0, 1.0]}
        | settings
    )
    owners = find_owners([tmp_path / "p0.csv"])
    (device,) = prepare(recipe, owners, tmp_path / "out", Layout(), HeldOut(0.5), all_labels=True)
    with np.load(tmp_path / "out" / "p0.npz") as file:
        return device, {name: file[name] for name in file.files}


def test_unlabelled_recordings_can_be_monitored(tmp_path: Path):
    device, found = _novelty(tmp_path)
    assert found["y"].tolist() == found["y_test"].tolist() == [0] * 7 + [1] * 7 + [2] * 6
    assert device.train.total() == device.test.total() == 20
    source = open_source(
        name=None, folder=str(tmp_path / "out"), builder=None, task="novelty", outputs=3, count=None, test="all",
        partition="natural", alpha=1.0, seed=0,
    )  # fmt: skip
    assert len(source.device(0).train) == 20


def test_nobody_trains_with_what_is_anomalous(tmp_path: Path):
    device, found = _novelty(tmp_path, normal=["rest"], anomalous=["walk"])
    assert len(found["x"]) == 10 and found["y"].tolist() == [0] * 4 + [1] * 3 + [2] * 3
    assert found["y_test"].tolist() == [0, 0, 3, 3, 0, 0, 3, 3, 1, 1, 3, 3, 1, 2, 3, 3, 2, 2, 3, 3]
    assert device.left_out["anomalous"] == 10 and device.test == {0: 10, 1: 10}


def test_recordings_do_not_go_with_classes_or_half_of_the_labels(tmp_path: Path):
    with pytest.raises(ConfigError, match="recordings go with normal and anomalous labels or with none"):
        _novelty(tmp_path, classes=["rest", "walk"])
    with pytest.raises(ConfigError, match="labels need either classes, or both normal and anomalous"):
        _novelty(tmp_path, normal=["rest"])
    with pytest.raises(ConfigError, match=r"recordings: .* greater than or equal to 1, got 0"):
        _novelty(tmp_path, recordings=0)


def test_anomalies_that_never_come_are_told(tmp_path: Path):
    with pytest.raises(DataError, match=r"has no normal data: .* makes no window sleep"):
        _novelty(tmp_path, normal=["sleep"], anomalous=["walk"])
    with pytest.raises(DataError, match="is run, so nothing can tell it apart"):
        _novelty(tmp_path, normal=["rest", "walk"], anomalous=["run"])
