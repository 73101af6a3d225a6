"""What a policy says of itself: true of those that come with fedsplit, and asked of every other."""

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedsplit.common.errors import ConfigError
from fedsplit.data import Records
from fedsplit.model.layer import FirstLayer
from fedsplit.release.chosen import built_in, from_outside, numbers_of
from fedsplit.release.codes import Code
from fedsplit.release.making import Chunk, forward
from fedsplit.release.noise import Noisy
from fedsplit.release.policies import BUILT_IN, All, AtMost, Bits, Random, TopK, Units
from fedsplit.release.policy import FACTS, Policy, name_of

WIDTH = 4
POLICIES: list[Policy] = [All(), Random(0.5), AtMost(2), TopK(2), Units(WIDTH), Bits(1), Bits(3)]


def layer_of(activation: nn.Module) -> FirstLayer:
    layer = FirstLayer(nn.Linear(WIDTH, WIDTH), activation, (WIDTH,))
    layer.load_weights({"weight": np.eye(WIDTH, dtype=np.float32), "bias": np.zeros(WIDTH, np.float32)})
    return layer


def messages(policy: Policy, x: np.ndarray, activation: nn.Module) -> list[tuple[bytes, bytes]]:
    """Pattern and values of each record as they leave, every record with the same masks."""
    layer = layer_of(activation)
    index = np.zeros(len(x), dtype=np.int64)
    chunk = replace(Chunk.of(0, Records(x, np.zeros(len(x), np.int64))), index=index)
    weights = layer.flatten(layer.initial_weights())
    kept = forward(layer, policy, lambda _: bytes(32), chunk, weights, 0, b"", want_slopes=False).kept
    ends = np.cumsum(kept.counts)[:-1]
    rows = zip(kept.bitmap, np.split(kept.values.astype(np.float16), ends), strict=True)
    return [(bitmap.tobytes(), values.tobytes()) for bitmap, values in rows]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_no_release_is_one_of_more_messages_than_its_information_says(policy: Policy) -> None:
    """All records of a few levels: what they make of a code is counted, of floats as if these levels were all."""
    levels = np.array([0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75], dtype=np.float32)
    x = np.array(list(itertools.product(levels, repeat=WIDTH)), dtype=np.float32)
    found = math.log2(len(set(messages(policy, x, nn.ReLU()))))
    floats = policy.code.floats
    said = policy.information(WIDTH, "float32")
    if floats:  # 3 bits instead of 32 of each value
        said -= (32 - 3) * (said // 32)
    assert found <= said + 1e-9
    if policy.deterministic:  # nor does it say much more than there is; of others one mask is seen
        assert found >= said - (3 if floats else 1e-9)


def test_information_by_hand() -> None:
    assert All().information(100, "float16") == 1600 + 16  # the exponent of a record
    assert All().information(100, "float32") == 3200
    assert TopK(3).information(10, "float32") == pytest.approx(math.log2(120) + 96)
    assert AtMost(3).information(10, "float32") == 96
    assert (Bits(1).information(80, "float16"), Bits(3).information(80, "float32")) == (80, 240)
    assert Noisy(All(), 5.0, 0.5).information(8, "float16") == pytest.approx(4 * math.log2(1.5))
    assert Noisy(All(), 5.0, 1e-30).information(8, "float32") == 256  # no more than the payload


def test_top_k_of_almost_all_tells_no_more_than_all() -> None:
    assert TopK(9).information(10, "float32") == 9 * 32 + math.log2(10)
    assert TopK(10).information(10, "float32") == All().information(10, "float32")


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Identity()], ids=["relu", "identity"])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_silence_is_true_of_what_is_not_sent(policy: Policy, activation: nn.Module) -> None:
    layer = layer_of(activation)
    if isinstance(policy, Bits) and not layer.positive_only:
        pytest.skip("for relu alone")
    x = np.random.default_rng(0).normal(size=(200, WIDTH)).astype(np.float32)
    outputs = activation(torch.from_numpy(x)).numpy()
    weights = layer.flatten(layer.initial_weights())
    chunk = Chunk.of(0, Records(x, np.zeros(len(x), np.int64)))
    kept = forward(layer, policy, lambda _: bytes(32), chunk, weights, 0, b"", want_slopes=False).kept
    pattern = np.unpackbits(kept.bitmap, axis=1, count=WIDTH, bitorder="little").astype(bool)
    values = np.zeros(pattern.shape, np.float32)
    values[pattern] = kept.values
    silence, told = policy.silence(layer), 0
    for i in range(len(x)):
        limit = silence.limit(pattern[i], values[i])
        assert (np.abs(outputs[i]) <= limit + 1e-6)[~pattern[i]].all()
        told += int(np.isfinite(limit[~pattern[i]]).sum())
    assert (told > 0) == (not isinstance(policy, Random | AtMost) and not pattern.all())


def test_a_policy_goes_to_its_numbers_and_back() -> None:
    for policy in [*POLICIES, Noisy(AtMost(2), 4.0, 0.5)]:
        name, numbers = numbers_of(policy)
        assert built_in(name, **numbers) == policy
    assert {type(p) for p in POLICIES} == set(BUILT_IN.values())


def test_a_name_holds_every_field() -> None:
    policies = [*POLICIES, TopK(3), Random(0.25), Noisy(All(), 1.0, 0.5), Noisy(All(), 2.0, 0.5), Noisy(All(), 1.0, 1)]
    assert len({name_of(policy) for policy in policies}) == len(policies)
    assert name_of(TopK(2)) == name_of(TopK(2))


