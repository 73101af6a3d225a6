"""The search: what it may change, that nothing is lost or run twice, what it finds, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import CONFIGS, small_settings
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState
from torch import nn

from fedsplit.common.errors import ConfigError, RunError
from fedsplit.common.files import alone
from fedsplit.model.layer import FirstLayer
from fedsplit.plan.settings import check_settings, load_settings
from fedsplit.runs.auditing import audit_run
from fedsplit.runs.simulation import simulate
from fedsplit.tuning.space import Space, usual_space
from fedsplit.tuning.study import Study
from fedsplit.tuning.trial import Outcome, Plan, run_trial

SPACE = """
[tune.space]
dropping = [
    { policy = "top-k", k = { low = 2, high = 10, log = true } },
    { policy = "random", keep = [0.25, 0.5] },
]
trunk.lr = { low = 0.01, high = 0.2, log = true }
"""
TESTS = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return a settings file of a search that takes a moment a trial."""
    path = tmp_path / "tune.toml"
    settings = small_settings(dropping={"policy": "top-k", "k": 4}, audit={"targets": 6}).to_toml()
    path.write_text(settings + "\n[tune]\ntrials = 6\nseeds = 2\n" + SPACE)
    return path


def study_of(config: Path, out: Path, *overrides: str, resume: bool = False) -> Study:
    return Study(load_settings(config, overrides), out, resume=resume)


def test_a_space_draws_what_the_settings_take(config: Path) -> None:
    settings = load_settings(config)
    assert settings.tune is not None and settings.tune.space is not None
    space = Space.of(settings, settings.tune.space)
    fixed = {"dropping": "random", "dropping.random.keep": 0.5, "trunk.lr": 0.05}
    tables = space.draw(optuna.trial.FixedTrial(fixed))
    assert tables["dropping"] == {"policy": "random", "keep": 0.5}  # no k of the section that it takes the place of
    assert tables["trunk"]["lr"] == 0.05 and space.base["trunk"]["lr"] == 0.1
    tried: list[Any] = []
    space.check(tried.append)
    assert {(s.dropping.policy, s.dropping.k, s.dropping.keep) for s in tried} >= {
        ("top-k", 2, None),
        ("top-k", 10, None),
        ("random", None, 0.25),
        ("random", None, 0.5),
    }
    assert {s.trunk.lr for s in tried} == {0.01, 0.2}


def layer_of(width: int, relu: bool = True) -> FirstLayer:
    return FirstLayer(nn.Linear(4, width), nn.ReLU() if relu else nn.Tanh(), (4,))


@pytest.mark.slow
@given(st.integers(1, 4000), st.sampled_from(["release-once", "pipelined"]), st.booleans(), st.integers(0, 9))
def test_the_usual_space_fits_any_layer(width: int, mode: str, positive: bool, seed: int) -> None:
    settings = load_settings(CONFIGS / "wearables-private.toml", [f"protocol.mode={mode}"])
    space = Space.of(settings, usual_space(settings, layer := layer_of(width, positive)))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    tables = space.draw(study.ask())
    check_settings(tables).dropping.built().fits(layer)
    assert ("first-layer.lr" in space.dimensions) == (mode == "pipelined")


def test_the_usual_space_keeps_noise_and_masks() -> None:
    raw = small_settings(dropping={"policy": "random", "keep": 0.5, "clip": 1.0, "noise": 0.2, "mask": "keyed"})
    space = Space.of(raw, usual_space(raw, layer_of(10)))
    tables = space.draw(optuna.trial.FixedTrial({"dropping.noise": 0.3, "trunk.lr": 0.1, "first-layer.lr": 0.1}))
    assert tables["dropping"] == {"policy": "random", "keep": 0.5, "clip": 1.0, "noise": 0.3, "mask": "keyed"}
    keyed = small_settings(dropping={"policy": "top-k", "k": 4, "mask": "keyed"})
    tables = usual_space(keyed, layer_of(10))
    assert {table["mask"] for table in tables["dropping"]} == {"keyed"}


