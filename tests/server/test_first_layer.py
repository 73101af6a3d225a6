"""Strategies of the first layer: by name, a user's own, with noise; what they are given and what they may return."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import small_settings
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Strategy
from flwr.supercore.task_identity import TaskIdentity
from references import largest_difference, moved, trained

from fedsplit import simulate
from fedsplit.common.errors import ConfigError, RunError
from fedsplit.plan.strategies import NOISY, STRATEGIES
from fedsplit.server.aggregation import FirstLayerServer, build_strategy


@pytest.fixture(autouse=True)
def somebody() -> None:
    """Outside a Flower process nobody has said who we are, and a Message cannot be built without it."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


ARGS: dict[str, dict[str, Any]] = {
    "FedTrimmedAvg": {"beta": 0.3},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 2},
    "Bulyan": {"num_malicious_nodes": 1},  # which needs seven devices
    NOISY[0]: {"noise_multiplier": 0.1, "clipping_norm": 0.05, "num_sampled_clients": 7},
    NOISY[1]: {"noise_multiplier": 0.1, "num_sampled_clients": 7},
}


class Plain(FedMedian):
    """A strategy as a user would write one: the mean step, but no longer than ``most``; it counts its rounds."""

    def __init__(self, most: float = 1.0) -> None:
        super().__init__()
        self.most = most
        self.rounds = 0
        self.given: list[int] = []

    def configure_train(self, server_round: int, arrays: ArrayRecord, *rest: Any) -> Iterable[Message]:
        self.before = arrays.to_numpy_ndarrays()
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        contents = [reply.content for reply in replies]
        self.rounds += 1
        self.given.append(len(contents))
        names = list(contents[0]["arrays"].keys())
        models = zip(*(c["arrays"].to_numpy_ndarrays() for c in contents), strict=True)
        steps = [np.mean(each, axis=0) - w for each, w in zip(models, self.before, strict=True)]
        scale = min(1.0, self.most / np.sqrt(sum(np.square(s).sum() for s in steps)))
        new = [w + scale * s for w, s in zip(self.before, steps, strict=True)]
        return ArrayRecord({n: Array(w) for n, w in zip(names, new, strict=True)}), None


class Weighted(FedAvg):
    """A weighted mean: a node's devices may be summed."""


