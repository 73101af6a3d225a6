"""The command windows, from files to devices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded import NUMBERS, RECIPE_TABLE, table, waves, windows_command, write_csv

from fedsplit.common.errors import ConfigError
from fedsplit.data import open_source
from fedsplit.data.recipe import RECIPE, check_recipe, read_recipe


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
