"""Public records: what they teach before any device is asked, the price of leaking, and mode release-once after it."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import simulated_json, small_settings
from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from hypothesis import given, settings
from hypothesis import strategies as st
from references import largest_difference, moved, trained

from fedsplit import simulate
from fedsplit.common.errors import ConfigError, DataError, RunError
from fedsplit.data import Records
from fedsplit.data.pooled import load_pool
from fedsplit.flower.grid import InProcessGrid
from fedsplit.flower.record import from_record
from fedsplit.model.split import SplitModel
from fedsplit.model.tasks import task_of
from fedsplit.model.zoo import build_model
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from fedsplit.release.chosen import numbers_of
from fedsplit.release.noise import Noisy
from fedsplit.release.policies import All, AtMost, Bits, Random, TopK, Units
from fedsplit.release.policy import Policy
from fedsplit.release.streams import KEYED_ROUND, simulation_secret
from fedsplit.runs import observing
from fedsplit.runs.client_app import client_app
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.training import TrainingRun
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
from fedsplit.wire import exchange as wire


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes most of a small run's time, and is not looked at here."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


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


def parameters(model: SplitModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for m in (model.first_layer.layer, model.trunk) for p in m.parameters()])


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


# --- release-once ----------------------------------------------------------------------------------------------


def digits(**changes: dict[str, Any]) -> Settings:
    """Ten nodes of one device: two give their digits, six train, two test."""
    base: dict[str, dict[str, Any]] = {
        "run": {"rounds": 5},
        "data": {"name": "digits", "builder": None, "task": None, "outputs": None},
        "devices": {"count": 10, "test": 2, "partition": "iid"},
        "model": {"name": "mlp", "builder": None, "width": 32},
        "dropping": {"policy": "top-k", "k": 6},
        "protocol": {"mode": "release-once", "dtype": "float16"},
        "public": {"devices": [0, 1], "epochs": 4, "lr": 0.005},
        "trunk": {"optimizer": "adam", "lr": 0.005},
    }
    for section, values in changes.items():
        base.setdefault(section, {}).update(values)
        base[section] = {k: v for k, v in base[section].items() if v is not None or section in ("data", "model")}
    return small_settings(**base)


class Watched(InProcessGrid):
    """Notes what goes to and fro, and hides some partitions' nodes."""

    parameters = 65 * 32

    def __init__(self, *args: Any, hidden: Sequence[int] = ()) -> None:
        super().__init__(*args)
        self.hidden = set(hidden)
        self.sent: list[tuple[str, int, wire.Download]] = []
        self.received: list[tuple[str, int, wire.Upload]] = []

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [info for info in super().get_nodes() if info.node_id - 2 not in self.hidden]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            (identifier,) = super().push_messages([message])
            kind, partition = message.metadata.message_type, message.metadata.dst_node_id - 2
            if kind != "query":
                down, up = (from_record(m.content) for m in (message, self._replies[identifier]))
                self.sent.append((kind, partition, wire.Download.from_bytes(down, parameters=self.parameters)))
                self.received.append((kind, partition, wire.Upload.from_bytes(up, parameters=self.parameters)))
            ids.append(identifier)
        return ids


def watch(
    chosen: Settings, folder: Path, hidden: Sequence[int] = (), after: Callable[[int, Watched], None] | None = None
) -> tuple[TrainingRun, Watched, list[int]]:
    """Train; return the run, its grid and how many messages there had been after each round."""
    RunFolder(folder).open(chosen, resume=False)
    exchanges: list[int] = []

    def report(metrics: dict[str, Any]) -> None:
        exchanges.append(run.strategy.progress.totals.exchanges)
        if after:
            after(metrics["round"], grid)

    run = TrainingRun(chosen, folder, report)
    grid = Watched(
        client_app(simulated_json(chosen), str(folder / "nodes")), Experiment(chosen).nodes, hidden=list(hidden)
    )
    run.train(grid)
    return run, grid, exchanges