def test_noise_goes_around_once() -> None:
    with pytest.raises(ConfigError, match="noise is not for policy"):
        Noisy(Noisy(All(), 1.0, 1.0), 1.0, 1.0)


# --- codes -----------------------------------------------------------------------------------------------------


def test_values_beside_the_levels_have_no_code() -> None:
    assert Code(2).levels(np.array([0.5, 1.0, 1.5], np.float32)).tolist() == [1, 2, 3]
    for value in (0.0, 0.4, 2.0, -0.5, np.nan, np.inf):
        with pytest.raises(ConfigError, match="not levels of its code of 2 bits"):
            Code(2).levels(np.array([0.5, value], np.float32))


def test_a_code_of_nine_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be in 0\.\.8, got 9"):
        Code(9)


# --- from outside ----------------------------------------------------------------------------------------------

OWN = "own_policies"


@dataclass(frozen=True)
class Every(Policy):
    """Every ``step``-th output: all that a policy has to say."""

    step: int

    code = Code()
    deterministic = True
    blind = True
    zeros_count = False

    def fits(self, layer: FirstLayer) -> None:
        if self.step > layer.width:
            raise ConfigError(f"step must be at most {layer.width}, got {self.step}")

    def coded(self, outputs: Any) -> Any:
        return outputs

    def mask(self, outputs: Any, secret: bytes, round_number: int, records: Any) -> Any:
        return np.broadcast_to(np.arange(outputs.shape[1]) % self.step == 0, outputs.shape)

    def information(self, width: int, dtype: str) -> float:
        return 32.0 * -(-width // self.step)

    def most_equations(self, width: int) -> float:
        return -(-width // self.step)

    def silence(self, layer: FirstLayer) -> Any:
        raise NotImplementedError

    def search(self, layer: FirstLayer) -> dict[str, Any]:
        return {}


Every.__module__ = OWN


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = ModuleType(OWN)
    module.Every = Every  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, OWN, module)
    yield module


def test_a_policy_from_outside_is_built_of_its_fields(own: ModuleType) -> None:
    policy = from_outside(f"{OWN}:Every", {"step": 2})
    assert policy == Every(2)
    assert numbers_of(policy) == (f"{OWN}:Every", {"step": 2})
    assert name_of(policy) == f"{OWN}:Every(step=2)"
    assert name_of(Noisy(policy, 1.0, 0.5)) == f"Noisy(policy={OWN}:Every(step=2), clip=1.0, noise=0.5)"


@pytest.mark.parametrize("fact", sorted(FACTS))
def test_a_policy_without_a_fact_cannot_be(own: ModuleType, fact: str) -> None:
    for bases in ((Policy,), (All,)):  # nor is it enough to inherit another's
        space = {name: value for name, value in vars(Every).items() if name in FACTS - {fact}}
        lacking = dataclass(frozen=True)(type("Lacking", bases, {**space, "__module__": OWN}))
        own.Lacking = lacking  # type: ignore[attr-defined]
        if bases == (Policy,):
            with pytest.raises(TypeError, match=fact):
                lacking()
        with pytest.raises(ConfigError, match=f"does not say itself: {fact}"):
            from_outside(f"{OWN}:Lacking", {})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"stride": 2}, r"dropping\.stride: policy 'own_policies:Every' takes step"),
        ({}, "TypeError: .*missing 1 required positional argument: 'step'"),
        ({"step": [1, 2]}, r"dropping\.step must be a number, a text, true or false, got \[1, 2\]"),
    ],
)
def test_wrong_fields_are_refused_in_one_line(own: ModuleType, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_outside(f"{OWN}:Every", values)


def test_what_is_no_policy_is_refused(own: ModuleType) -> None:
    own.Loose = type("Loose", (), {})  # type: ignore[attr-defined]
    own.Plain = dataclass(frozen=True)(type("Plain", (), {}))  # type: ignore[attr-defined]
    own.made = lambda: Every(2)  # type: ignore[attr-defined]
    for name, said in (("Loose", "frozen dataclass"), ("made", "frozen dataclass"), ("Plain", "must derive from")):
        with pytest.raises(ConfigError, match=said):
            from_outside(f"{OWN}:{name}", {})


def test_the_names_of_the_noises_numbers_are_taken(own: ModuleType) -> None:
    """A device would take a policy's own default for noise on top, of which the server knows nothing."""
    space = {name: value for name, value in vars(Every).items() if name in FACTS}
    kind = type("Loud", (Policy,), {**space, "__module__": OWN, "__annotations__": {"noise": float}, "noise": 0.5})
    own.Loud = dataclass(frozen=True)(kind)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="may not have a field 'noise'"):
        from_outside(f"{OWN}:Loud", {})


@pytest.mark.parametrize("wrong", ["shape", "type"])
def test_a_mask_that_is_none_is_refused(own: ModuleType, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"shape": np.ones((2, 3), bool), "type": np.ones((2, WIDTH), np.int64)}[wrong]
    monkeypatch.setattr(Every, "mask", lambda *_: found)
    with pytest.raises(ConfigError, match=r"a bool mask of shape \(2, 4\)"):
        messages(Every(2), np.ones((2, WIDTH), np.float32), nn.ReLU())
