"""Public records: what they teach before any device is asked, and the price of leaking."""

import copy

import numpy as np
import pytest
import torch
from conftest import small_settings
from digit_runs import parameters
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.common.errors import RunError
from fedsplit.data import Records
from fedsplit.data.pooled import load_pool
from fedsplit.model.split import SplitModel
from fedsplit.model.tasks import task_of
from fedsplit.model.zoo import build_model
from fedsplit.plan.experiment import Experiment
from fedsplit.release.chosen import numbers_of
from fedsplit.release.noise import Noisy
from fedsplit.release.policies import All, AtMost, Bits, Random, TopK, Units
from fedsplit.release.policy import Policy
from fedsplit.release.streams import KEYED_ROUND, simulation_secret
from fedsplit.server.batches import Batches
from fedsplit.server.trunk import Trunk, TrunkOptions
from fedsplit.server.warmup import (
    PUBLIC,
    PublicOnly,
    WarmUp,
    covariance_penalty,
    principal_factors,
    public_release,
    warm_up,
)

pytestmark = pytest.mark.usefixtures("quick")


# --- what leaks ------------------------------------------------------------------------------------------------


def dense_penalty(rows: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """The formula as it stands in the text, with the whole covariance and the larger inverse."""
    ridge = 1e-3 * covariance.trace() / len(covariance)
    explained = torch.linalg.inv(rows @ covariance @ rows.T + ridge * torch.eye(len(rows), dtype=torch.float64))
    return (covariance @ rows.T @ explained @ rows @ covariance).trace() / covariance.trace()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 7), st.integers(1, 7), st.integers(1, 9))
def test_the_penalty_and_its_gradient_are_those_of_the_dense_formula(
    seed: int, width: int, n: int, samples: int
) -> None:
    """In double precision (but for the ridge) to some digits, where records are fewer than their numbers, too."""
    rng = np.random.default_rng(seed)
    records = torch.from_numpy(rng.normal(size=(samples, n)) * 3.0 ** rng.uniform(-1, 1, n))
    # not much larger: the dense formula loses its digits where the rows see almost everything
    rows = torch.from_numpy(0.3 * rng.normal(size=(width, n))).requires_grad_()
    covariance = records.T @ records
    values, vectors = torch.linalg.eigh(covariance)
    factors = vectors * values.clamp(min=0).sqrt()
    found, expected = covariance_penalty(rows, factors), dense_penalty(rows, covariance)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    assert 0 <= found.item() <= 1
    gradients = [torch.autograd.grad(value, rows)[0] for value in (found, expected)]
    size = gradients[1].abs().max().item()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-4 * size + 1e-7)
    assert gradients[0].abs().sum() > 0
    single = covariance_penalty(rows.detach().float(), factors.float())
    assert single.item() == pytest.approx(expected.item(), abs=2e-3)


def test_the_penalty_is_the_share_of_the_variance_that_rows_see() -> None:
    factors = torch.diag(torch.tensor([3.0, 2.0, 1.0]))  # variances 9, 4, 1
    eye = torch.eye(3)
    assert covariance_penalty(0 * eye, factors) == pytest.approx(0, abs=1e-6)
    for seen in ([0], [1], [2], [0, 2], [0, 1, 2]):
        share = sum((9, 4, 1)[i] for i in seen) / 14
        assert covariance_penalty(eye[seen], factors) == pytest.approx(share, abs=2e-3)
        assert covariance_penalty(100 * eye[seen], factors) == pytest.approx(share, abs=1e-5)  # louder is no more
    assert covariance_penalty(eye[[0, 0, 0]], factors) == pytest.approx(9 / 14, abs=2e-3)  # nor is saying it again


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "components"), [((5,), 128), ((2, 3), 128), ((2, 3), 2)])
def test_principal_factors_are_the_largest_of_the_covariance(shape: tuple[int, ...], components: int) -> None:
    x = (np.random.default_rng(0).normal(size=(50, *shape)) + 3).astype(np.float32)
    x *= np.arange(1, x[0].size + 1).reshape(shape).astype(np.float32)
    covariance = np.cov(x.reshape(50, -1).T, bias=True)
    values, vectors = np.linalg.eigh(covariance)
    kept = vectors[:, -components:] * values[-components:]
    found = principal_factors(x, components).double().numpy()
    assert found.shape == (covariance.shape[0], min(components, len(covariance)))
    np.testing.assert_allclose(found @ found.T, kept @ vectors[:, -components:].T, rtol=1e-3, atol=1e-3)


# --- warming up ------------------------------------------------------------------------------------------------


WIDTH = 64


POLICIES = [
    (All(), 0.85),
    (TopK(6), 0.8),
    (AtMost(24), 0.6),
    (Random(0.25), 0.5),
    (Bits(1), 0.6),
    (Bits(3), 0.85),
    (Units(WIDTH), 0.85),
    (Noisy(All(), clip=4.0, noise=0.1), 0.7),
]


BY_NAME = {f"{numbers_of(d)[0]}{d.code.bits or ''}{'+noise' * bool(d.noisy)}": d for d, _ in POLICIES}


