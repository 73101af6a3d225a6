"""The task that notices something new, from settings to scores."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_settings
from movements import NEW, RATES, app_of, done_by, fleet_of, monitor_of, normal_of, watched_settings
from predictions import listening

from fedsplit import simulate
from fedsplit.audit.transcript import Subjects
from fedsplit.common.errors import ConfigError, DataError
from fedsplit.device.home import Home
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import check_settings
from fedsplit.service.served import Served


def test_a_run_says_how_well_something_new_is_noticed(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert result["test_auc"] > 0.85 and result["test_episode_auc"] > 0.95
    assert result["test_accuracy"] is None and result["exposures_max"] == 1
    assert 0 < result["public_only_auc"] <= 1


@pytest.mark.slow
def test_equal_settings_notice_alike_and_a_run_resumes(folder: Path, run: Path, tmp_path: Path) -> None:
    settings = watched_settings(folder)
    stop = RuntimeError("stopped")

    def report(metrics: dict[str, Any]) -> None:
        if metrics["round"] == 9:
            raise stop

    with pytest.raises(RuntimeError) as stopped:
        simulate(settings, out=tmp_path / "again", report=report)
    assert stopped.value is stop
    result = simulate(settings, out=tmp_path / "again", resume=True)
    assert result["test_auc"] == json.loads((run / "result.json").read_text())["test_auc"]
    files = [(each / "checkpoint" / "detector.safetensors").read_bytes() for each in (run, tmp_path / "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocol": {"mode": "single-pass"}}, "a novelty task is for protocol.mode 'release-once'"),
        ({"data": {"outputs": None}}, "outputs must be the most recordings that a device has"),
        ({"data": {"outputs": 1}}, "labels must be in 0..1 for a novelty task with 1 outputs"),
        ({"data": {"novel": 1}}, "novel is for data sets with classes, not for a folder"),
    ],
)
def test_settings_that_do_not_fit_the_task_are_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        simulate(watched_settings(folder, **changes), out=tmp_path / "run")


def test_something_new_to_train_with_is_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    x, y = done_by(1, (*RATES, NEW))
    np.savez(tmp_path / "1.npz", x=x, y=y)
    with pytest.raises(DataError, match=r"device 1 \(1.npz\), train: label 3 is for something new"):
        simulate(watched_settings(tmp_path), out=tmp_path / "run")


@pytest.mark.slow
def test_public_recordings_may_come_in_a_file_as_real_nodes_need(
    folder: Path, run: Path, own: Home, tmp_path: Path
) -> None:
    """With data.shape the server has no device's records: those that everybody may know are of one device more."""
    x, y = done_by(9, RATES)
    np.savez(tmp_path / "public.npz", x=x, y=y)
    given = {"devices": None, "file": str(tmp_path / "public.npz")}
    absent = {"folder": None, "shape": [2, 32]}
    real = watched_settings(folder, public=given, data=absent, devices={"count": 6})
    public = Experiment(real).public
    assert public is not None and set(public.y.tolist()) == {18, 19, 20}
    assert Experiment(real).model.trunk(torch.zeros(1, *Experiment(real).model.first_layer.cut_shape)).shape[1] == 21
    result = simulate(watched_settings(folder, public=given), out=tmp_path / "run")
    assert result["test_auc"] > 0.85
    fleet = fleet_of(Served.of_run(tmp_path / "run"), tmp_path)
    with listening(app_of(fleet)) as url:
        assert monitor_of(tmp_path / "run", own, url).calibrate(normal_of(), seconds=2.0) > 0
    np.savez(tmp_path / "public.npz", x=x, y=y + 1)
    with pytest.raises(DataError, match=r"public.npz: label 3 is for something new"):
        _ = Experiment(real).public


def test_a_class_of_a_data_set_can_be_the_novelty() -> None:
    raw: dict[str, Any] = {
        "data": {"name": "digits", "novel": 3},
        "devices": {"count": 6, "partition": "iid", "test": [5]},
        "protocol": {"mode": "release-once"},
        "public": {"devices": [0], "epochs": 1},
    }
    del (tables := small_settings(**{"trunk": {}}).tables())["data"], tables["devices"]
    source = Experiment(check_settings(tables | {k: tables.get(k, {}) | v for k, v in raw.items()})).source
    assert (source.task.name, source.outputs, source.task.trunk_outputs(9, source.count)) == ("novelty", 9, 54)
    train, test = source.device(1).train, source.device(5).test
    assert set(train.y.tolist()) == set(range(9)) and set(test.y.tolist()) == set(range(10))


def test_an_attacker_knows_public_recordings_by_the_numbers_that_releases_have(folder: Path) -> None:
    settings = watched_settings(folder, public={"devices": [0, 2]})
    source = Experiment(settings).source
    public = Experiment(settings).public
    assert public is not None and set(public.y.tolist()) == {0, 1, 2, 6, 7, 8}
    subjects = Subjects.choose(source, public, settings.donors, targets=9, seed=0)
    assert subjects.public.y.tolist() == [0] * 20 + [1] * 20 + [2] * 20 + [0] * 20 + [1] * 20 + [2] * 20
    assert set(subjects.y.tolist()) <= {0, 1, 2}
