"""Units, rates and clocks of recordings."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import NUMBERS, RATE, XY, table, write_csv

from fedsplit.data.formats import Layout
from fedsplit.data.recordings import UNITS, conversion, read_recording
from fedsplit.data.resampling import native_rate, on_grid, resample


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
