"""The first layer in ONNX is the first layer, and says what is not in it."""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import small_settings
from torch import nn

from fedsplit.cli.predict import export
from fedsplit.common.arrays import FloatArray
from fedsplit.common.errors import ConfigError
from fedsplit.data import Scaling
from fedsplit.device.bundle import DESCRIPTION, WEIGHTS, Bundle
from fedsplit.device.onnx_export import ONNX, onnx_model
from fedsplit.model.activations import ACTIVATIONS
from fedsplit.model.layer import FirstLayer
from fedsplit.model.tasks import task_of
from fedsplit.release.policies import All, Random
from fedsplit.runs.simulation import simulate

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 3)),
    "linear of flat records": (lambda: nn.Linear(6, 5, bias=False), (6,)),
    "per step": (lambda: nn.Linear(3, 5), (2, 3)),
    "per step without bias": (lambda: nn.Linear(3, 5, bias=False), (2, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2), (2, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 4, (3, 2), (1, 2), (2, 0), groups=2, dilation=(1, 2), bias=False), (2, 6, 6)),
}
ONE, EACH = Scaling((3.0,), (0.5,), -50.0, 50.0), Scaling((3.0, -40.0), (0.5, 7.0))


def bundle_of(name: str, activation: str, scaling: Scaling) -> Bundle:
    torch.manual_seed(3)
    module, shape = LAYERS[name]
    layer = FirstLayer(module(), ACTIVATIONS[activation](), shape)
    return Bundle(layer, Random(0.25), "float16", scaling, task_of("classification"), 3)


def undropped(bundle: Bundle, raw: FloatArray) -> FloatArray:
    layer = bundle.layer
    before = layer.pre_activations(layer.initial_weights(), bundle.scaling.apply(raw.astype(np.float64)))
    return np.asarray(layer.activation(before))


def run(model: bytes, raw: FloatArray) -> FloatArray:
    (found,) = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"records": raw})
    return found


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_another_runtime_has_the_same_activations(name: str, activation: str) -> None:
    """Raw records are far from 0: without the scaling, or with one channel's for all, they would differ."""
    for scaling in (ONE,) if name == "linear of flat records" else (ONE, EACH):
        bundle = bundle_of(name, activation, scaling)
        model = onnx_model(bundle)
        for batch in (1, 5):
            records = np.random.default_rng(batch).normal(size=(batch, *bundle.layer.input_shape)).astype(np.float32)
            raw = bundle.scaling.undo(records).astype(np.float32)
            expected, found = undropped(bundle, raw), run(model, raw)
            assert found.shape == (batch, *bundle.layer.cut_shape) and found.dtype == np.float32
            assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
            assert np.abs(expected).max() > 0.1


def test_the_file_says_what_it_takes_and_what_is_not_in_it() -> None:
    bundle = bundle_of("conv1d", "gelu", EACH)
    model = onnx.load_from_string(onnx_model(bundle))
    assert "Dropping is not in it" in model.doc_string and bundle.model in model.doc_string
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("records", ["batch", 2, 9])]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("activations", ["batch", *bundle.layer.cut_shape])]
    assert {opset.version for opset in model.opset_import} == {17} and not model.functions


@pytest.mark.parametrize("activation", [nn.GELU(approximate="tanh"), nn.LeakyReLU(0.3)], ids=repr)
def test_an_activation_keeps_its_own_numbers(activation: nn.Module) -> None:
    bundle = Bundle(FirstLayer(nn.Linear(3, 64), activation, (3,)), All(), "float32", Scaling(), task_of("binary"), 1)
    raw = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert np.abs(run(onnx_model(bundle), raw) - undropped(bundle, raw)).max() < 1e-5


def test_a_layer_of_a_kind_that_says_nothing_of_its_form_is_not_exported() -> None:
    layer = FirstLayer(nn.Conv3d(1, 2, 2), nn.ReLU(), (1, 3, 3, 3))
    with pytest.raises(ConfigError, match="first layer Conv3d has no form in ONNX"):
        onnx_model(Bundle(layer, All(), "float32", Scaling(), task_of("binary"), 1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "run"
    simulate(small_settings(run={"rounds": 1}), out=folder)
    return folder


def test_it_lies_beside_what_a_device_needs(finished: Path, tmp_path: Path) -> None:
    export(finished, tmp_path / "without")
    export(finished, tmp_path / "device", onnx=True)
    assert sorted(path.name for path in (tmp_path / "device").iterdir()) == sorted([DESCRIPTION, WEIGHTS, ONNX])
    for name in (DESCRIPTION, WEIGHTS):
        assert (tmp_path / "device" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    bundle = Bundle.load(tmp_path / "device")
    raw = np.random.default_rng(5).normal(size=(30, 12)).astype(np.float32)
    found = run((tmp_path / "device" / ONNX).read_bytes(), raw)
    assert np.allclose(found, undropped(bundle, raw), rtol=1e-5, atol=1e-6)


def test_without_the_package_nothing_is_written(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError) as told:
        export(finished, tmp_path / "device", onnx=True)
    assert str(told.value) == "--onnx needs the package onnx: pip install 'fedsplit[onnx]'"
    assert not (tmp_path / "device").exists()
