"""Tasks: what each says of itself, and how one is found by its name."""

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from fedsplit.common.errors import ConfigError, DataError, WireError
from fedsplit.model.tasks import TASKS, is_task_name, task_of
from fedsplit.model.tasks.base import Task
from fedsplit.model.tasks.targets import Classes, Columns, Withheld

# --- by name -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TASKS, "outside:Labels"])
def test_a_task_is_found_by_its_name_which_it_keeps(name: str) -> None:
    found = task_of(name)
    assert isinstance(found, Task) and found.name == name and task_of(name) is found
    assert is_task_name(name)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ranking", f"task must be one of {', '.join(TASKS)} or 'module:Name', got 'ranking'"),
        (
            "outside:",
            f"task must be one of {', '.join(TASKS)} or 'module:Name', got 'outside:'",
        ),
        ("nowhere:Labels", "data.task 'nowhere:Labels': there is no module 'nowhere'"),
        ("outside:Ranking", "data.task 'outside:Ranking': module outside has no class 'Ranking'"),
        ("outside:not_a_task", "'outside:not_a_task' must be a subclass of fedsplit.model.tasks.base.Task"),
        ("builtins:dict", "'builtins:dict' must be a subclass of fedsplit.model.tasks.base.Task"),
        ("outside:Unfinished", "data.task 'outside:Unfinished' lacks loss"),
        ("fedsplit.model.tasks.base:Task", "lacks decide, loss, targets"),
    ],
)
def test_what_is_no_task_is_told_in_one_line(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        task_of(name)


def test_names_are_checked_without_torch_and_numpy() -> None:
    code = "import sys, fedsplit.model.tasks as t; assert t.is_task_name('a:B') and not t.is_task_name('a')"
    code += "; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- targets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "outputs", "targets"),
    [
        ("classification", 3, Classes(3)),
        ("binary", 1, Classes(2)),
        ("regression", 2, Columns(2)),
        ("novelty", 4, Classes(5)),
        ("outside:Survival", 5, Columns(2, low=0, high=4)),
    ],
)
def test_what_a_target_is(name: str, outputs: int, targets: Any) -> None:
    assert task_of(name).targets(outputs) == targets


@pytest.mark.parametrize(
    ("targets", "sent", "told"),
    [
        (Classes(3), [0, 2, 1], None),
        (Classes(3), [0, 3], "targets must be classes in 0..2"),
        (Classes(3), [0, -1], "targets must be classes in 0..2"),
        (Classes(3), [0.0, 1.0], "targets must be classes in 0..2"),
        (Classes(3), [[0], [1]], "targets must be classes in 0..2"),
        (Columns(2), [[1e30, -3.0]], None),
        (Columns(2), [[1.0]], "targets must be float32 with 2 columns"),
        (Columns(2), [[1, 2]], "targets must be float32 with 2 columns"),
        (Columns(2), [1.0, 2.0], "targets must be float32 with 2 columns"),
        (Columns(1, low=0, high=1), [[0.0], [1.0]], None),
        (Columns(1, low=0, high=1), [[0.0], [1.5]], "targets must be in 0..1"),
        (Columns(1, low=0, high=1), [[-1e-3]], "targets must be in 0..1"),
        (Withheld(), [[], []], None),
        (Withheld(), [[1.0]], "targets must not be there: labels stay at home"),
        (Withheld(), [1], "targets must not be there: labels stay at home"),
    ],
)
def test_a_server_refuses_targets_that_no_honest_device_sends(targets: Any, sent: list[Any], told: str | None) -> None:
    array = np.array(sent)
    array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
    if told is None:
        targets.check(array)
    else:
        with pytest.raises(WireError, match=re.escape(told)):
            targets.check(array)


def test_a_device_refuses_numbers_out_of_range_and_does_not_say_which() -> None:
    with pytest.raises(DataError, match=r"^here: targets must be in 0..1 for a outside:Labels task with 2 outputs$"):
        task_of("outside:Labels").check_targets(np.array([[0.0, 1.25]]), 2, "here")
    assert task_of("outside:Labels").check_targets(np.array([[0, 1]]), 2, "here").dtype == np.float32
    assert task_of("outside:Labels").check_targets(np.array([]), 2, "here").shape == (0, 2)
    assert Withheld().read(np.array([1, 2]), "here", "").shape == (2, 0)


