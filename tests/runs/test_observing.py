"""Observers: what they hear, in which order, and that a run goes on without one that fails."""

import json
import logging
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, simulated_json, small_settings
from references import largest_difference, trained

from fedsplit import Observer, simulate
from fedsplit.common.errors import ConfigError, RunError
from fedsplit.flower.grid import InProcessGrid
from fedsplit.plan.settings import Settings
from fedsplit.runs.client_app import client_app
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.observing import Begun
from fedsplit.runs.training import TrainingRun

HEARD: list[tuple[str, Any]] = []
PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "own-tracker.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def unheard() -> Iterator[None]:
    HEARD.clear()
    yield


class Listening(Observer):
    """Notes what it hears, and tries to change it."""

    def start(self, run: Begun) -> None:
        HEARD.append(("start", run))

    def evaluation(self, figures: dict[str, Any]) -> None:
        HEARD.append(("evaluation", dict(figures)))
        figures.clear()

    def round(self, figures: dict[str, Any]) -> None:
        HEARD.append(("round", dict(figures)))
        figures.clear()

    def end(self, result: dict[str, Any] | None) -> None:
        HEARD.append(("end", None if result is None else dict(result)))
        if result:
            result.clear()


class Adding(Observer):
    def round(self, figures: dict[str, Any]) -> dict[str, float]:
        return {"twice": 2.0 * figures["round"]}


class Failing(Observer):
    def round(self, figures: dict[str, Any]) -> None:
        HEARD.append(("failing", figures["round"]))
        if figures["round"] == 2:
            raise OSError("the tracker\ndoes not answer")


class TakingAName(Observer):
    def round(self, figures: dict[str, Any]) -> dict[str, float]:
        return {"train_loss": 0.0}


class Ending(Observer):
    def round(self, figures: dict[str, Any]) -> None:
        if figures["round"] == 2:
            raise RunError("it is good enough")


class NotMade(Observer):
    def __init__(self) -> None:
        raise ValueError("no server is set")


class NotDerived:
    pass


def observed(*names: str, **changes: dict[str, Any]) -> Settings:
    run = {"observers": [f"test_observing:{name}" for name in names], **changes.pop("run", {})}
    return small_settings(run=run, **changes)


def heard(what: str) -> list[Any]:
    return [told for name, told in HEARD if name == what]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunFolder(folder).rounds()]


def test_it_hears_all_in_its_order_and_can_change_nothing(out: Path) -> None:
    settings = observed("Listening", run={"evaluate-every": 2})
    result = simulate(settings, out=out)
    order = ["start", "round", "evaluation", "round", "round", "evaluation", "round", "end"]
    assert [name for name, _ in HEARD] == order
    (begun,) = heard("start")
    assert (begun.name, begun.folder, begun.rounds, begun.done) == ("small", out, 4, 0)
    assert begun.settings == settings.flat()
    assert heard("round") == lines(out) and [figures["round"] for figures in heard("round")] == [1, 2, 3, 4]
    assert [set(figures) for figures in heard("evaluation")] == 2 * [{"round", "test_loss", "test_accuracy", "test_f1"}]
    assert heard("end") == [result] == [json.loads((out / "result.json").read_text())]


def test_what_it_adds_joins_the_figures(out: Path) -> None:
    result = simulate(observed("Adding", "Listening"), out=out)
    assert [line["twice"] for line in lines(out)] == [2, 4, 6, 8] and result["twice"] == 8
    assert [figures["twice"] for figures in heard("round")] == [2, 4, 6, 8]


def test_a_run_goes_on_without_one_that_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fedsplit"):
        simulate(observed("Failing", "TakingAName", "Listening"), out=tmp_path / "run")
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "observer test_observing:TakingAName is told nothing more: its round must return numbers by names that are not "
        "taken",
        "observer test_observing:Failing is told nothing more: its round raised OSError: the tracker",
    ]
    assert heard("failing") == [1, 2] and len(heard("round")) == 4 and len(heard("end")) == 1
    simulate(small_settings(), out=tmp_path / "without")
    assert largest_difference(trained(tmp_path / "run"), trained(tmp_path / "without")) == 0