def test_lists_stand_for_themselves_where_settings_take_lists(config: Path) -> None:
    tables = [{"count": 5, "test": [3, 4]}, {"count": 5, "test": [2, 4], "fraction": [0.5, 1.0]}]
    space = Space.of(load_settings(config), {"devices": tables})
    fixed = {"devices": "table-2", "devices.table-2.fraction": 0.5}
    assert space.draw(optuna.trial.FixedTrial(fixed))["devices"] == {"count": 5, "test": [2, 4], "fraction": 0.5}
    space = Space.of(load_settings(config), {"devices": {"test": [[3, 4], [2, 4]]}})
    assert space.draw(optuna.trial.FixedTrial({"devices.test": "[2, 4]"}))["devices"]["test"] == [2, 4]
    nested = [{"strategy": "FedAdam", "args": {"beta_1": {"low": 0.5, "high": 0.9}}}, {"strategy": "FedAvg"}]
    space = Space.of(load_settings(config), {"first-layer": nested})
    fixed = {"first-layer": "FedAdam", "first-layer.FedAdam.args.beta_1": 0.6}
    assert space.draw(optuna.trial.FixedTrial(fixed))["first-layer"]["args"] == {"beta_1": 0.6}


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ("trunk.rate = [0.1, 0.2]", "tune.space.trunk.rate: unknown setting; nearest setting is 'trunk.lr'"),
        ("dropping.k = {low = 9, high = 3}", "tune.space.dropping.k: low must be less than high, got low 9 and high 3"),
        ("dropping.k = {low = 3}", "tune.space.dropping.k: low and high must be numbers, got low 3 and high None"),
        ("dropping.k = {low = 0, high = 3, log = true}", "with log low must be greater than 0, got 0"),
        ("dropping.k = {low = 1, high = 3, by = 2}", "unknown key 'by'; a range takes low, high and log"),
        ("dropping.k = [4]", "a choice needs at least two different values, got [4]"),
        ("trunk.weight-decay = {low = 0.0, high = inf}", "low and high must be finite, got low 0.0 and high inf"),
        ("trunk.lr = [1979-05-27, 1979-05-28]", "tune.space: the first of everything: trunk.lr: "),
        ("audit.targets = [6, 0]", "audit.targets = 0: 'strongest_psnr' is an audit's"),
        ("first-layer.args.nonsense = [1, 2]", "first-layer.args: FedAvg takes no 'nonsense'"),
        ("run.seed = [3, 9223372036854775807]", "run.seed: "),
        ("dropping.k = 4", "must be a list of values or a range"),
        ("dropping = [{policy = 'none'}]", "alternatives need at least two tables"),
        ("dropping.k = {low = 4, high = 400}", "tune.space: dropping.k = 400: "),
        ("dropping.policy = ['top-k', 'random']", "dropping.policy = 'random': dropping: policy 'random' takes keep"),
        ("run.rounds = [3, -1]", "run.rounds = -1: run.rounds: "),
        ("", "there is nothing to search"),
    ],
)
def test_a_bad_space_is_refused(config: Path, refused: Callable[..., str], space: str, says: str) -> None:
    config.write_text(config.read_text().partition("[tune.space]")[0] + "[tune.space]\n" + space)
    assert says in refused("tune", config, "--out", config.parent / "out")
    assert not (config.parent / "out").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("audit.targets=0", "'strongest_psnr' is an audit's: audit.targets must be at least 1, got 0"),
        ("tune.objectives=['accuracy']", "tune.objectives: should be 'test_accuracy', 'test_auc', 'test_loss', "),
        ("tune.objectives=['seconds','seconds']", "none may come twice"),
        ("tune.objectives=[]", "tune.objectives: "),
        (
            "tune.constraints.test_accuracy=1.5",
            "constraints.test_accuracy: no run can have at least 1.5, it is in 0..1",
        ),
        ("tune.constraints.exposures_max=0", "constraints.exposures_max: no run can have at most 0, it is in 1..inf"),
        ("tune.trials=0", "tune.trials: "),
        ("tune.trails=9", "tune.trails: unknown key; nearest valid key is 'tune.trials'"),
    ],
)
def test_a_bad_search_is_refused(config: Path, refused: Callable[..., str], override: str, says: str) -> None:
    assert says in refused("tune", config, "--out", config.parent / "out", "--set", override)


def test_a_regression_has_no_accuracy(config: Path, refused: Callable[..., str]) -> None:
    data = {"builder": "own:regression", "task": "regression", "outputs": 1}
    settings = small_settings(data=data, model={"builder": "own:regression_model"}, audit={"targets": 6})
    config.write_text(settings.to_toml() + "[tune]\n" + SPACE)
    said = refused("tune", config, "--out", config.parent / "out")
    assert said.endswith("a regression has no 'test_accuracy', use 'test_loss'")


