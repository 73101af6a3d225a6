"""Records and segments are checked and converted, or refused without a value of theirs."""

from typing import Any

import numpy as np
import pytest
from datasets import SECRET

from fedsplit.common.errors import DataError
from fedsplit.data import (
    DeviceData,
    Records,
    check_records,
)
from fedsplit.model.tasks import task_of


def check(x: Any, y: Any, task: str = "classification", outputs: int = 3, shape: Any = (2,)) -> Records:
    where = "device 3 (b.npz), train"
    return check_records((x, y), task=task_of(task), outputs=outputs, input_shape=shape, where=where)


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