def sizes(run: TrainingRun, devices: Iterable[int]) -> dict[int, int]:
    return {d: len(run.source.device(d).train) for d in devices}


def exposures(folder: Path, ledger: str) -> list[int]:
    """How often each record that left has left, from the nodes' own files."""
    counts: list[int] = []
    for path in sorted((folder / "nodes").glob(f"*/*/ledger-{ledger}.npz")):
        with np.load(path) as file:
            counts += np.unique(file["sent"][:, 0], return_counts=True)[1].tolist()
    return counts


def released(grid: Watched, kind: str = "train") -> dict[int, int]:
    """How many records each device released, all exchanges together."""
    found: dict[int, int] = {}
    for k, _, upload in grid.received:
        for device, count in zip(upload.release.devices.tolist(), upload.release.records.tolist(), strict=True):
            if k == kind:
                found[device] = found.get(device, 0) + count
    return found


@pytest.mark.parametrize("policy", [{"policy": "top-k", "k": 6}, {"policy": "random", "keep": 0.3, "k": None}])
def test_release_once_exposes_every_record_once_and_then_is_silent(policy: dict[str, Any], out: Path) -> None:
    run, grid, exchanges = watch(digits(dropping=policy), out)
    assert run.result is not None
    private = sizes(run, range(2, 8))
    assert released(grid) == private
    assert run.result["samples"] == sum(private.values())
    assert run.result["exposures_max"] == run.result["test_exposures_max"] == 1
    assert exposures(out, "train") == [1] * sum(private.values())
    tested = sum(len(run.source.device(d).test) for d in (8, 9))
    assert exposures(out, "test") == [1] * tested
    # ten registrations and six messages, then nothing until the two test devices are asked
    assert exchanges == [16, 16, 16, 16, 18]
    assert [p for kind, p, _ in grid.sent if kind == "train"] == [2, 3, 4, 5, 6, 7]
    assert [p for kind, p, _ in grid.sent if kind == "evaluate"] == [8, 9]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["FedAdam", "frozen"])
def test_release_once_moves_no_first_layer_and_sends_no_gradients(strategy: str, out: Path) -> None:
    chosen = digits(first_layer={"strategy": strategy, "lr": 0.1}, protocol={"chunk": 40})
    run, grid, _ = watch(chosen, out)
    model = Experiment(chosen).model
    assert run.public is not None
    warm_up(
        model,
        run.public,
        task_of("classification"),
        Experiment(chosen).policy,
        WarmUp(4, 0.005, 64, 0.0),
        chosen.run.seed,
    )
    weights = model.first_layer.flatten(model.first_layer.initial_weights())
    assert len(grid.sent) > 20
    for _, _, download in grid.sent:
        assert np.array_equal(download.weights, weights)
        assert download.pending == ()
    assert all(len(upload.gradients.devices) == 0 for _, _, upload in grid.received)
    assert moved(chosen, trained(out)) > 0.01  # by the warm-up


@pytest.mark.parametrize("bits", [1, 3])
def test_bits_are_what_is_sent(bits: int, out: Path) -> None:
    run, grid, _ = watch(digits(dropping={"policy": "bits", "bits": bits, "k": None}), out)
    assert run.result is not None
    assert len(grid.received) == 8
    for _, _, upload in grid.received:
        assert upload.release.bits == bits
        assert 0 < upload.release.codes.min() <= upload.release.codes.max() < 2**bits
    # a bit of the pattern for each of 32 outputs, and codes that one bit does not need
    assert 32 < run.result["ledger"]["bits"] <= 32 + 32 * bits if bits > 1 else run.result["ledger"]["bits"] == 32


def test_release_once_in_chunks_is_silent_once_all_is_released(out: Path) -> None:
    run, grid, exchanges = watch(digits(run={"rounds": 7}, protocol={"chunk": 50}), out)
    private = sizes(run, range(2, 8))
    assert all(150 < n <= 200 for n in private.values())  # so that four rounds it takes
    assert released(grid) == private
    assert np.diff([10, *exchanges]).tolist() == [6, 6, 6, 6, 0, 0, 2]
    assert set(exposures(out, "train")) == {1}


