"""A user's own optimizer, schedule and pace: named by the settings, imported by the server alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_settings
from references import largest_difference, trained

from fedsplit import simulate
from fedsplit.common.errors import ConfigError
from fedsplit.common.seeds import scheduled
from fedsplit.plan.named_code import names_code
from fedsplit.server.link.runs import own_modules
from fedsplit.server.pace import RealTime
from fedsplit.server.round import Round, Rows


def thirds(round_number: int, rounds: int) -> float:
    return 0.1 ** int(3 * (round_number - 1) / rounds)


def upwards(round_number: int, rounds: int) -> float:
    return float("inf") if round_number == rounds else 1.0


def raising(round_number: int, rounds: int) -> float:
    raise KeyError(round_number)


class OddOnes(RealTime):
    """Asks only devices with odd ids, and counts its rounds."""

    rounds = 0

    def cohort(self, now: Round) -> Rows:
        self.rounds += 1
        return now.by_node({d: row for d, row in self.parts.schedule.rows(now.number).items() if d % 2})

    def state(self) -> dict[str, Any]:
        return {"rounds": self.rounds}

    def result(self) -> dict[str, Any]:
        return {"rounds_of_odd_ones": self.rounds}

    def load_state(self, state: dict[str, Any]) -> None:
        self.rounds = state["rounds"]


def failing_pace(parts: Any) -> None:
    raise ValueError


def run(folder: Path, **changes: dict[str, Any]) -> dict[str, torch.Tensor]:
    simulate(small_settings(**changes), out=folder)
    return trained(folder)


@pytest.mark.slow
def test_an_own_optimizer_takes_the_trunks_steps(tmp_path: Path) -> None:
    known = run(tmp_path / "known", trunk={"optimizer": "sgd", "momentum": 0.9, "lr": 0.05})
    own = {"optimizer": "torch.optim:SGD", "lr": 0.05, "args": {"momentum": 0.9}}
    assert largest_difference(known, run(tmp_path / "own", trunk=own)) == 0
    assert largest_difference(known, run(tmp_path / "other", trunk={**own, "args": {}})) > 1e-4


@pytest.mark.slow
def test_an_own_schedule_scales_both_learning_rates(tmp_path: Path) -> None:
    rates = [{section: {"schedule": name} for section in ("trunk", "first_layer")} for name in SCHEDULES]
    known, own, other = (run(tmp_path / str(i), **changes) for i, changes in enumerate(rates))
    assert largest_difference(known, own) == 0 < largest_difference(known, other)


SCHEDULES = ("step", "test_own_parts:thirds", "constant")


def test_an_own_schedule_returns_a_factor() -> None:
    assert [scheduled(3.0, "test_own_parts:thirds", n, 3) for n in (1, 2)] == [3.0, pytest.approx(0.3)]


@pytest.mark.slow
def test_an_own_pace_decides_who_takes_part(tmp_path: Path) -> None:
    def interrupt(metrics: dict[str, object]) -> None:
        if metrics["round"] == 2:
            raise KeyboardInterrupt

    settings = small_settings(protocol={"pace": "test_own_parts:OddOnes"})
    whole = simulate(settings, out=tmp_path / "whole")
    assert whole["samples"] == 4 * (10 + 16) and whole["rounds_of_odd_ones"] == 4
    with pytest.raises(KeyboardInterrupt):
        simulate(settings, out=tmp_path / "cut", report=interrupt)
    assert simulate(settings, out=tmp_path / "cut", resume=True)["rounds_of_odd_ones"] == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trunk": {"optimizer": "no_such_module:Own"}}, "trunk.optimizer 'no_such_module:Own': there is no module"),
        ({"trunk": {"optimizer": "torch.optim:Own"}}, "trunk.optimizer .*: module torch.optim has no class 'Own'"),
        ({"trunk": {"optimizer": "pathlib:Path"}}, "trunk.optimizer 'pathlib:Path' must be a subclass of torch.optim"),
        ({"trunk": {"optimizer": "torch.optim:SGD", "args": {"speed": 1}}}, "trunk.args: torch.optim:SGD: .*'speed'"),
        ({"trunk": {"args": {"momentum_": 1}}}, "trunk.args: sgd: .*'momentum_'"),
        ({"trunk": {"schedule": "test_own_parts:raising"}}, "schedule .*: raised KeyError in round 1"),
        ({"first_layer": {"schedule": "test_own_parts:missing"}}, "schedule .* has no function 'missing'"),
        ({"trunk": {"schedule": "test_own_parts:upwards"}, "run": {"rounds": 1}}, "finite factor .*, got inf"),
        ({"protocol": {"pace": "test_own_parts:failing_pace"}}, "protocol.pace .*: raised ValueError"),
        ({"protocol": {"pace": "test_own_parts:ConfigError"}}, "protocol.pace .* must have the methods of fedsplit"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line_before_anything_starts(
    changes: dict[str, dict[str, Any]], said: str, out: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        simulate(small_settings(**changes), out=out)
    assert "\n" not in str(refused.value) and not out.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"trunk": {"optimizer": "lion"}},
            "trunk.optimizer: should be one of 'sgd', 'adam', 'adamw' or 'module:Class'",
        ),
        ({"trunk": {"schedule": "warm"}}, "trunk.schedule: should be one of 'constant', 'cosine', 'step' or 'module:f"),
        ({"first_layer": {"schedule": ":f"}}, "first-layer.schedule: should be one of .*, got ':f'"),
        ({"trunk": {"optimizer": "a:B", "weight-decay": 0.1}}, "trunk: weight-decay is not for 'a:B'"),
        ({"protocol": {"pace": "slow"}}, "protocol.pace: .*, got 'slow'"),
    ],
)
def test_settings_refuse_what_names_nothing(changes: dict[str, dict[str, Any]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        small_settings(**changes)


def test_a_users_own_parts_travel_with_a_run_and_nodes_need_not_allow_them(tmp_path: Path) -> None:
    settings = small_settings(
        trunk={"optimizer": "one:Own", "schedule": "two:rate"},
        first_layer={"schedule": "three:rate", "strategy": "four:Own"},
        protocol={"pace": "five:Own"},
    )
    on_server = {**names_code(settings)}
    on_nodes = names_code(settings, on_nodes=True)
    assert set(on_nodes) == {"data.builder", "model.builder"}
    own = ["trunk.optimizer", "trunk.schedule", "first-layer.schedule", "first-layer.strategy", "protocol.pace"]
    assert set(on_server) - set(on_nodes) == set(own)
    assert set(names_code(small_settings())) == set(on_nodes)
    for name in ("one", "two", "three", "four", "five"):
        (tmp_path / f"{name}.py").touch()
    assert len(own_modules(on_server.values(), [tmp_path])) == 5