def test_a_study_of_something_else_is_refused(config: Path, out: Path, refused: Callable[..., str]) -> None:
    assert "nothing to resume" in refused("tune", config, "--out", out, "--resume")
    assert "--resume needs --out" in refused("tune", config, "--resume")
    study_of(config, out)
    assert "holds a study: --resume goes on with it" in refused("tune", config, "--out", out)
    said = refused("tune", config, "--out", out, "--resume", "--set", "tune.seeds=1")
    assert said.endswith("is a study of other settings: tune.seeds was 2, is 1")
    said = refused("tune", config, "--out", out, "--resume", "--set", "trunk.optimizer=adam")
    assert said.endswith("trunk.optimizer was 'sgd', is 'adam'")
    assert study_of(config, out, "tune.trials=9", resume=True).trials == []
    (out / "study.db").write_bytes(b"no database at all, but long enough to be taken for one" * 99)
    assert "is damaged or no study" in refused("tune", config, "--out", out, "--resume")


def test_hopeless_is_what_seeds_cannot_change() -> None:
    plan = Plan(("test_accuracy", "strongest_psnr"), {"strongest_psnr": 20.0}, seeds=2)
    good = {"test_accuracy": 0.9, "strongest_psnr": 15.0}
    assert plan.hopeless({"test_accuracy": 0.80, "strongest_psnr": 17.0}, [good])
    assert not plan.hopeless({"test_accuracy": 0.88, "strongest_psnr": 17.0}, [good])
    assert not plan.hopeless({"test_accuracy": 0.80, "strongest_psnr": 15.5}, [good])
    assert plan.hopeless({"test_accuracy": 0.99, "strongest_psnr": 21.5}, [])
    assert not plan.hopeless({"test_accuracy": 0.99, "strongest_psnr": 20.5}, [])


@pytest.mark.slow
def test_a_trial_averages_its_seeds_and_repeats_none(config: Path, tmp_path: Path) -> None:
    settings, plan = load_settings(config), Plan(("test_accuracy", "strongest_psnr"), {}, seeds=2)
    outcome = run_trial(settings.to_json(), tmp_path / "trial", plan, [])
    assert outcome.values is not None and outcome.stopped is None
    first, second = outcome.seeds
    assert outcome.values["test_accuracy"] == (first["test_accuracy"] + second["test_accuracy"]) / 2
    assert first != second
    done = tmp_path / "trial" / "seed-0" / "objectives.json"
    done.write_text(json.dumps({"test_accuracy": 0.5, "strongest_psnr": 1.0}))  # to be seen in what comes
    again = run_trial(settings.to_json(), tmp_path / "trial", plan, [])
    assert again.seeds == [{"test_accuracy": 0.5, "strongest_psnr": 1.0}, second]
    others = [{"test_accuracy": 0.99, "strongest_psnr": -20.0}]
    pruned = run_trial(settings.to_json(), tmp_path / "trial", plan, others)
    assert len(pruned.seeds) == 1 and pruned.stopped == "another trial is better in everything"


@pytest.mark.slow
def test_a_run_stops_as_soon_as_its_mean_breaks_a_constraint(config: Path, tmp_path: Path) -> None:
    settings = load_settings(config).to_json()
    free = run_trial(settings, tmp_path / "free", Plan(("bytes_up",), {}, seeds=2), [])
    assert free.values is not None
    first, mean = free.seeds[0]["bytes_up"], free.values["bytes_up"]
    kept = run_trial(settings, tmp_path / "kept", Plan(("bytes_up",), {"bytes_up": mean}, seeds=2), [])
    assert kept.values == free.values
    plan = Plan(("bytes_up",), {"bytes_up": mean - 1}, seeds=2)
    outcome = run_trial(settings, tmp_path / "stopped", plan, [])
    assert outcome == Outcome(None, [], f"bytes_up would be more than {mean - 1:g}")
    assert (tmp_path / "stopped" / "seed-0" / "result.json").exists() == (first / 2 <= mean - 1)
    assert not (tmp_path / "stopped" / "seed-1" / "result.json").exists()


