"""A function of the user's as devices."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import SECRET, opened

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.data import (
    resolve_function,
)


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