def digits_records(first: int, last: int) -> Records:
    pool = load_pool("digits")
    return Records(pool.x[first:last], pool.y[first:last])


def digits_model(seed: int = 1, width: int = WIDTH) -> SplitModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model("mlp", (64,), 10, width, "relu")


def options(epochs: int = 25, lr: float = 0.01, penalty: float = 0.0) -> WarmUp:
    return WarmUp(epochs, lr, batch_size=32, penalty=penalty)


def trunk_of(model: SplitModel, task: str = "classification", outputs: int = 10) -> Trunk:
    chosen = TrunkOptions("adam", 0.01, 0.0, 0.0, "constant", 32, 1)
    return Trunk(model.trunk, model.first_layer.cut_shape, task_of(task), outputs, chosen, rounds=3, seed=4)


def penalty_of(model: SplitModel, public: Records) -> float:
    return covariance_penalty(model.first_layer.unrolled(), principal_factors(public.x)).item()


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "accuracy"), POLICIES, ids=BY_NAME)
def test_a_warm_up_teaches_both_halves_what_devices_will_send(policy: Policy, accuracy: float) -> None:
    """Chance is 0.1; records that nobody learned from are released as a device would, and scored."""
    model, before = digits_model(), digits_model()
    warm_up(model, digits_records(0, 600), task_of("classification"), policy, options(), seed=5)
    for half, old in ((model.first_layer.layer, before.first_layer.layer), (model.trunk, before.trunk)):
        assert all((a - b).abs().max() > 0.01 for a, b in zip(half.parameters(), old.parameters(), strict=True))
    test = public_release(model, digits_records(600, 1000), policy, "float16", seed=6)
    assert trunk_of(model).evaluate(test)["test_accuracy"] > accuracy


