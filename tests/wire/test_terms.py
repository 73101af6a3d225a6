"""What a server tells a node: a layer comes back as it was, and whatever cannot be is refused in one line."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import small_settings
from torch import nn

from fedsplit.common.errors import ConfigError
from fedsplit.model.activations import ACTIVATIONS
from fedsplit.model.layer import FirstLayer
from fedsplit.plan.experiment import Experiment
from fedsplit.release.policies import All
from fedsplit.wire.description import LARGEST, Layer
from fedsplit.wire.terms import MOST_ROUNDS, Terms

LAYERS = {
    "linear": (nn.Linear(6, 5), (2, 3)),
    "per step": (nn.Linear(3, 5, bias=False), (2, 3)),
    "conv1d": (nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2), (2, 9)),
    "conv2d": (nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(1, 0), groups=2, bias=False), (2, 6, 6)),
}
MODULES = [*(kind() for kind in ACTIVATIONS.values()), nn.LeakyReLU(0.1), nn.GELU("tanh"), nn.ReLU(inplace=True)]


@pytest.mark.parametrize("activation", MODULES, ids=repr)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_built_from_its_description_has_the_same_name(name: str, activation: nn.Module) -> None:
    """Releases are named after it: another text would be a new release of the same record."""
    module, shape = LAYERS[name]
    layer = FirstLayer(module, activation, shape)
    again = Layer.model_validate_json(Layer.of(layer).model_dump_json()).build()
    assert again.description == layer.description
    assert (again.shapes, again.cut_shape, again.size) == (layer.shapes, layer.cut_shape, layer.size)
    assert not again.flatten(again.initial_weights()).any()


@pytest.mark.parametrize("protocol", [{}, {"mode": "synchronous", "labels": "at-home", "batch-size": 100}])
def test_terms_come_back_as_they_were(protocol: dict[str, Any]) -> None:
    settings = small_settings(protocol=protocol, dropping={"policy": "none", "clip": 1.0, "noise": 0.5})
    terms = Experiment(settings).terms
    assert Terms.from_json(terms.to_json()) == terms
    assert (terms.head is None) == (not protocol)


def test_terms_hold_neither_the_trunk_nor_the_servers_code() -> None:
    settings = small_settings(first_layer={"strategy": "FedAvgM", "args": {"server_momentum": 0.123}})
    said = Experiment(settings).terms.to_json()
    assert len(said) < 2000
    assert not any(word in said for word in ("linear_model", "FedAvgM", "0.123", "optimizer", "trunk"))


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set a field, or remove it with ``...``."""
    *tables, key = path.split(".")

    def changed(terms: dict[str, Any]) -> None:
        for table in tables:
            terms = terms[table]
        if value is ...:
            del terms[key]
        else:
            terms[key] = value

    return changed


REFUSED = {
    "seed": ["1", -1, 2**63, None, 1.5, ...],
    "more": [1],
    "keyed": [0, "no", ...],
    "head": [{"features": 0, "outputs": 3, "bias": True}, {"features": 3, "outputs": 2**25, "bias": True}, {}, 3],
    "asked.rounds": [0, MOST_ROUNDS + 1, 10**400, True, ...],
    "asked.chunk": [0, "all", 2**31, 1.5],
    "asked.fraction": [0.0, 1.1, "1", float("nan")],
    "asked.sampling": ["largest"],
    "asked.donors": [[-1], [10**9], 3],
    "asked.evaluate_every": [-1, 2**31],
    "asked.alone": ["", "x" * 201, 1],
    "data.count": [0, 10**9, None, ...],
    "data.test": [-1, "some", [10**9], [0.5]],
    "data.alpha": [0.0, float("inf"), float("nan")],
    "data.builder": ["x" * 201, "", 3],
    "data.folder": ["x" * 4097, ["a"]],
    "data.partition": ["by size"],
    "data.path": ["/etc"],
    "model.task": ["ranking"],
    "model.outputs": [0, 2**31, "three"],
    "model.dtype": ["float64"],
    "model.dropping.policy": ["", "x" * 201, 3],
    "model.dropping.noise": [-1.0, float("nan"), float("inf")],
    "model.dropping.k": [-1, 2**31, 1.5],
    "model.dropping.fields": [{"k": [1]}, 3],
    "model.layer.kind": ["", "x" * 201, ["Linear"]],
    "model.layer.activation": ["", 3],
    "model.layer.numbers": [{"negative_slope": 1e9}, {"negative_slope": float("nan")}, {"a": [1]}],
    "model.layer.builder": ["own:linear_model"],
    "model.layer.arguments": [{"in_features": "many"}, {"in_features": 1.5}, {"in_features": [1] * 9}],
    "model.layer.input_shape": [[1] * 9, 12, ["a"]],
    "model.scaling.low": [None, "low"],
}


@pytest.fixture(scope="module")
def honest() -> str:
    return Experiment(small_settings()).terms.to_json()


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in REFUSED.items() for value in values])
def test_a_field_that_is_not_as_it_must_be_is_named(path: str, value: Any, honest: str) -> None:
    terms = json.loads(honest)
    change(path, value)(terms)
    with pytest.raises(ConfigError) as refused:
        Terms.from_json(json.dumps(terms))
    said = str(refused.value)
    assert "\n" not in said and len(said) < 400
    assert path.split(".")[-1] in said or path.split(".")[-2] in said


