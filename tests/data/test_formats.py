"""Recordings come out of their files as they went in."""

import datetime
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import edfio
import numpy as np
import pytest
from recorded import NUMBERS, RATE, XY, table, waves, write_csv, write_edf

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.data.formats import Layout
from fedsplit.data.recordings import Channel, read_recording
from fedsplit.data.resampling import resample


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
