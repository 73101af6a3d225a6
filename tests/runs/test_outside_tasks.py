"""Tasks of modules outside: trained, audited, predicted, with labels at home; and who may bring such code where."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_settings
from predictions import asking

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.device.bundle import DESCRIPTION, Bundle
from fedsplit.device.home import Home
from fedsplit.device.node import Node
from fedsplit.device.nodes import real_node
from fedsplit.device.predictor import Predictor
from fedsplit.model.tasks import task_of
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from fedsplit.runs.auditing import audit_run
from fedsplit.runs.folder import run_bundle
from fedsplit.runs.simulation import simulate
from fedsplit.service.served import Served

ROOT = Path(__file__).parents[2]


def labels(**changes: dict[str, Any]) -> Settings:
    """Return a small run of a task with three labels, whose devices test, too."""
    data = {"builder": "outside:labelled", "task": "outside:Labels"}
    chosen: dict[str, dict[str, Any]] = {
        "run": {"rounds": 20},
        "data": data,
        "devices": {"test": "all"},
        "trunk": {"lr": 0.5},
    }
    return small_settings(**{key: chosen.get(key, {}) | changes.get(key, {}) for key in chosen | changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels") / "run"
    simulate(labels(audit={"targets": 8}), out=folder)
    return folder


def test_it_learns_and_is_scored_by_its_own_figures(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert result["test_label_accuracy"] > 0.75 and result["test_accuracy"] > 0.4
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert lines[-1]["train_loss"] < 0.7 * lines[0]["train_loss"] and "train_accuracy" in lines[0]


def test_the_first_loss_is_that_of_the_model_before_training(run: Path) -> None:
    """Of all records at once: computed here with the plain network and the formula written out."""
    experiment = Experiment(labels(protocol={"batch-size": 1000}))
    source, found = experiment.source, []
    for data in (source.device(d).train for d in range(source.count)):
        with torch.no_grad():
            chances = torch.sigmoid(experiment.model.forward(torch.from_numpy(data.x))).numpy()
        found.append(-np.log(np.where(data.y == 1, chances, 1 - chances)).sum())
    simulate(experiment.settings, out=run.parent / "at once")
    first = json.loads((run.parent / "at once" / "metrics.jsonl").open().readline())
    assert first["train_loss"] == pytest.approx(sum(found) / 200, rel=1e-5)


def test_predictions_are_those_that_the_run_has_tested(run: Path, tmp_path: Path) -> None:
    run_bundle(run).save(tmp_path / "device")
    home = Home.create(tmp_path / "home", [0], ["outside:Labels"])
    (home.folder / "limits.toml").write_text("enforce = false\n")
    predictor = Predictor(Bundle.load(tmp_path / "device", home.allowed), Home(home.folder), asking(Served.of_run(run)))
    source = Experiment(labels()).source
    tests = [source.device(d).test for d in range(source.count)]
    found = predictor.predict(np.concatenate([t.x for t in tests]))
    said, wanted = np.array(found.values()), np.concatenate([t.y for t in tests])
    assert said.shape == (100, 3) and set(said.ravel().tolist()) == {0, 1}
    result = json.loads((run / "result.json").read_text())
    assert result["test_label_accuracy"] == pytest.approx((said == wanted).mean())
    assert result["test_accuracy"] == pytest.approx((said == wanted).all(axis=1).mean())
    assert Served.of_run(run).facts["classes"] == 0 and not Served.of_run(run).facts["watches"]


def test_its_releases_are_attacked_without_classes(run: Path) -> None:
    report = audit_run(run, seed=0, quick=True)
    assert report["targets"] == 8 and set(report["baselines"]) == {"mean"}


def test_where_its_labels_are_changes_nothing(tmp_path: Path) -> None:
    found = {}
    for where in ("shared", "at-home"):
        protocol = {"mode": "synchronous", "labels": where, "batch-size": 1000, "chunk": 8}
        found[where] = simulate(labels(run={"rounds": 3}, protocol=protocol), out=tmp_path / where)
    for figure in ("test_loss", "test_accuracy"):
        assert found["shared"][figure] == pytest.approx(found["at-home"][figure], abs=1e-5)
    assert "test_label_accuracy" not in found["at-home"]


def test_survival_with_a_target_unlike_its_outputs_beats_public_records_alone(tmp_path: Path) -> None:
    settings = small_settings(
        run={"rounds": 15},
        data={"builder": "outside:censored", "task": "outside:Survival", "outputs": 5},
        model={"builder": "outside:survival_model"},
        protocol={"mode": "release-once"},
        public={"devices": [0], "epochs": 3},
        trunk={"optimizer": "adam", "lr": 0.01},
    )
    result = simulate(settings, out=tmp_path / "run")
    assert result["test_accuracy"] is None and result["test_concordance"] > 0.65
    assert 0 < result["public_only_concordance"] < 1 and "gain_over_public" not in result


# --- who may bring code where ------------------------------------------------------------------------------------


def test_a_device_imports_no_task_that_its_owner_has_not_allowed(run: Path, tmp_path: Path) -> None:
    run_bundle(run).save(tmp_path / "device")
    assert json.loads((tmp_path / "device" / DESCRIPTION).read_text())["task"] == "outside:Labels"
    told = "task 'outside:Labels' is not among what the device's owner allows (allow in node.toml)"
    with pytest.raises(DataError, match=re.escape(told)):
        Bundle.load(tmp_path / "device")
    Home.create(tmp_path / "home", [0], ["outside:Survival"])
    with pytest.raises(DataError, match=re.escape(told)):
        Predictor.connect("https://127.0.0.1:1", device=tmp_path / "device", home=tmp_path / "home")


def test_a_real_node_imports_no_task_that_its_owner_has_not_allowed(tmp_path: Path) -> None:
    terms = Experiment(labels()).terms.to_json()
    named = ["outside:labelled", "own:linear_model"]
    Home.create(tmp_path / "home", [0], named)
    with pytest.raises(ConfigError, match=r"data\.task 'outside:Labels' is not among what the node's owner allows"):
        real_node(terms, str(tmp_path / "home"))
    allowed = Home.create(tmp_path / "other", [0], [*named, "outside:Labels"])
    (allowed.folder / "limits.toml").write_text("enforce = false\n")
    assert isinstance(real_node(terms, str(allowed.folder)), Node)


def test_bad_names_and_unfit_protocols_are_told_before_anything_runs(refused: Callable[..., str]) -> None:
    told = refused("simulate", ROOT / "configs" / "own-data.toml", "--set", "data.task=ranking")
    known = "'classification', 'binary', 'regression', 'novelty' or 'module:Name'"
    assert told.endswith(f"data.task: should be one of {known}, got 'ranking'")
    with pytest.raises(ConfigError, match="labels 'at-home' is not for a outside:Survival task"):
        protocol = {"mode": "synchronous", "labels": "at-home"}
        data = {"builder": "outside:censored", "task": "outside:Survival", "outputs": 5}
        _ = Experiment(labels(data=data, protocol=protocol)).source


def test_what_a_task_s_own_code_says_of_records_stays_on_the_device() -> None:
    with pytest.raises(DataError) as told:
        _ = Experiment(small_settings(data={"task": "outside:Raises"})).source
    assert str(told.value).endswith("task 'outside:Raises' raised ValueError at the targets")
    assert told.value.__cause__ is None and task_of("outside:Raises").figures == ("test_loss",)


# --- the documentation -------------------------------------------------------------------------------------------


def test_the_page_about_tasks_of_ones_own_is_true(
    tmp_path: Path, main: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files are written, its commands run, and the predictions are those of three labels."""
    page = (ROOT / "docs" / "extending-task.md").read_text(encoding="utf-8")
    files = re.findall(r"^`([\w.]+)`[^\n]*\n\n```\w+\n(.*?)```", page, flags=re.S | re.M)
    assert [name for name, _ in files] == ["labels.py", "wards.py", "labels.toml"]
    for name, content in files:
        (tmp_path / name).write_text(content)
    np.save(tmp_path / "new.npy", np.random.default_rng(0).normal(size=(5, 12)))
    monkeypatch.chdir(tmp_path)
    (commands,) = re.findall(r"```bash\n(.*?)```", page, flags=re.S)
    for command in commands.splitlines():
        capsys.readouterr()
        main(*command.split()[1:])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 5 and all(len(row) == 3 and set(row) <= {0, 1} for row in lines)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_label_accuracy"] > 0.7