@pytest.mark.parametrize(
    ("name", "given", "found"),
    [
        ("classification", 2, 2),
        ("binary", None, 1),
        ("binary", 1, 1),
        ("regression", None, 1),
        ("regression", 7, 7),
        ("novelty", 1, 1),
        ("classification", None, "outputs must be the number of classes, at least 2, got None"),
        ("classification", 1, "outputs must be the number of classes, at least 2, got 1"),
        ("binary", 2, "outputs must be 1 or left out for a binary task, got 2"),
        ("regression", 0, "outputs must be at least 1, got 0"),
        ("novelty", None, "outputs must be the most recordings that a device has, for a novelty task"),
        ("novelty", 0, "outputs must be at least 1, got 0"),
    ],
)
def test_outputs_mean_what_the_task_says(name: str, given: int | None, found: int | str) -> None:
    if isinstance(found, int):
        assert task_of(name).check_outputs(given) == found
    else:
        with pytest.raises(ConfigError, match=re.escape(found)):
            task_of(name).check_outputs(given)


def test_only_novelty_counts_recordings_through_all_devices() -> None:
    y = np.array([0, 2, 1])
    for name in TASKS:
        task = task_of(name)
        through = [6, 8, 7] if task.watches else [0, 2, 1]
        assert task.trunk_outputs(3, 5) == (15 if task.watches else 3)
        assert task.to_trunk(y, 3, 2).tolist() == through
        assert task.from_trunk(np.array(through), 3).tolist() == y.tolist()
    assert [name for name in TASKS if task_of(name).watches] == ["novelty"]


# --- losses and decisions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "outputs"), [("classification", 4), ("binary", 1), ("outside:Labels", 3), ("outside:Survival", 5)]
)
def test_no_gradient_is_steeper_than_the_task_says(name: str, outputs: int) -> None:
    task, rng = task_of(name), np.random.default_rng(1)
    wanted = {
        "classification": rng.integers(0, 4, 500),
        "binary": rng.integers(0, 2, 500),
        "outside:Labels": rng.integers(0, 2, (500, 3)).astype(np.float32),
        "outside:Survival": rng.integers(0, [5, 2], (500, 2)).astype(np.float32),
    }[name]
    logits = torch.from_numpy(20 * rng.normal(size=(500, outputs))).requires_grad_()
    (found,) = torch.autograd.grad(task.loss(logits, torch.from_numpy(wanted)), logits)
    bounds = task.steepest(outputs)
    if bounds is None:
        assert name == "outside:Survival"
        return
    assert 0.9 * bounds[0] < found.abs().max() <= bounds[0] + 1e-12
    assert found.abs().sum(dim=1).max() <= bounds[1] + 1e-12


def test_a_record_is_right_in_all_columns_or_wrong() -> None:
    outputs = np.array([[1.0, -1.0], [1.0, 1.0], [-2.0, -1.0]], dtype=np.float32)
    task, targets = task_of("outside:Labels"), np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)
    assert task.correct(outputs, targets).tolist() == [True, False, False]
    assert task.correct(outputs[:0], targets[:0]).shape == (0,)
    assert task.score(outputs, targets) == {"test_accuracy": 1 / 3, "test_label_accuracy": 4 / 6}


@pytest.mark.parametrize(
    ("name", "said"),
    [("classification", [1, 0]), ("binary", [0, 1]), ("regression", [[-1.0, 2.0], [3.0, 3.0]]), ("novelty", [1, 0])],
)
def test_what_a_prediction_says(name: str, said: list[Any]) -> None:
    assert task_of(name).decide(np.array([[-1.0, 2.0], [3.0, 3.0]], dtype=np.float32)).tolist() == said


def test_figures_are_those_that_scores_have() -> None:
    rng = np.random.default_rng(0)
    for name in (*TASKS, "outside:Labels", "outside:Survival"):
        task = task_of(name)
        if task.watches:  # the server judges it
            continue
        outputs = rng.normal(size=(50, 1 if name == "binary" else 3)).astype(np.float32)
        kind = task.targets(outputs.shape[1])
        integers = rng.integers(0, 2, (50,) if kind.columns is None else (50, kind.columns))
        targets = integers if kind.columns is None else integers.astype(np.float32)
        found = task.score(outputs, targets)
        assert {k for k, v in found.items() if v is not None} | {"test_loss"} == set(task.figures)
        assert (found.get("test_accuracy") is not None) == task.classifies