ARGUMENTS = {"in_features": 12, "out_features": 10}


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ({"arguments": {**ARGUMENTS, "out_features": 10**7}}, f"at most {LARGEST} numbers, got 120000000"),
        ({"arguments": {**ARGUMENTS, "out_features": 10**12}}, f"at most {LARGEST} numbers"),
        ({"arguments": {**ARGUMENTS, "out_features": 10**30}}, "cannot be built"),
        ({"arguments": {**ARGUMENTS, "out_features": -1}}, "cannot be built"),
        ({"arguments": {**ARGUMENTS, "in_features": 13}}, "do not fit"),
        ({"arguments": {**ARGUMENTS, "device": 1}}, "cannot be built"),
        ({"arguments": {"in_features": 12}}, "cannot be built"),
        ({"numbers": {"negative_slope": 0.5}}, "cannot be built"),
        ({"activation": "gelu", "numbers": {"approximate": 0.5}}, "cannot be built"),
        ({"activation": "gelu", "numbers": {"approximate": "some"}}, "cannot be built"),
        ({"activation": "softmax"}, "activation 'softmax' is not known here"),
        ({"kind": "Embedding"}, "first layers of kind 'Embedding' are not known here"),
        ({"kind": "torch.nn:Linear"}, "first layers of kind 'torch.nn:Linear' are not known here"),
        ({"input_shape": [0]}, "input_shape must be of"),
        ({"input_shape": []}, "do not fit"),
        ({"input_shape": [2**20] * 4}, "input_shape must be of"),
        ({"kind": "Conv1d", "input_shape": [], "arguments": {
            "in_channels": 1, "out_channels": 1, "kernel_size": [3], "stride": [1], "padding": [0],
            "dilation": [1], "groups": 1}}, "cannot be built"),
        ({"kind": "Conv1d", "input_shape": [1, 8], "arguments": {
            "in_channels": 1, "out_channels": 1, "kernel_size": [3], "stride": [1], "padding": [10**9],
            "dilation": [1], "groups": 1}}, f"at most {LARGEST} numbers, got 2000000008"),
        ({"kind": "Conv2d", "input_shape": [1, 8, 8], "arguments": {
            "in_channels": 1, "out_channels": 1, "kernel_size": [3, 3], "stride": [1, 1], "padding": [20000],
            "dilation": [1, 1], "groups": 1}}, "cannot be built"),
        ({"kind": "Conv1d", "input_shape": [1, 8], "arguments": {
            "in_channels": 1, "out_channels": 1, "kernel_size": [3], "stride": [0], "padding": [1],
            "dilation": [1], "groups": 0}}, "cannot be built"),
    ],
)  # fmt: skip
def test_a_layer_that_cannot_be_is_refused_before_it_takes_memory(
    layer: dict[str, Any], said: str, honest: str
) -> None:
    terms = json.loads(honest)
    terms["model"]["layer"] |= layer
    with pytest.raises(ConfigError) as refused:
        Terms.from_json(json.dumps(terms)).model.build(All())
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("changes", [{"subtract": [1, 2]}, {"divide": [0.0]}, {"divide": []}, {"subtract": ["nan"]}])
def test_a_scaling_that_does_not_fit_is_refused(changes: dict[str, Any], honest: str) -> None:
    terms = json.loads(honest)
    terms["model"]["scaling"] |= changes
    with pytest.raises(ConfigError, match="scaling does not fit records of shape"):
        Terms.from_json(json.dumps(terms)).model.build(All())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy": "all"}, "policy must be one of none, random"),
        ({"policy": "top-k"}, "k must be at least 1, got 0"),
        ({"policy": "top-k", "k": 11}, "k must be at most 10"),
        ({"policy": "bits", "bits": 9}, "bits must be in 1..8"),
        ({"policy": "random", "keep": 0.0}, "keep must be in"),
        ({"noise": 1.0}, "noise and clip must both be above 0"),
        ({"policy": "own:Policy", "fields": {}}, "policy 'own:Policy' is code from outside, and not allowed"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(changes: dict[str, Any], said: str, honest: str) -> None:
    terms = json.loads(honest)
    terms["model"]["dropping"] |= changes
    model = Terms.from_json(json.dumps(terms)).model
    with pytest.raises(ConfigError, match=said):
        model.build(model.dropping.built(["own:linear"]))


def test_numbers_of_other_policies_change_nothing(honest: str) -> None:
    """One bit is not judged as equations: a policy that sends whole values must not pass for it."""
    terms = json.loads(honest)
    terms["model"]["dropping"] |= {"bits": 1, "k": 3}
    assert Terms.from_json(json.dumps(terms)).model.dropping.built() == All()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"seed": 1}\n{', "\x00", '"' + "x" * 2**20])
def test_what_is_no_terms_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="the run's terms") as refused:
        Terms.from_json(text)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_a_key_with_other_lines_stays_in_one(honest: str) -> None:
    terms = {**json.loads(honest), "x\n2026 WARNING all is well" * 50: 1}
    with pytest.raises(ConfigError) as refused:
        Terms.from_json(json.dumps(terms))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_settings_beyond_what_nodes_take_are_refused_by_the_server() -> None:
    settings = small_settings(run={"rounds": MOST_ROUNDS + 1})
    with pytest.raises(ConfigError, match=rf"the run's terms: asked\.rounds: .* {MOST_ROUNDS}, got {MOST_ROUNDS + 1}"):
        _ = Experiment(settings).terms
