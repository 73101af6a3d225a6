"""What the guard says before a run."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CONFIGS
from hostile_server import private, run_settings

from fedsplit import DeviceData
from fedsplit.cli import main as cli
from fedsplit.common.errors import ConfigError
from fedsplit.data import Records
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.preflight import check_limits
from fedsplit.plan.settings import Settings, load_settings


def planned(settings: Settings) -> tuple[Any, ...]:
    """Return the run as the preflight takes it, with the limits that the settings name."""
    experiment = Experiment(settings)
    return experiment.terms, experiment.source, experiment.model.first_layer, experiment.policy, experiment.limits


def test_the_private_configuration_passes_the_preflight() -> None:
    check_limits(*planned(load_settings(CONFIGS / "mnist-private.toml", ["guard.mode=enforce"])))


def test_the_published_configuration_is_refused_with_the_ways_out() -> None:
    run = planned(load_settings(CONFIGS / "mnist-paper.toml", ["guard.mode=enforce"]))
    with pytest.raises(ConfigError) as caught:
        check_limits(*run)
    text = str(caught.value)
    assert "\n" not in text
    for said in ("up to 12 times, releases is 1", "'release-once' or 'single-pass'", "gradients is false", "'frozen'"):
        assert said in text


PIPELINED = {"mode": "pipelined"}
FROZEN = {"first_layer": {"strategy": "frozen"}}


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"protocol": PIPELINED, **FROZEN}, ""),  # top-k of the same weights: the same bytes
        ({"protocol": PIPELINED, "dropping": {"policy": "random", "keep": 0.1, "k": None}, **FROZEN}, "up to 4 times"),
        ({"protocol": {**PIPELINED, "chunk": 7}, "run": {"rounds": 3, "evaluate-every": 0}}, "gradients is false"),
        ({"protocol": {**PIPELINED, "chunk": 7}, "run": {"rounds": 4, "evaluate-every": 0}}, "up to 2 times"),
        ({"protocol": {"mode": "single-pass"}, "run": {"rounds": 4, "evaluate-every": 0}, **FROZEN}, ""),
        ({"protocol": PIPELINED, "run": {"rounds": 4, "evaluate-every": 2}}, "each test record would be released 2"),
        (
            {"protocol": PIPELINED, **FROZEN, "data": {"builder": "test_preflight:overlapping"}},
            "up to 2 records share a",
        ),
    ],
)
def test_the_preflight_counts_what_would_leave(changes: dict[str, Any], refused: str, tmp_path: Path) -> None:
    """Of 20 records, seven at a time, three rounds are one pass."""
    settings = run_settings(tmp_path / "s", "equations = 1.0", **changes)
    try:
        check_limits(*planned(settings))
    except ConfigError as error:
        assert refused and refused in str(error)
        assert ("times" in refused) == ("each record would" in str(error)) or "test" in refused
    else:
        assert not refused


@pytest.mark.parametrize(
    ("lines", "strategy", "chunk", "said"),
    [
        ("", "FedMedian", 20, "; FedMedian needs each device's alone, which tell more than a sum over a node's"),
        ("gradients = true\nepsilon = 3.0", "Krum", 20, "; Krum needs each device's alone"),
        ("", "FedAdam", 20, ""),
        (
            "gradients = true\ngradient-records = 21",
            "Krum",
            "epoch",
            "each device alone, of 20 records at most, gradient-",
        ),
        ("gradients = true\ngradient-records = 8", "Krum", 7, "each device alone, of 7 records at most, gradient-"),
        ("gradients = true\ngradient-records = 8", "FedAdam", 7, None),
        ("gradients = true\ngradient-records = 7", "Krum", 7, None),
    ],
)
def test_the_preflight_says_what_a_robust_strategy_needs(
    lines: str, strategy: str, chunk: int | str, said: str | None, tmp_path: Path
) -> None:
    changes = {"protocol": {**PIPELINED, "chunk": chunk}, "run": {"rounds": 1}, "first_layer": {"strategy": strategy}}
    settings = run_settings(tmp_path / "s", f"equations = 1.0\n{lines}", **changes)
    if said is None:
        check_limits(*planned(settings))
        return
    with pytest.raises(ConfigError) as caught:
        check_limits(*planned(settings))
    assert said in str(caught.value) and ("alone" in str(caught.value)) == bool(said)


def overlapping(device_id: int, num_devices: int) -> DeviceData:
    """Every record shares a segment with the next."""
    train, test = (private(device_id, num_devices).train, private(device_id, num_devices).test)
    parts = [Records(r.x, r.y, np.arange(len(r))[:, None] + [0, 1]) for r in (train, test)]
    return DeviceData(*parts)


def test_the_command_line_refuses_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(CONFIGS / "mnist-paper.toml"), "--out", str(tmp_path / "run"), "--set", "guard.mode=enforce"]
    arguments += ["--engine", "inline"]  # a Ray that starts meanwhile has its say on stderr, too
    monkeypatch.setattr(sys, "argv", ["fedsplit", "simulate", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(cli, "_quiet", lambda verbose: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == "" and not (tmp_path / "run").exists()
    (line,) = said.err.splitlines()
    assert line.startswith("fedsplit: the limits do not allow this run: ")