@pytest.mark.slow
def test_release_once_learns_more_than_the_public_records_teach(out: Path) -> None:
    chosen = digits(
        run={"rounds": 20},
        devices={"count": 20, "per-node": 5, "test": 4},
        public={"devices": [0], "epochs": 10},
        trunk={"lr": 0.01},
    )
    result = simulate(chosen, out=out)
    assert result["test_accuracy"] > 0.7
    assert result["gain_over_public"] == pytest.approx(result["test_accuracy"] - result["public_only_accuracy"])
    assert result["gain_over_public"] > result["gain_interval"] > 0
    assert json.loads((out / "result.json").read_text())["public_only_accuracy"] == result["public_only_accuracy"]


@pytest.mark.slow
def test_without_private_records_the_gain_is_nothing(out: Path) -> None:
    """An independent run of the public-only model: no device that trains is there."""
    run, _, _ = watch(digits(protocol={"timeout": 0.1}), out, hidden=range(2, 8))
    assert run.result is not None and run.result["samples"] == 0
    assert (run.result["gain_over_public"], run.result["gain_interval"]) == (0.0, 0.0)
    alone = run.result["test_accuracy"]
    assert run.result["public_only_accuracy"] == alone
    other, _, _ = watch(digits(), out.with_name("whole"))
    assert other.result is not None
    assert other.result["public_only_accuracy"] == alone != other.result["test_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", ["epoch", 70])
def test_a_device_that_joins_late_is_welcome(chunk: int | str, out: Path) -> None:
    def join(round_number: int, grid: Watched) -> None:
        if round_number == 2:
            grid.hidden.clear()

    chosen = digits(run={"rounds": 6}, protocol={"timeout": 0.1, "chunk": chunk})
    run, grid, _ = watch(chosen, out, hidden=[5], after=join)
    assert run.result is not None
    rounds = {p: [d.round_number for kind, q, d in grid.sent if (kind, q) == ("train", p)] for p in range(10)}
    assert rounds[5] == ([3] if chunk == "epoch" else [3, 4, 5])
    assert rounds[4] == ([1] if chunk == "epoch" else [1, 2, 3])  # nobody is asked again because of it
    private = sizes(run, range(2, 8))
    assert released(grid) == private
    assert run.result["samples"] == sum(private.values())
    assert run.result["exposures_max"] == 1
    assert exposures(out, "train") == [1] * sum(private.values())


# --- going on after an interruption ----------------------------------------------------------------------------

COMPARED = (
    *("test_accuracy", "test_loss", "public_only_accuracy", "gain_over_public", "gain_interval"),
    *("exposures_max", "test_exposures_max", "samples", "rounds", "ledger", "guard"),
)


def assert_same_end(
    whole: dict[str, Any], resumed: dict[str, Any], folder: Path, names: Sequence[str] = COMPARED
) -> None:
    assert {name: resumed[name] for name in names} == {name: whole[name] for name in names}
    assert largest_difference(trained(folder / "whole"), trained(folder / "cut")) == 0.0


INTERRUPTED = [
    ({"mode": "release-once", "chunk": "epoch"}, {"policy": "top-k", "k": 6}),
    ({"mode": "release-once", "chunk": 50}, {"policy": "random", "keep": 0.3, "k": None}),
    ({"mode": "release-once", "chunk": 50}, {"policy": "none", "clip": 2.0, "noise": 2.0, "k": None}),
    ({"mode": "pipelined", "chunk": 50}, {"policy": "bits", "bits": 2, "k": None}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "policy"), INTERRUPTED)
