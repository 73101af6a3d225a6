"""Hostile devices, and the trunk that leaves out what it learns least."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedsplit.plan.experiment import Experiment
from fedsplit.runs.assembly import split_strategy
from simulations.strategies.hostile import FACTOR, HostileApp, TrimmedTrunk
from simulations.strategies.measuring import hostile
from simulations.strategies.report import tables
from simulations.strategies.rows import ATTACKS, DEVICES, HOSTILE, ROWS, settings_for, told


def test_a_trimmed_trunk_is_the_one_that_learns() -> None:
    experiment = Experiment(settings_for(0, "pipelined", "iid", "FedAdam", 2))
    strategy = split_strategy(experiment, run=1, kind=TrimmedTrunk)
    assert isinstance(strategy.trunk, TrimmedTrunk) and strategy.trunk is strategy.parts.trunk


def test_as_many_lie_as_are_said_to() -> None:
    for seed in range(5):
        assert len(hostile(seed, "random")) == HOSTILE and hostile(seed, "random") <= set(range(DEVICES))
        assert hostile(seed, "none") == set()


def test_rows_whose_first_layer_is_not_looked_at_meet_what_attacks_the_trunk() -> None:
    assert [attack for attack in ATTACKS if told("frozen", attack)] == ["none", "labels"]
    assert all(told("FedAvg", attack) for attack in ATTACKS)
    assert [row for row in ROWS if not told(row, "flipped")] == ["frozen", "FedAdam, trimmed trunk"]


@pytest.mark.parametrize(("attack", "factor"), [("flipped", -1.0), ("scaled", -FACTOR)])
def test_gradients_are_turned_round(attack: str, factor: float) -> None:
    lied = lie(attack)
    np.testing.assert_array_equal(lied.gradients.sums, factor * np.array([[3.0, 4.0]]))


def test_noise_is_ten_times_as_large() -> None:
    assert np.linalg.norm(lie("random").gradients.sums) == pytest.approx(5 * FACTOR)


def lie(attack: str) -> Any:
    """Return what becomes of an upload with gradients of length 5."""
    app = HostileApp(lambda message, context: message, attack, {0}, 2, seed=0)
    return app._lie(upload(np.array([[3.0, 4.0]])))


def upload(sums: np.ndarray) -> Any:
    """Return as much of an upload as a lie looks at, in dataclasses."""
    from dataclasses import make_dataclass

    gradients = make_dataclass("Gradients", ["sums"])(sums)
    return make_dataclass("Upload", ["gradients", "release"])(gradients, SimpleNamespace())


def test_the_table_is_the_documentations() -> None:
    found = {"pipelined, iid": {"frozen": {"none": [0.85, 0.9], "labels": [0.8, 0.8]}}}
    lines = tables({"accuracies": found}).splitlines()
    assert lines[0] == "| pipelined, iid | none | flipped | scaled | random | labels |"
    assert lines[2] == "| frozen | .875 ± .035 |  |  |  | .800 ± .000 |"
