"""What the command windows cannot use, it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded import RATE, RECIPE_TABLE, table, waves, windows_command, write_csv, write_edf

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.data import open_source
from fedsplit.data.formats import Layout
from fedsplit.data.preparing import HeldOut, find_owners, prepare
from fedsplit.data.recipe import RECIPE, Recipe, check_recipe
from fedsplit.data.recordings import Channel, read_recording

SECRET = "7654.25"  # a record's value: no error text may hold it


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