class Bad(Plain):
    """Returns something else than it was given."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        list(replies)
        if self.most == 1.0:
            return ArrayRecord({"other": Array(np.zeros(3))}), None
        if self.most == 2.0:
            return ArrayRecord({"w": Array(np.zeros(3))}), None
        if self.most == 3.0:
            raise KeyError("gone\nfor good")
        return ArrayRecord({"w": Array(np.full((2, 2), np.nan))}), None


def raises() -> None:
    """No class at all."""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [*STRATEGIES, "test_first_layer:Plain", "test_first_layer:Weighted"])
def test_every_strategy_steps_the_first_layer(strategy: str, tmp_path: Path) -> None:
    first_layer = {"strategy": strategy, "lr": 0.05, "args": ARGS.get(strategy, {})}
    settings = small_settings(
        run={"rounds": 3}, devices={"count": 7, "test": [5, 6], "per-node": 3}, first_layer=first_layer
    )
    result = simulate(settings, out=tmp_path / "run")
    found = trained(tmp_path / "run")
    assert moved(settings, found, ["first."]) > 1e-3  # what is frozen has not
    assert all(w.isfinite().all() for w in found.values())
    assert result["test_accuracy"] is not None


# --- a user's own ----------------------------------------------------------------------------------------------

WEIGHTS = {"w": np.array([[1.0, -2.0], [0.5, 3.0]], dtype=np.float32)}
SUMS = [({"w": np.array([[4.0, 0.0], [0.0, 2.0]])}, 2), ({"w": np.array([[0.0, 9.0], [0.0, 0.0]])}, 3)]
# their means times the learning rate, averaged over the two
MEAN_STEP = np.array([[1.0, 1.5], [0.0, 0.5]])


def test_an_own_strategy_is_built_with_its_arguments_and_gets_one_contribution_per_device() -> None:
    strategy = build_strategy("test_first_layer:Plain", {"most": 0.25})
    server = FirstLayerServer(strategy, WEIGHTS, lr=1.0)
    assert server.per_device
    server.step(1, SUMS)
    expected = WEIGHTS["w"] - 0.25 * MEAN_STEP / np.linalg.norm(MEAN_STEP)
    np.testing.assert_allclose(server.weights["w"], expected, rtol=1e-6)
    assert server.weights["w"].dtype == np.float32
    assert not FirstLayerServer(build_strategy("test_first_layer:Weighted", {}), WEIGHTS, lr=1.0).per_device


def test_an_own_strategys_numbers_are_in_its_state() -> None:
    server = FirstLayerServer(build_strategy("test_first_layer:Plain", {}), WEIGHTS, lr=1.0)
    server.step(1, SUMS)
    again = FirstLayerServer(build_strategy("test_first_layer:Plain", {}), WEIGHTS, lr=1.0)
    again.load_state(server.weights, server.state())
    assert (again.strategy.rounds, again.strategy.given) == (1, [2])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("no_such_module:Plain", {}, "'no_such_module:Plain': there is no module 'no_such_module'"),
        ("test_first_layer:Nothing", {}, "module test_first_layer has no class 'Nothing'"),
        ("test_first_layer:raises", {}, "'test_first_layer:raises' must be a subclass of flwr.serverapp.strategy"),
        ("pathlib:Path", {}, "'pathlib:Path' must be a subclass of flwr.serverapp.strategy.Strategy"),
        ("test_first_layer:Plain", {"least": 1}, "first-layer.args: test_first_layer:Plain: "),
        ("test_first_layer:Plain", {"least": 1}, "unexpected keyword argument 'least'"),
        ("flwr.serverapp.strategy:Strategy", {}, "abstract"),
        (NOISY[0], {"clipping_norm": 1.0, "num_sampled_clients": 3}, "noise_multiplier"),
        (NOISY[0], {"strategy": "FedAdam"}, "takes no 'strategy'; it takes clipping_norm, noise_multiplier, num_"),
        (NOISY[0], {"noise_multiplier": -1, "clipping_norm": 1.0, "num_sampled_clients": 3}, "non-negative"),
    ],
)
def test_a_strategy_that_cannot_be_built_is_refused_in_one_line(name: str, args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_strategy(name, args)
    assert str(caught.value).startswith("first-layer.") and said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("most", "said"),
    [
        (1.0, "Bad must return arrays of the names and shapes it was given"),
        (2.0, "Bad must return arrays of the names and shapes it was given"),
        (3.0, "Bad cannot aggregate 2 contributions: "),
        (4.0, "first-layer weights are not finite"),
    ],
)
def test_what_an_own_strategy_does_wrong_ends_the_run_in_one_line(most: float, said: str) -> None:
    server = FirstLayerServer(build_strategy("test_first_layer:Bad", {"most": most}), WEIGHTS, lr=1.0)
    with pytest.raises(RunError) as caught:
        server.step(1, SUMS)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert server.weights is WEIGHTS


# --- noise -----------------------------------------------------------------------------------------------------


def noisy(name: str = NOISY[0], *, seed: int | None = 3, **args: Any) -> FirstLayerServer:
    given = {"noise_multiplier": 0.0, "clipping_norm": 0.5, "num_sampled_clients": 2}
    if name == NOISY[1]:
        given["initial_clipping_norm"] = given.pop("clipping_norm")
    return FirstLayerServer(build_strategy(name, {**given, **args}), WEIGHTS, lr=0.1, seed=seed)


@pytest.mark.parametrize("name", NOISY)
def test_every_devices_step_is_clipped_and_counts_alike(name: str) -> None:
    """Devices of 2 and of 300 records, the second with a step that is too long."""
    server = noisy(name)
    assert server.per_device and isinstance(server.strategy, Strategy)
    small, large = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[0.0, 8.0], [6.0, 0.0]])
    server.step(1, [({"w": 2 * small}, 2), ({"w": 300 * large}, 300)])
    expected = WEIGHTS["w"] - (0.1 * small + 0.5 * large / 10) / 2
    np.testing.assert_allclose(server.weights["w"], expected, rtol=1e-6)


def test_noise_is_that_of_the_mean_over_the_devices_that_are_there() -> None:
    """Two thousand numbers: standard deviation multiplier * norm / 4, not the 1 that were expected."""
    weights = {"w": np.zeros((40, 50), dtype=np.float32)}
    strategy = build_strategy(NOISY[0], {"noise_multiplier": 2.0, "clipping_norm": 1.0, "num_sampled_clients": 1})
    server = FirstLayerServer(strategy, weights, lr=0.1, seed=1)
    server.step(1, [({"w": np.zeros((40, 50))}, 5)] * 4)
    assert abs(server.weights["w"].std() - 0.5) < 4 * 0.5 / np.sqrt(2 * 2000)


@pytest.mark.parametrize("name", NOISY)
def test_noise_follows_from_seed_and_round_alone(name: str) -> None:
    def after(number: int, seed: int | None, stream: str = "first-layer") -> np.ndarray:
        server = noisy(name, seed=seed, noise_multiplier=0.1)
        server.step(number, SUMS, stream)
        return server.weights["w"]

    state = np.random.get_state()[1]  # noqa: NPY002
    first = after(1, 3)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    np.random.normal()  # noqa: NPY002
    assert np.array_equal(after(1, 3), first)
    assert not np.array_equal(after(2, 3), first)
    assert not np.array_equal(after(1, 3, "flush"), first)
    assert not np.array_equal(after(1, 4), first)
    assert not np.array_equal(after(1, None), after(1, None))


@pytest.mark.parametrize("size", [0.0, 1e-300, 1e-30])
@pytest.mark.parametrize("name", NOISY)
def test_a_device_whose_gradient_is_next_to_nothing_does_not_end_the_run(name: str, size: float) -> None:
    server = noisy(name)
    server.step(1, [({"w": np.full((2, 2), size)}, 4), SUMS[0]])
    np.testing.assert_allclose(server.weights["w"], WEIGHTS["w"] - 0.1 * SUMS[0][0]["w"] / 2 / 2, rtol=1e-6)


@pytest.mark.slow
def test_a_run_with_noise_is_repeated_and_resumed_exactly(tmp_path: Path) -> None:
    args = {"noise_multiplier": 0.5, "num_sampled_clients": 5, "clipped_count_stddev": 1.0}
    settings = small_settings(run={"rounds": 4}, first_layer={"strategy": NOISY[1], "lr": 0.1, "args": args})

    def interrupt(metrics: dict[str, object]) -> None:
        if metrics["round"] == 2:
            raise KeyboardInterrupt

    simulate(settings, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        simulate(settings, out=tmp_path / "cut", report=interrupt)
    simulate(settings, out=tmp_path / "cut", resume=True)
    assert moved(settings, trained(tmp_path / "cut"), ["first."]) > 1e-3
    assert largest_difference(trained(tmp_path / "whole"), trained(tmp_path / "cut")) == 0.0


def test_an_adaptive_strategys_eta_is_the_learning_rate() -> None:
    strategy = build_strategy("FedAdam", {})
    assert isinstance(strategy, FedAdam) and strategy.tau == 1e-8
    FirstLayerServer(strategy, WEIGHTS, lr=0.07).step(1, SUMS)
    assert strategy.eta == 0.07
