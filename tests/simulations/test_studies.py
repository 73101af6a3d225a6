"""The studies' command line: what is listed, what is refused, and where results go."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulations.__main__ import main
from simulations.shared import results
from simulations.shared.options import parse
from simulations.shared.study import load, names

STUDIES = Path(main.__code__.co_filename).parent


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keep the checkout's results as they are."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_without_a_name_all_studies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == names()
    line = next(line for line in lines if line.split()[0] == "strategies")
    assert line.endswith("poisoned labels do to the trunk (8 minutes on two cores)")


def test_every_module_but_what_they_share_is_a_study() -> None:
    found = {path.stem for path in STUDIES.glob("*.py")} | {path.parent.name for path in STUDIES.glob("*/__init__.py")}
    assert set(names()) == found - {"__init__", "__main__", "shared"}


@pytest.mark.parametrize("name", names())
def test_every_study_has_what_a_study_needs(name: str) -> None:
    study = load(name)
    assert callable(study.study) and callable(study.tables)
    assert f"python -m simulations {name}" in study.__doc__
    full, quick = (parse(name, study.__doc__, study.Options, given) for given in ([], ["--quick"]))
    assert not full.quick and full.options == study.Options()
    assert quick.quick and quick.options != full.options and type(quick.options) is study.Options


def test_a_wrong_name_gives_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nothing"]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1
    assert said.err.startswith("simulations: there is no study 'nothing': choose from clock, costs, ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["threads", "--steps", "many"], "threads: argument --steps: invalid int value: 'many'"),
        (["threads", "--other"], "threads: unrecognized arguments: --other"),
        (["labels", "missing.toml"], "missing.toml"),
        (["strategies", "--rows", "FedAvg", "Best"], "argument --rows: invalid choice: 'Best'"),
        (["health", "--held-out", "8"], "--held-out must name two people or more"),
        (["threads", "--tables"], "threads.json: run python -m simulations threads first"),
        (["threads", "--tables", "--quick"], "threads-quick.json: run python -m simulations threads --quick first"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and said in errors
    assert not folder.exists()


def test_what_is_given_comes_before_what_quick_says() -> None:
    study = load("devices")
    asked = parse("devices", study.__doc__, study.Options, ["--quick", "--rows", "pipelined", "--seeds", "4"])
    assert (asked.options.rows, asked.options.seeds, asked.options.presets) == (("pipelined",), 4, ("phones-4g",))
    positional = parse("labels", "", load("labels").Options, ["a.toml", "b.toml"])
    assert positional.options.configs == (Path("a.toml"), Path("b.toml"))


def test_a_quick_run_leaves_full_results_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = load("threads")
    results.write("threads", False, {"threads": 2, "pairs": [[1.0, 2.0]]})
    before = (folder / "threads.json").read_bytes()
    results.write("threads", True, {"threads": 2, "pairs": [[1.0, 3.0]]})
    assert (folder / "threads.json").read_bytes() == before
    assert main(["threads", "--tables"]) == 0
    assert capsys.readouterr().out == study.tables(json.loads(before)) + "\n"
    assert main(["threads", "--tables", "--quick"]) == 0
    assert "3.00" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["leverage", "clock", "strategies"])
def test_a_quick_run_goes_the_whole_path(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--quick"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("|---|") and "nan" not in shown
    written = json.loads((folder / f"{name}-quick.json").read_text())
    assert written["seconds"] > 0 and written["options"]
    assert main([name, "--tables", "--quick"]) == 0
    assert capsys.readouterr().out == shown  # the file alone says it