def test_one_that_means_it_ends_the_run(out: Path) -> None:
    with pytest.raises(RunError, match=r"^it is good enough$"):
        simulate(observed("Listening", "Ending"), out=out)
    assert heard("end") == [None] and [line["round"] for line in lines(out)] == [1]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("test_observing:Nobody", "module test_observing has no class 'Nobody'"),
        ("nowhere:Nobody", "there is no module 'nowhere'"),
        ("test_observing:NotDerived", "must be derived from fedsplit.Observer"),
        ("test_observing:observed", "must be derived from fedsplit.Observer"),
        ("test_observing:NotMade", "making one raised ValueError: no server is set"),
    ],
)
def test_one_that_cannot_be_is_refused_before_anything(name: str, said: str, out: Path) -> None:
    with pytest.raises(ConfigError, match=f"run.observers '{name}'.*{said}"):
        simulate(small_settings(run={"observers": [name]}), out=out)
    assert not out.exists()


def test_a_name_must_be_a_modules() -> None:
    with pytest.raises(ConfigError, match=r"run\.observers"):
        small_settings(run={"observers": ["wandb"]})


def test_a_run_that_goes_on_says_how_far_it_is(out: Path) -> None:
    """And may do so with other observers than it was begun with."""

    def stop(metrics: dict[str, Any]) -> None:
        if metrics["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(observed("Listening"), out=out, report=stop)
    assert heard("end") == [None]
    simulate(observed("Listening", "Adding"), out=out, resume=True)
    assert [begun.done for begun in heard("start")] == [0, 3]
    assert [figures["round"] for figures in heard("round")] == [1, 2, 3, 4]
    assert lines(out)[2].get("twice") is None and lines(out)[3]["twice"] == 8


def test_seconds_are_those_of_the_clock(out: Path) -> None:
    """It moves on when looked at: when the run is made, when its nodes are there, after each round, at last."""
    settings, ticks = small_settings(), count()
    RunFolder(out).open(settings, resume=False)
    run = TrainingRun(settings, out, clock=lambda: float(next(ticks)))
    result = run.train(InProcessGrid(client_app(simulated_json(settings), str(out / "nodes")), 5))
    assert result["seconds"] == {"startup": 1.0, "training": 4.0, "total": 6.0}
    assert [line["seconds"] for line in lines(out)] == 4 * [1.0]


@pytest.mark.slow
def test_the_page_about_observers_runs(
    main: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every block of code in it, as it stands there."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r'```python title="(\w+\.py)"\n(.*?)```', PAGE, flags=re.S):
        (tmp_path / block[0]).write_text(block[1])
    commands = [shlex.split(block) for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S)]
    for command in commands:
        assert command[0] == "fedsplit"
        main(*command[1:])
    rounds = lines(tmp_path / "table")
    table = (tmp_path / "table" / "rounds.csv").read_text().splitlines()
    assert table[0] == "round,train_loss,bytes_up" and len(table) == 1 + len(rounds) > 3
    assert table[-1] == f"{len(rounds)},{rounds[-1]['train_loss']},{rounds[-1]['bytes_up']}"
    tracked = [json.loads(line) for line in (tmp_path / "tracked" / "tracked.jsonl").read_text().splitlines()]
    assert tracked[0]["parameters"]["run.observers"] == ["carbon:Carbon", "tracking:Tracking"]
    assert [line["step"] for line in tracked[1:-1]] == [line["round"] for line in lines(tmp_path / "tracked")]
    assert tracked[1]["metrics"]["grams_co2"] > 0 and tracked[-1] == {"status": "finished"}
    assert "grams_co2" in capsys.readouterr().out
    main("compare", "table", "tracked")
    assert re.search(r"grams_co2\s+-\s+\d", capsys.readouterr().out)


def test_the_setting_of_the_page_is_one() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.S)
    assert block == '[run]\nobservers = ["csv_table:CsvTable"]\n'
    assert small_settings(run={"observers": ["csv_table:CsvTable"]}).run.observers == ["csv_table:CsvTable"]
