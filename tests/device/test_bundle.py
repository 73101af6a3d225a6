"""What a device is given for predictions: it comes back as it was, is refused if changed, and holds no trunk."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.data import Scaling
from fedsplit.device.bundle import DESCRIPTION, WEIGHTS, Bundle
from fedsplit.model.activations import ACTIVATIONS
from fedsplit.model.layer import FirstLayer
from fedsplit.model.tasks import task_of
from fedsplit.release.policies import All, Random
from fedsplit.runs.folder import run_bundle

SCALED = Scaling((1.0,), (2.0,), -50.0, 50.0)
LAYERS = {
    "linear": (nn.Linear(6, 5), (2, 3)),
    "per step": (nn.Linear(3, 5, bias=False), (2, 3)),
    "conv1d": (nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2), (2, 9)),
    "conv2d": (nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(1, 0), groups=2, bias=False), (2, 6, 6)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_bundle_comes_back_as_it_was(name: str, activation: str, tmp_path: Path) -> None:
    module, shape = LAYERS[name]
    layer = FirstLayer(module, ACTIVATIONS[activation](), shape)
    bundle = Bundle(layer, Random(0.25), "float16", SCALED, task_of("classification"), 3)
    bundle.save(tmp_path / "device")
    assert sorted(path.name for path in (tmp_path / "device").iterdir()) == [DESCRIPTION, WEIGHTS]
    again = Bundle.load(tmp_path / "device")
    assert np.array_equal(again.weights, bundle.weights) and again.model == bundle.model
    assert (again.dropping, again.dtype, again.scaling, again.task, again.outputs) == (
        bundle.dropping, "float16", SCALED, task_of("classification"), 3
    )  # fmt: skip
    x = np.random.default_rng(1).normal(size=(4, *shape)).astype(np.float32)
    before, after = (b.layer.activation(b.layer.pre_activations(b.layer.initial_weights(), x)) for b in (bundle, again))
    assert np.array_equal(before, after)
    with pytest.raises(ConfigError, match="is not empty"):
        bundle.save(tmp_path / "device")


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.3), nn.GELU("tanh")], ids=repr)
def test_an_activation_keeps_its_own_numbers(activation: nn.Module, tmp_path: Path) -> None:
    layer = FirstLayer(nn.Linear(3, 4), activation, (3,))
    Bundle(layer, All(), "float32", Scaling(), task_of("binary"), 1).save(tmp_path / "device")
    assert repr(Bundle.load(tmp_path / "device").layer.activation) == repr(activation)


def test_usual_numbers_are_not_in_the_file(trained: Path) -> None:
    """So that older versions read it."""
    assert "numbers" not in json.loads(run_bundle(trained).files()[DESCRIPTION])["layer"]


def test_a_layer_of_a_kind_that_says_nothing_of_its_form_is_not_exported() -> None:
    layer = FirstLayer(nn.Conv3d(1, 2, 2), nn.ReLU(), (1, 3, 3, 3))
    with pytest.raises(ConfigError, match="first layer Conv3d cannot be exported"):
        Bundle(layer, All(), "float32", Scaling(), task_of("binary"), 1).files()


def test_the_trunk_is_not_in_it(trained: Path, tmp_path: Path) -> None:
    run_bundle(trained).save(tmp_path / "device")
    size = sum(path.stat().st_size for path in (tmp_path / "device").iterdir())
    assert size < 4 * (12 * 10 + 10) + 2000


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d.update(format=2), "is damaged, or of another version"),
        (lambda d: d.update(more=1), "is damaged, or of another version"),
        (lambda d: d.update(sha256="0" * 64), "its SHA-256 is not the one"),
        (lambda d: d.update(model="0" * 16), "is not of the model"),
        (lambda d: d["layer"].update(kind="Embedding"), "does not describe a model that can be built"),
        (lambda d: d["layer"].update(activation="softmax"), "does not describe a model that can be built"),
        (lambda d: d["layer"].update(activation="leaky_relu", numbers={"negative_slope": "NaN"}), "does not describe"),
        (lambda d: d["layer"].update(activation="gelu", numbers={"approximate": "well"}), "does not describe"),
        (lambda d: d["layer"]["arguments"].update(in_features=13), "does not describe a model that can be built"),
        (lambda d: d["layer"]["arguments"].update(device="meta"), "is damaged, or of another version"),
        (lambda d: d["layer"].update(input_shape=[0]), "does not describe a model that can be built"),
        (lambda d: d["dropping"].update(k=11), "does not describe a model that can be built"),
        (lambda d: d["scaling"].update(subtract=[1, 2]), "does not describe a model that can be built"),
        (lambda d: d["scaling"].update(divide=[0.0]), "does not describe a model that can be built"),
        (lambda d: d["scaling"].update(low=None), "is damaged, or of another version"),
    ],
)
def test_a_bundle_that_was_changed_is_refused(change: Callable, told: str, trained: Path, tmp_path: Path) -> None:
    run_bundle(trained).save(tmp_path / "device")
    description = json.loads((tmp_path / "device" / DESCRIPTION).read_text())
    change(description)
    (tmp_path / "device" / DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(DataError, match=told):
        Bundle.load(tmp_path / "device")


def test_what_is_no_bundle_or_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no model for devices"):
        Bundle.load(tmp_path / "device")
    with pytest.raises(DataError, match="is not a run folder"):
        run_bundle(tmp_path)