@pytest.mark.parametrize("name", [name for name in BY_NAME if "noise" not in name])
def test_the_first_step_is_adams_along_the_gradient_at_what_is_sent(name: str) -> None:
    """What is dropped or zero passes none, as on the devices; but codes pass it on from 1 below zero."""
    policy, public, model = BY_NAME[name], digits_records(0, 20), digits_model()
    layer, x = model.first_layer.layer, torch.from_numpy(public.x)
    pre = layer(x).detach().numpy()
    outputs = np.maximum(pre, 0)
    levels = policy.coded(outputs)
    mask_round = KEYED_ROUND if policy.deterministic else 1
    mask = policy.mask(levels, simulation_secret(5, PUBLIC), mask_round, np.arange(20))
    sent = torch.from_numpy(np.where(mask, levels, 0)).requires_grad_()
    loss = torch.nn.functional.cross_entropy(model.trunk(sent), torch.from_numpy(public.y))
    passes = (pre >= -1) & (pre <= levels.max() + 1) if policy.code.bits else mask & (pre > 0)
    delta = torch.autograd.grad(loss, sent)[0] * torch.from_numpy(passes)
    gradient, before = delta.T @ x, layer.weight.detach().clone()
    warm_up(model, public, task_of("classification"), policy, options(epochs=1, lr=0.01), seed=5)
    step = layer.weight.detach() - before
    assert (gradient.abs() > 1e-5).float().mean() > 0.1
    assert (step[gradient == 0] == 0).all()
    clear = gradient.abs() > 1e-5  # Adam's first step is the rate times the sign
    torch.testing.assert_close(step[clear], -0.01 * gradient[clear].sign(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["at-most", "random", "none+noise"])
def test_equal_seeds_give_equal_warm_ups(name: str) -> None:
    def warmed(seed: int) -> torch.Tensor:
        model = digits_model()
        warm_up(
            model,
            digits_records(0, 100),
            task_of("classification"),
            BY_NAME[name],
            options(epochs=2, penalty=0.1),
            seed,
        )
        return parameters(model)

    state = torch.get_rng_state()
    first = warmed(5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    np.random.default_rng().random()
    assert torch.equal(warmed(5), first)
    assert not torch.equal(warmed(6), first)


def test_a_trunk_that_draws_random_numbers_has_its_own_too() -> None:
    def warmed(seed: int) -> torch.Tensor:
        model = digits_model()
        dropout = SplitModel(model.first_layer, torch.nn.Sequential(torch.nn.Dropout(), *model.trunk))
        warm_up(dropout, digits_records(0, 40), task_of("classification"), All(), options(epochs=1), seed)
        return parameters(dropout)

    first = warmed(5)
    torch.rand(3)
    assert torch.equal(warmed(5), first)


def test_no_epochs_teach_nothing() -> None:
    model = digits_model()
    warm_up(model, digits_records(0, 100), task_of("classification"), All(), options(epochs=0), seed=5)
    assert torch.equal(parameters(model), parameters(digits_model()))


def test_the_penalty_makes_a_first_layer_that_sees_less() -> None:
    public, found = digits_records(0, 300), {}
    for weight in (0.0, 1.0):
        model = digits_model(width=16)
        warm_up(model, public, task_of("classification"), TopK(4), options(epochs=8, penalty=weight), seed=5)
        found[weight] = penalty_of(model, public)
    assert found[1.0] < found[0.0] - 0.1


@pytest.mark.parametrize(
    ("data", "model", "task", "outputs"),
    [("conv1d", "conv1d_model", "classification", 3), ("regression", "regression_model", "regression", 1)],
)
def test_other_layers_and_tasks_warm_up(data: str, model: str, task: str, outputs: int) -> None:
    run = small_settings(
        data={"builder": f"own:{data}", "task": task, "outputs": outputs}, model={"builder": f"own:{model}"}
    )
    source = Experiment(run).source
    public = source.device(4).train
    built = Experiment(run).model
    before = trunk_of(built, task, outputs).evaluate(public_release(built, public, All(), "float32", 0))
    warm_up(built, public, task_of(task), All(), options(epochs=60, penalty=0.01), seed=5)
    after = trunk_of(built, task, outputs).evaluate(public_release(built, public, All(), "float32", 0))
    assert after["test_loss"] < 0.5 * before["test_loss"]


def test_a_warm_up_that_diverges_says_what_to_lower() -> None:
    with pytest.raises(RunError, match=r"the warm-up's weights are not finite: lower public\.lr"):
        warm_up(digits_model(), digits_records(0, 100), task_of("classification"), All(), options(lr=1e30), seed=5)


# --- the public release ----------------------------------------------------------------------------------------


def test_public_records_are_released_as_a_devices_would_be() -> None:
    model, public, policy = digits_model(), digits_records(0, 50), Random(0.25)
    found = public_release(model, public, policy, "float32", seed=6)
    with torch.no_grad():
        outputs = model.first_layer.activation(model.first_layer.layer(torch.from_numpy(public.x))).numpy()
    mask = policy.mask(outputs, simulation_secret(6, PUBLIC), KEYED_ROUND, np.arange(50))
    dense, cells, _ = found.dense(np.arange(50))
    pattern = np.isin(np.arange(dense.size), cells).reshape(dense.shape)
    np.testing.assert_allclose(dense, np.where(mask, outputs, 0), rtol=1e-5, atol=1e-6)
    assert 0.05 < pattern.mean() < 0.25
    assert found.targets.tolist() == public.y.tolist()
    assert set(found.devices.tolist()) == {PUBLIC}


# --- the public records alone ----------------------------------------------------------------------------------


def warm_trunk_and_records() -> tuple[Trunk, Batches, Batches, Batches]:
    """A trunk after a warm-up on 60 digits; what these, 300 private ones and 200 to test would release."""
    model, policy, public = digits_model(), TopK(6), digits_records(0, 60)
    warm_up(model, public, task_of("classification"), policy, options(epochs=6), seed=5)
    parts = (public, digits_records(60, 360), digits_records(360, 560))
    return trunk_of(model), *(public_release(model, records, policy, "float16", seed=6) for records in parts)


def test_the_public_only_model_is_a_trunk_that_saw_nothing_else() -> None:
    trunk, public, private, test = warm_trunk_and_records()
    alone, both = PublicOnly(trunk, public, rounds=3), copy.deepcopy(trunk)
    assert alone.compare(trunk, test).keys() == {"public_only_accuracy", "gain_over_public", "gain_interval"}
    for number in (1, 2, 3):
        trunk.train(public, 0, number)
        both.train(Batches.concat([public, private]), 0, number)
    expected = trunk.evaluate(test)["test_accuracy"]
    same = alone.compare(trunk, test)
    assert same == {"public_only_accuracy": expected, "gain_over_public": 0.0, "gain_interval": 0.0}
    before = copy.deepcopy(both.module.state_dict())
    better = alone.compare(both, test)
    assert all(torch.equal(both.module.state_dict()[k], v) for k, v in before.items())
    assert alone.compare(both, test) == better
    right = [(t.predict(test).argmax(axis=1) == test.targets).astype(float) for t in (both, trunk)]
    difference = right[0] - right[1]
    assert better["public_only_accuracy"] == expected
    assert better["gain_over_public"] == pytest.approx(difference.mean())
    assert better["gain_over_public"] > 0.02
    spread = sum((d - difference.mean()) ** 2 for d in difference) / 200
    assert better["gain_interval"] == pytest.approx(1.96 * (spread / 200) ** 0.5)


def test_for_regression_the_public_only_model_has_an_r2() -> None:
    result_of = small_settings(
        data={"builder": "own:regression", "task": "regression", "outputs": 1},
        model={"builder": "own:regression_model"},
    )
    source = Experiment(result_of).source
    model = Experiment(result_of).model
    parts = (source.device(0).train, source.device(1).test)
    public, test = (public_release(model, records, All(), "float32", 0) for records in parts)
    trunk = trunk_of(model, "regression", 1)
    alone = PublicOnly(trunk, public, rounds=2)
    for number in (1, 2):
        trunk.train(public, 0, number)
    assert alone.compare(trunk, test) == {"public_only_r2": trunk.evaluate(test)["test_r2"]}