def test_a_trial_that_fails_says_why(config: Path, tmp_path: Path) -> None:
    plan = Plan(("test_accuracy",), {}, seeds=1)
    settings = load_settings(config, ["protocol.min-nodes=99"])
    outcome = run_trial(settings.to_json(), tmp_path / "trial", plan, [])
    assert outcome == Outcome(None, [], "5 nodes are connected, protocol.min-nodes is 99", failed=True)


@pytest.mark.slow
def test_a_search_ends_with_a_front_that_can_be_run(
    config: Path, out: Path, main: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    main("tune", config, "--out", out, "--parallel", 2)
    said = capsys.readouterr()
    assert "6 of 6 trials" in said.out and max(map(len, said.out.splitlines())) <= 80
    found = json.loads((out / "tune.json").read_text())
    assert [trial["number"] for trial in found["trials"]] == list(range(6))
    front = [(p["values"]["test_accuracy"], p["values"]["strongest_psnr"]) for p in found["front"]]
    complete = [trial["values"] for trial in found["trials"] if trial["values"]]
    for values in complete:  # nothing beats a point of the front, and every other trial is beaten
        mine = values["test_accuracy"], values["strongest_psnr"]
        beaten = any(a >= mine[0] and b <= mine[1] and (a, b) != mine for a, b in front)
        assert beaten != (mine in front)
    assert all((out / name).stat().st_size > 5000 for name in ("front.png", "importance.png"))
    assert found["importance"].keys() == {"test_accuracy", "strongest_psnr"}
    for point in found["front"]:
        rerun = load_settings(point["config"], ["run.engine=inline"])
        result = simulate(rerun, out=out / "again" / str(point["number"]))
        assert result["test_accuracy"] == point["seeds"][0]["test_accuracy"]
        report = audit_run(out / "again" / str(point["number"]), seed=rerun.run.seed, quick=True)
        assert report["strongest"]["psnr"] == pytest.approx(point["seeds"][0]["strongest_psnr"], abs=1e-9)
        assert np.isfinite(list(point["audit"].values())).all()
    kept = {f"{point['number']:04d}" for point in found["front"]}
    assert {path.parts[-3] for path in (out / "trials").glob("*/seed-0/audit")} == kept


@pytest.mark.slow
def test_a_killed_search_goes_on_with_nothing_lost_or_run_twice(config: Path, out: Path) -> None:
    command = [sys.executable, "-m", "fedsplit.cli", "tune", str(config), "--out", str(out), "--parallel", "2"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("trial") and "(3 of 6)" in line:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in (out / "trials").glob("*/seed-*/objectives.json")}
    study = study_of(config, out, resume=True)
    finished = {trial.number: trial.values for trial in study.trials}
    assert 3 <= len(finished) < 6
    study.run(2)
    trials = study_of(config, out, resume=True).trials
    assert sorted(trial.number for trial in trials) == list(range(6))
    assert {t.number: t.values for t in trials if t.number in finished} == finished
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.slow
def test_a_front_has_no_two_alike_and_equal_settings_are_run_once(config: Path, out: Path) -> None:
    overrides = ["tune.space={dropping = {k = [2, 4]}}", "tune.objectives=['test_accuracy']", "tune.seeds=1"]
    study = study_of(config, out, *overrides, "tune.constraints.exposures_max=9")
    assert len(study.run(1)) == 1
    assert len(study.trials) == 6
    assert len(list((out / "trials").iterdir())) <= 2


@pytest.mark.slow
def test_constraints_hold_in_the_front_or_the_search_says_what_was_best(config: Path, out: Path) -> None:
    one = ["tune.objectives=['test_accuracy']", "tune.seeds=1", "tune.trials=4"]
    study = study_of(config, out, *one, "tune.constraints.strongest_psnr=-20")
    with pytest.raises(RunError, match="strongest_psnr must be at most -20, the best had"):
        study.run(1)
    with pytest.raises(ConfigError, match=r"is a study of other settings: tune\.constraints\.strongest_psnr"):
        study_of(config, out, *one, "tune.constraints.strongest_psnr=-19", resume=True)
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)


def test_two_processes_do_not_work_on_one_study(config: Path, out: Path) -> None:
    study = study_of(config, out)
    with (
        alone(out / "study.lock", "nobody else is there"),
        pytest.raises(ConfigError, match="another process works in"),
    ):
        study.run(1)
