"""Recordings become windows, gaps and labels with them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import RATE, RECIPE_TABLE, XY, made, table, waves, write_csv

from fedsplit.common.errors import DataError
from fedsplit.data.formats import Layout
from fedsplit.data.recipe import check_recipe
from fedsplit.data.recordings import Recording, read_recording
from fedsplit.data.windows import cut


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
