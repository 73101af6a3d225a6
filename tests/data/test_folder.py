"""A folder of files as devices, and public records."""

from pathlib import Path

import numpy as np
import pytest
from datasets import SECRET, opened

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.data import (
    open_own,
    read_records,
)


def device_arrays(records: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(records, 3)), "y": rng.integers(0, 3, records)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three hospitals; the last one only tests, the middle one does both."""
    train, test = device_arrays(), {f"{key}_test": value for key, value in device_arrays(2).items()}
    np.savez(tmp_path / "hospital-b.npz", **train, **test)
    np.savez(tmp_path / "hospital-a.npz", **train)
    np.savez(tmp_path / "hospital-c.npz", **test)
    return tmp_path


def test_folder_devices_are_files_in_the_order_of_names(folder):
    source = opened(folder=str(folder), outputs=3, test="all")
    assert (source.task.name, source.outputs, source.input_shape, source.count) == ("classification", 3, (3,), 3)
    sizes = [(len(source.device(d).train), len(source.device(d).test)) for d in range(3)]
    assert sizes == [(4, 0), (4, 2), (0, 2)]
    assert source.test_devices == (1, 2)
    np.testing.assert_array_equal(source.device(0).train.x, device_arrays()["x"].astype(np.float32))


def test_all_test_devices_are_looked_for_only_when_asked(folder):
    (folder / "hospital-c.npz").write_bytes(b"damaged")
    source = opened(folder=str(folder), outputs=3, test="all")
    with pytest.raises(DataError, match=r"device 2 \(hospital-c.npz\)"):
        _ = source.test_devices


def test_folder_test_may_be_ids_a_number_or_none(folder):
    for test, ids in ((2, (1, 2)), (0, ()), ((2, 1), (1, 2)), ((), ())):
        assert opened(folder=str(folder), outputs=3, test=test).test_devices == ids


def test_folder_of_a_device_that_tests_first(tmp_path):
    np.savez(tmp_path / "a.npz", x_test=np.ones((2, 5)), y_test=np.zeros(2, int))
    assert opened(folder=str(tmp_path), outputs=2).input_shape == (5,)


def test_folder_of_regression_targets(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((2, 5)), y=np.zeros(2))
    source = opened(folder=str(tmp_path), task="regression", test=0)
    assert source.outputs == 1 and source.device(0).train.y.shape == (2, 1)


def test_folder_files_may_hold_segments(folder):
    segments = np.array([[0, 1], [1, 2], [2, 3], [7, 8]], np.int32)
    tested = {"x_test": np.ones((2, 3)), "y_test": np.zeros(2, int), "segments_test": np.array([[5], [6]])}
    np.savez(folder / "hospital-b.npz", **device_arrays(), **tested, segments=segments)
    np.savez(folder / "hospital-c.npz", **tested)
    source = opened(folder=str(folder), outputs=3, test="all")
    both = source.device(1)
    np.testing.assert_array_equal(both.train.segments, segments)
    assert both.train.segments.dtype == both.test.segments.dtype == np.int64
    assert both.test.segments.tolist() == [[5], [6]]
    assert source.device(0).train.segments is None
    only = source.device(2)
    assert len(only.train) == 0 and only.test.segments.tolist() == [[5], [6]]


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("segments", [np.arange(4), np.zeros((3, 2), int), np.full((4, 1), -1), np.zeros((4, 1))])
def test_folder_refuses_segments_and_says_of_which_part(folder, part, segments):
    arrays = {f"{k}_test": v for k, v in device_arrays().items()} | device_arrays()
    np.savez(folder / "hospital-b.npz", **arrays, **{"segments" + "_test" * (part == "test"): segments})
    with pytest.raises(DataError, match=rf"^device 1 \(hospital-b.npz\), {part}: segments must be"):
        opened(folder=str(folder), outputs=3).device(1)


def test_folder_has_its_own_windows(folder):
    with pytest.raises(ConfigError, match="overlap = false is for the data set 'wearables', not for a folder"):
        opened(folder=str(folder), outputs=3, overlap=False)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("key", ["x", "y", "x_test"])
def test_folder_refuses_numbers_that_are_not_finite(folder, bad, key):
    both = device_arrays() | {f"{k}_test": v for k, v in device_arrays(2).items()}
    broken = both[key].astype(float)
    broken[0], broken[1] = SECRET, bad
    np.savez(folder / "hospital-b.npz", **(both | {key: broken}))
    part = "test" if key == "x_test" else "train"
    with pytest.raises(DataError, match=rf"^device 1 \(hospital-b.npz\), {part}: {key[0]} holds NaN") as error:
        opened(folder=str(folder), outputs=3).device(1)
    assert "7654" not in str(error.value)


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"x": np.ones((2, 3))}, "lacks y, which must come with x"),
        ({"y": np.zeros(2, int)}, "lacks x, which must come with y"),
        (device_arrays() | {"x_test": np.ones((2, 3))}, "lacks y_test, which must come with x_test"),
        ({"data": np.ones((2, 3))}, "lacks x and y, or x_test and y_test"),
        ({"x": np.ones((0, 3)), "y": np.zeros(0, int)}, "holds no records, neither to train nor to test"),
        ({"x": np.ones((2, 4)), "y": np.zeros(2, int)}, r"train: records must have shape \(3,\), got \(4,\)"),
        ({"x": np.ones((2, 3)), "y": np.array([0, 3])}, r"train: labels must be in 0..2"),
        ({"x": np.ones((2, 3), object), "y": np.zeros(2, int)}, r"without pickles \(ValueError\)"),
        ({"x": np.float64(1), "y": np.int64(1)}, "train: x and y must have one row per record"),
    ],
)
def test_folder_refuses_a_file(folder, arrays, text):
    np.savez(folder / "hospital-b.npz", **arrays)
    source = opened(folder=str(folder), outputs=3)
    with pytest.raises(DataError, match=rf"^device 1 \(hospital-b.npz\).*{text}"):
        source.device(1)


def test_folder_refuses_a_damaged_file(folder):
    file = folder / "hospital-b.npz"
    whole = file.read_bytes()
    middle = bytearray(whole)
    middle[200] ^= 255  # inside the numbers of x: the archive's own checksum finds it
    np.save(folder / "plain.npy", np.ones(3))
    plain = (folder / "plain.npy").read_bytes()
    source = opened(folder=str(folder), outputs=3)
    for content in (b"", b"no archive", whole[:-30], bytes(middle), plain):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"^device 1 \(hospital-b.npz\): cannot be read as .npz"):
            source.device(1)


def test_folder_refuses_a_test_device_without_test_records(folder):
    source = opened(folder=str(folder), outputs=3, test=(0, 2))
    with pytest.raises(DataError, match="device 0 is chosen to test, but holds no test records"):
        source.device(0)


def test_refuses_all_if_no_device_holds_test_records(tmp_path):
    np.savez(tmp_path / "a.npz", **device_arrays())
    with pytest.raises(DataError, match="none of the 1 devices holds test records"):
        _ = opened(folder=str(tmp_path), outputs=3, test="all").test_devices


def test_refuses_a_device_that_does_not_exist(folder):
    for device in (3, -1):
        with pytest.raises(DataError, match=rf"device {device} does not exist: ids are 0..2"):
            opened(folder=str(folder), outputs=3).device(device)


def test_refuses_a_folder_that_is_missing_or_empty(tmp_path):
    with pytest.raises(DataError, match=r"folder '.*nowhere' does not exist"):
        opened(folder=str(tmp_path / "nowhere"), outputs=3)
    with pytest.raises(DataError, match=f"folder '{tmp_path}' holds no .npz files"):
        opened(folder=str(tmp_path), outputs=3)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"count": 2}, "count must be 3 .* got 2"),
        ({"outputs": None}, "outputs must be the number of classes, at least 2, got None"),
        ({"outputs": 1}, "outputs must be the number of classes, at least 2, got 1"),
        (
            {"task": "ranking"},
            "task must be one of classification, binary, regression, novelty or 'module:Name', got 'ranking'",
        ),
        ({"task": "binary", "outputs": 2}, "outputs must be 1 or left out for a binary task, got 2"),
        ({"task": "regression", "outputs": 0}, "outputs must be at least 1, got 0"),
        ({"partition": "iid"}, "partition must be 'natural' for a folder.*, got 'iid'"),
        ({"test": 4}, r"test must be in 0..3"),
        ({"test": (3,)}, r"test names device 3, but ids are 0..2"),
    ],
)
def test_refuses_settings_that_do_not_fit_a_folder(folder, settings, text):
    with pytest.raises(ConfigError, match=text):
        opened(**({"folder": str(folder), "outputs": 3} | settings))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"count": None}, r"devices\.count is required with data\.shape"),
        ({"test": "all"}, r"devices\.test must be a number or a list of ids with data\.shape, got 'all'"),
        ({"outputs": None}, "outputs must be the number of classes, at least 2, got None"),
        ({"partition": "iid"}, "partition must be 'natural' for a shape, which has its own devices, got 'iid'"),
        ({"overlap": False}, "overlap = false is for the data set 'wearables', not for a shape"),
        ({"test": (3,)}, r"test names device 3, but ids are 0..2"),
    ],
)
def test_refuses_settings_that_do_not_fit_a_shape(settings, text):
    with pytest.raises(ConfigError, match=text):
        opened(**({"shape": (3,), "count": 3, "outputs": 3} | settings))


def test_a_shape_is_all_that_a_server_knows_of_records():
    source = opened(shape=(3,), count=3, outputs=3, test=(1,))
    assert (source.input_shape, source.outputs, source.count, source.test_devices) == ((3,), 3, 3, (1,))
    assert source.absent
    with pytest.raises(DataError, match=r"device 1: its records are on its own node \(data\.shape\)"):
        source.device(1)


def test_a_nodes_files_are_those_of_its_devices_in_their_order(folder):
    like = opened(shape=(3,), count=9, outputs=3, test=(8,))
    own, whole = open_own(str(folder), [2, 5, 8], like), opened(folder=str(folder), outputs=3, test=(2,))
    assert not own.absent
    for mine, theirs in ((2, 0), (5, 1), (8, 2)):
        assert np.array_equal(own.device(mine).train.x, whole.device(theirs).train.x)
        assert np.array_equal(own.device(mine).test.x, whole.device(theirs).test.x)
    with pytest.raises(DataError, match="device 3 is not on this node"):
        own.device(3)
    with pytest.raises(DataError, match=r"holds 3 \.npz files, the node has 2 device\(s\)"):
        open_own(str(folder), [2, 5], like)
    with pytest.raises(DataError, match="does not exist"):
        open_own(str(folder / "nowhere"), [2], like)
    single = sorted(folder.glob("*.npz"))[1]
    assert np.array_equal(open_own(str(single), [4], like).device(4).train.x, whole.device(1).train.x)


@pytest.mark.parametrize("changes", [{"shape": (4,)}, {"outputs": 2}])
def test_a_nodes_files_must_be_as_the_server_says(folder, changes):
    like = opened(**({"shape": (3,), "count": 3, "outputs": 3, "test": 0} | changes))
    with pytest.raises(DataError, match=r"device [012] \(.*\.npz\)"):
        for device in range(3):
            open_own(str(folder), [0, 1, 2], like).device(device)


def test_public_records_are_of_a_sources_kind(folder, tmp_path):
    source = opened(folder=str(folder), outputs=3)
    file = tmp_path / "public.dat"
    with file.open("wb") as opened_file:
        np.savez(opened_file, x=np.full((5, 3), 0.5), y=np.arange(5) % 3, x_test=np.ones((1, 9)), other=np.ones(7))
    found = read_records(str(file), source)
    assert found.x.dtype == np.float32 and found.x.shape == (5, 3) and found.y.tolist() == [0, 1, 2, 0, 1]
    assert found.y.dtype == np.int64 and found.segments is None


def test_public_regression_targets_become_columns(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((2, 5)), y=np.zeros(2))
    source = opened(folder=str(tmp_path), task="regression", test=0)
    assert read_records(str(tmp_path / "a.npz"), source).y.shape == (2, 1)


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"x": np.ones((2, 3))}, "lacks y, which must come with x"),
        ({"y": np.zeros(2, int)}, "lacks x, which must come with y"),
        ({"x_test": np.ones((2, 3)), "y_test": np.zeros(2, int)}, "lacks x and y"),
        ({"x": np.ones((2, 4)), "y": np.zeros(2, int)}, r"records must have shape \(3,\), got \(4,\)"),
        ({"x": np.ones((2, 3)), "y": np.array([0, 3])}, r"labels must be in 0..2"),
        ({"x": np.array([[SECRET, 1, 2], [np.nan, 1, 2]]), "y": np.zeros(2, int)}, "x holds NaN"),
        ({"x": np.ones((2, 3), object), "y": np.zeros(2, int)}, r"cannot be read as .npz without pickles"),
    ],
)
def test_refuses_public_records(folder, tmp_path, arrays, text):
    file = tmp_path / "public.dat"
    with file.open("wb") as opened_file:
        np.savez(opened_file, **arrays)
    with pytest.raises(DataError, match=rf"^public file {file}.*{text}") as error:
        read_records(str(file), opened(folder=str(folder), outputs=3))
    assert "7654" not in str(error.value)


def test_refuses_a_public_file_that_is_not_there(folder, tmp_path):
    with pytest.raises(DataError, match=r"^public file .*nowhere.npz: cannot be read .* \(FileNotFoundError\)"):
        read_records(str(tmp_path / "nowhere.npz"), opened(folder=str(folder), outputs=3))