def test_an_interrupted_run_resumes_exactly(protocol: dict[str, Any], policy: dict[str, Any], tmp_path: Path) -> None:
    chosen = digits(protocol=protocol, dropping=policy, first_layer={"strategy": "FedAdam", "lr": 0.01})
    whole = simulate(chosen, out=tmp_path / "whole")

    def interrupt(metrics: dict[str, Any]) -> None:
        if metrics["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(chosen, out=tmp_path / "cut", report=interrupt)
    resumed = simulate(chosen, out=tmp_path / "cut", resume=True)
    assert_same_end(whole, resumed, tmp_path)
    assert moved(chosen, trained(tmp_path / "cut")) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("killed_in", [1, 2, 5])
def test_what_left_before_its_round_was_saved_leaves_as_the_same_bytes(
    killed_in: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the devices' answers and before the checkpoint: asked again, they have nothing new to say."""
    chosen = digits(protocol={"chunk": 50}, dropping={"policy": "random", "keep": 0.3, "k": None})
    whole = simulate(chosen, out=tmp_path / "whole")
    saved = []

    def kill(*args: Any) -> None:
        saved.append(args)
        if len(saved) == killed_in:
            raise KeyboardInterrupt
        save(*args)

    save = observing.save_checkpoint
    monkeypatch.setattr(observing, "save_checkpoint", kill)
    with pytest.raises(KeyboardInterrupt):
        simulate(chosen, out=tmp_path / "cut")
    monkeypatch.setattr(observing, "save_checkpoint", save)
    resumed = simulate(chosen, out=tmp_path / "cut", resume=True)
    # what is nothing new is not refused a second time, so that its refusals are in no answer that was kept
    assert_same_end(whole, resumed, tmp_path, [name for name in COMPARED if name != "guard"])


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(tmp_path: Path) -> None:
    file = tmp_path / "digits.toml"
    file.write_text(digits(run={"rounds": 24}, protocol={"chunk": 8}).to_toml())
    command = [sys.executable, "-m", "fedsplit.cli", "simulate", str(file), "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    process = subprocess.Popen([*command, str(tmp_path / "cut")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, deadline = tmp_path / "cut" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "result.json").exists()
    subprocess.run([*command, str(tmp_path / "cut"), "--resume"], check=True, capture_output=True)
    whole, cut = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "cut"))
    assert_same_end(whole, cut, tmp_path)


# --- public records in other modes -----------------------------------------------------------------------------


def test_other_modes_begin_where_the_warm_up_ended(out: Path) -> None:
    chosen = digits(protocol={"mode": "pipelined"}, first_layer={"strategy": "FedAvg", "lr": 0.1}, run={"rounds": 2})
    run, grid, _ = watch(chosen, out)
    model = Experiment(chosen).model
    assert run.public is not None and run.result is not None
    warm_up(
        model,
        run.public,
        task_of("classification"),
        Experiment(chosen).policy,
        WarmUp(4, 0.005, 64, 0.0),
        chosen.run.seed,
    )
    weights = model.first_layer.flatten(model.first_layer.initial_weights())
    by_round = {d.round_number: d.weights for _, _, d in grid.sent}
    assert np.array_equal(by_round[1], weights)
    assert not np.array_equal(by_round[2], weights)
    assert {device for _, _, u in grid.received for device in u.release.devices.tolist()} == set(range(2, 10))
    assert run.result["samples"] == 2 * sum(sizes(run, range(2, 8)).values())
    assert run.result["public_only_accuracy"] is not None


def test_public_records_without_epochs_teach_nothing_and_their_devices_still_give_them(out: Path) -> None:
    chosen = digits(protocol={"mode": "pipelined"}, public={"epochs": 0}, first_layer={"strategy": "frozen"})
    run, grid, _ = watch(chosen, out)
    assert run.result is not None and "public_only_accuracy" not in run.result
    assert moved(chosen, trained(out), ["first."]) == 0
    assert set(released(grid)) == set(range(2, 8))


# --- where public records come from ----------------------------------------------------------------------------


def public_file(folder: Path, x: np.ndarray, y: np.ndarray) -> str:
    np.savez(folder / "public.npz", x=x, y=y)
    return str(folder / "public.npz")


def from_file(folder: Path, *borrowed: np.ndarray) -> Settings:
    """Settings with a public file of 30 records of noise and some that are borrowed."""
    x = np.concatenate([np.random.default_rng(0).random((30, 64)), *borrowed])
    file = public_file(folder, x, np.arange(len(x)) % 10)
    return digits(public={"devices": None, "file": file})


def test_a_public_file_teaches_too(tmp_path: Path, out: Path) -> None:
    pool = load_pool("digits")
    rng = np.random.default_rng(0)
    x = np.clip(pool.x + 0.05 * rng.normal(size=pool.x.shape), 0, 1)[:300]
    chosen = digits(public={"devices": None, "file": public_file(tmp_path, x, pool.y[:300])})
    source = Experiment(chosen).source
    public = Experiment(chosen).public
    assert public is not None
    np.testing.assert_array_equal(public.x, x.astype(np.float32))
    result = simulate(chosen, out=out)
    assert result["samples"] == sum(len(source.device(d).train) for d in range(8))  # nobody gives anything away
    assert result["public_only_accuracy"] > 0.3


def test_devices_that_give_their_records_are_joined_in_the_order_of_their_ids() -> None:
    chosen = digits(public={"devices": [5, 2, 5]})
    source = Experiment(chosen).source
    public = Experiment(chosen).public
    assert public is not None
    given = [source.device(d).train for d in (2, 5)]
    np.testing.assert_array_equal(public.x, np.concatenate([r.x for r in given]))
    np.testing.assert_array_equal(public.y, np.concatenate([r.y for r in given]))
    assert Experiment(small_settings()).public is None


@pytest.mark.parametrize(("device", "part"), [(0, "train"), (7, "train"), (9, "test")])
def test_a_public_file_that_overlaps_private_records_is_refused(
    device: int, part: str, tmp_path: Path, out: Path
) -> None:
    source = Experiment(digits()).source
    taken = getattr(source.device(device), part).x[3:4]
    with pytest.raises(DataError, match=f"^public records overlap with those of device {device}, which does not give"):
        simulate(from_file(tmp_path, taken.astype(np.float64)), out=out)
    assert not out.exists()
    nearly = taken.copy()
    nearly[0, 20] += 0.25  # another record
    assert Experiment(from_file(tmp_path, nearly)).public is not None


def test_a_device_that_gives_what_another_holds_too_is_refused(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device in range(4):
        x = np.random.default_rng(device).normal(size=(9, 12))
        if device == 2:
            x[4] = np.random.default_rng(0).normal(size=(9, 12))[7]
        np.savez(tmp_path / f"{device}.npz", x=x, y=np.arange(9) % 3, x_test=x + 9, y_test=np.arange(9) % 3)
    data = {"folder": str(tmp_path), "builder": None}
    chosen = small_settings(data=data, devices={"count": 4, "test": [3]}, public={"devices": [0]})
    with pytest.raises(DataError, match="overlap with those of device 2,"):
        simulate(chosen, out=out)
    both = small_settings(data=data, devices={"count": 4, "test": [3]}, public={"devices": [0, 2]})
    assert Experiment(both).public is not None


@pytest.mark.parametrize(
    ("donors", "refusal"),
    [
        ([0, 9], r"public\.devices: device 9 is a test device"),
        ([8, 9], r"public\.devices: device 8 is a test device"),
        ([0, 10], r"public\.devices: device 10 does not exist: ids are 0\.\.9"),
    ],
)
def test_devices_that_cannot_give_their_records(donors: list[int], refusal: str, out: Path) -> None:
    with pytest.raises(ConfigError, match=refusal):
        simulate(digits(public={"devices": donors}), out=out)
    assert not out.exists()


def test_a_device_with_test_records_cannot_give_its_others_if_all_are_tested(out: Path) -> None:
    chosen = small_settings(devices={"test": "all"}, public={"devices": [0]})
    with pytest.raises(ConfigError, match=r"public\.devices: device 0 is a test device"):
        simulate(chosen, out=out)


def test_no_public_devices_are_refused_in_one_line(out: Path) -> None:
    with pytest.raises(ConfigError, match="public"):
        simulate(small_settings(public={"devices": []}), out=out)
