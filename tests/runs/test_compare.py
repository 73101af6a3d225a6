"""Runs side by side: the figures are those of the folders, only what differs is named, and damage is told."""

import json
import shutil
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import small_settings

from fedsplit import simulate
from fedsplit.runs import observing
from fedsplit.runs.comparing import curves, differing, read_runs
from fedsplit.runs.pictures import draw_comparison

SO_FAR = ("exchanges", "bytes_up", "bytes_down", "exposures_max")
Show = Callable[..., str]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is evaluated after every round."""
    folder = tmp_path_factory.mktemp("compared") / "wide-20261126-090210"
    simulate(small_settings(run={"name": "wide", "evaluate-every": 1}), out=folder)
    return folder


@pytest.fixture
def unfinished(tmp_path: Path, wide: Path) -> Path:
    """The run as it was after three rounds, in the middle of writing the metrics of the next."""
    folder = shutil.copytree(wide, tmp_path / "unfinished")
    (folder / "result.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:40])
    return folder


@pytest.fixture
def old(tmp_path: Path, wide: Path) -> Path:
    """The run as an earlier version would have written it."""
    folder = shutil.copytree(wide, tmp_path / "old")
    kept = [{k: v for k, v in line.items() if k not in SO_FAR} for line in metrics_of(folder)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return folder


@pytest.fixture
def show(
    main: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Show:
    """Return a function that compares runs in an empty folder and returns what was printed."""
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments: object) -> str:
        capsys.readouterr()
        main("compare", *arguments)
        said = capsys.readouterr()
        assert said.err == ""
        return said.out

    return run


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def rows(printed: str) -> dict[str, list[str]]:
    """Return a table's rows by their first word."""
    return {words[0]: words[1:] for line in printed.splitlines() if (words := line.split())}


# --- what is shown ---------------------------------------------------------------------------------------------


def test_runs_stand_side_by_side(show: Show, trained: Path, wide: Path) -> None:
    shown = rows(show(trained, wide))
    results = [result_of(trained), result_of(wide)]
    assert shown["run"] == ["wide-20261126-090210"]
    assert shown["rounds"] == ["4", "4"]
    for name in ("test_accuracy", "test_loss"):
        assert shown[name] == [f"{result[name]:.4f}" for result in results]
    for name in ("exposures_max", "exchanges", "bytes_up", "bytes_down"):
        assert shown[name] == [f"{result[name]:,}" for result in results]
    assert shown["equations"] == [f"{result['ledger']['equations']:,}" for result in results]
    assert [run.figures["seconds"] for run in read_runs([trained, wide])] == [r["seconds"]["training"] for r in results]
    assert shown["seconds"] == [f"{result['seconds']['training']:.1f}" for result in results]
    assert "strongest" not in shown and "test_r2" not in shown  # nobody has any


def test_only_settings_that_differ_are_named(show: Show, trained: Path, wide: Path) -> None:
    printed = show(trained, wide).partition("settings that differ")[2].partition("plot written")[0]
    assert rows(printed) == {
        "dropping.k": ["4", "-"],
        "dropping.policy": ["top-k", "none"],
        "run.evaluate-every": ["0", "1"],
    }


def test_names_are_told_only_where_nothing_else_differs(show: Show, wide: Path, tmp_path: Path) -> None:
    same = shutil.copytree(wide, tmp_path / "same")
    assert "no setting differs" in show(wide, same)
    (same / "config.toml").write_text(small_settings(run={"name": "other", "evaluate-every": 1}).to_toml())
    assert differing(read_runs([wide, same])) == {"run.name": ["wide", "other"]}


def test_a_default_is_no_difference(wide: Path, tmp_path: Path) -> None:
    short = shutil.copytree(wide, tmp_path / "short")
    text = (short / "config.toml").read_text()
    assert "max-staleness = 1\n" in text
    (short / "config.toml").write_text(text.replace("max-staleness = 1\n", ""))
    assert differing(read_runs([wide, short])) == {}


def test_an_unfinished_run_is_shown_as_such_with_what_there_is(show: Show, wide: Path, unfinished: Path) -> None:
    printed = show(wide, unfinished)
    shown, lines = rows(printed), metrics_of(wide)
    assert "(unfinished)" in printed and shown["rounds"] == ["4", "3", "of", "4"]
    assert shown["equations"][1] == "-"
    assert shown["test_accuracy"][1] == f"{lines[2]['test_accuracy']:.4f}"
    assert shown["bytes_up"][1] == f"{lines[2]['bytes_up']:,}"
    whole, part = read_runs([wide, unfinished])
    assert part.figures["seconds"] == pytest.approx(sum(line["seconds"] for line in lines[:3]))
    assert whole.finished and not part.finished


def test_a_run_that_has_done_no_round_is_no_obstacle(show: Show, wide: Path, unfinished: Path) -> None:
    (unfinished / "metrics.jsonl").unlink()
    printed = show(wide, unfinished)
    assert rows(printed)["rounds"] == ["4", "0", "of", "4"]
    assert "unfinished is not plotted over rounds and bytes and exposures" in printed
    shutil.copytree(unfinished, "also")
    Path("compare.png").unlink()
    assert "there is nothing to plot" in show(unfinished, "also")
    assert not Path("compare.png").exists()


def test_an_audit_is_shown_too(show: Show, trained: Path, wide: Path, tmp_path: Path) -> None:
    audited = shutil.copytree(wide, tmp_path / "audited")
    strongest = {"attack": "Wiener", "psnr": 13.94, "identification": 0.071, "ssim": None}
    (audited / "audit.json").write_text(json.dumps({"strongest": strongest}))
    shown = rows(show(trained, audited))
    assert shown["strongest"] == ["(dB)", "-", "13.9"]
    assert shown["identified"] == ["-", "7.1%"]


@pytest.mark.slow
def test_a_regression_has_other_figures(show: Show, wide: Path, tmp_path: Path) -> None:
    folder = tmp_path / "regression"
    data = {"builder": "own:regression", "task": "regression", "outputs": 1}
    simulate(small_settings(run={"rounds": 2}, data=data, model={"builder": "own:regression_model"}), out=folder)
    shown, result = rows(show(wide, folder)), result_of(folder)
    assert shown["test_accuracy"][1] == shown["test_r2"][0] == "-"
    assert shown["test_rmse"] == ["-", f"{result['test_rmse']:.4f}"]
    assert curves(read_runs([wide, folder])[1], "round") == ([], [(2, result["test_r2"])])


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_figures_of_any_number_of_runs_are_whole_at_80_columns(
    count: int, show: Show, trained: Path, wide: Path, tmp_path: Path
) -> None:
    folders = [trained, wide]
    for number in range(count - 2):
        folder = shutil.copytree(wide, tmp_path / f"a-rather-long-name-20261126-09021{number}")
        settings = small_settings(protocol={"timeout": 1e4 + number, "max-staleness": number + 2})
        (folder / "config.toml").write_text(settings.to_toml())
        (folder / "result.json").write_text(json.dumps(result_of(wide) | {"bytes_up": 98_765_432_100 + number}))
        folders.append(folder)
    printed = show(*folders)
    assert max(len(line) for line in printed.splitlines()) <= 80
    for folder in folders:
        assert f" {result_of(folder)['bytes_up']:,} " in printed
    assert count == 2 or "protocol.max-staleness " in printed


def test_json_says_the_same(show: Show, wide: Path, unfinished: Path, trained: Path) -> None:
    printed = show(wide, unfinished, trained, "--json")
    assert printed.count("\n") == 1
    found = json.loads(printed)
    first, second, third = found["runs"]
    result = result_of(wide)
    assert {name: first[name] for name in ("test_loss", *SO_FAR)} == {n: result[n] for n in ("test_loss", *SO_FAR)}
    assert (first["label"], first["folder"], first["finished"]) == (wide.name, str(wide), True)
    assert (second["finished"], second["rounds"], second["equations"]) == (False, {"done": 3, "planned": 4}, None)
    assert third["rounds"] == {"done": 4, "planned": 4}
    assert found["settings"]["dropping.k"] == [None, None, 4]
    assert (found["plot"], found["notes"]) == ("compare.png", [])


def test_what_is_not_finite_is_not_known(show: Show, wide: Path, trained: Path, tmp_path: Path) -> None:
    lost = shutil.copytree(wide, tmp_path / "lost")
    (lost / "result.json").write_text(json.dumps(result_of(wide) | {"test_loss": float("nan"), "bytes_up": 10**400}))
    assert rows(show(trained, lost))["test_loss"][1] == "-"
    assert "NaN" not in show(trained, lost, "--json")


def test_folders_of_any_name(show: Show, wide: Path, tmp_path: Path) -> None:
    names = ("[red]a", "_b", "$c$", "$\\frac$")
    folders = [shutil.copytree(wide, tmp_path / name) for name in names]
    printed = show(*folders)
    assert all(name in printed for name in names)
    same = shutil.copytree(wide, tmp_path / "elsewhere" / "_b")
    assert [run.label for run in read_runs([folders[1], same])] == [str(folders[1]), str(same)]


# --- the plot --------------------------------------------------------------------------------------------------


def panels(path: Path) -> int:
    """Return how many parts a plot has, by its width."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    (width,) = struct.unpack(">I", data[16:20])
    return round((width / 120 - 1) / 4)


@pytest.mark.slow
def test_the_plot_is_where_it_is_said_to_be(show: Show, wide: Path, trained: Path, tmp_path: Path) -> None:
    assert show(wide, trained).endswith("plot written to compare.png\n")
    assert panels(Path("compare.png")) == 3
    path = tmp_path / "mine.PNG"
    assert f"plot written to {path}" in show(wide, trained, "--out", path)
    assert panels(path) == 3


def test_training_is_drawn_where_the_test_is_one_point(wide: Path, trained: Path) -> None:
    often, once = read_runs([wide, trained])
    for over in ("round", "bytes_up", "exposures_max"):
        train, test = curves(often, over)
        assert train == [] and test == [(line[over], line["test_accuracy"]) for line in metrics_of(wide)]
        train, test = curves(once, over)
        assert train == [(line[over], line["train_accuracy"]) for line in metrics_of(trained)]
        assert test == [(metrics_of(trained)[-1][over], result_of(trained)["test_accuracy"])]


def test_what_earlier_versions_did_not_note_is_left_out_with_a_word(show: Show, wide: Path, old: Path) -> None:
    said = "old is not plotted over bytes and exposures: its metrics.jsonl holds none"
    assert said in show(wide, old)
    assert panels(Path("compare.png")) == 3
    older = shutil.copytree(old, "older")
    assert said.replace("old", "older", 1) in show(old, older)
    assert panels(Path("compare.png")) == 1


def test_nothing_to_draw(unfinished: Path, tmp_path: Path) -> None:
    (unfinished / "metrics.jsonl").write_text("")
    runs = read_runs([unfinished, shutil.copytree(unfinished, tmp_path / "other")])
    assert not draw_comparison(runs, tmp_path / "plot.png") and not (tmp_path / "plot.png").exists()


# --- mistakes --------------------------------------------------------------------------------------------------


def test_runs_that_cannot_be_compared(refused: Callable[..., str], wide: Path, tmp_path: Path) -> None:
    assert "compare takes at least 2 run folders, got 0" in refused("compare")
    assert "compare takes at least 2 run folders, got 1" in refused("compare", wide)
    (tmp_path / "link").symlink_to(wide)
    for again in (wide, f"{wide}/", wide.parent / "x" / ".." / wide.name, tmp_path / "link"):
        assert "is given twice" in refused("compare", wide, again)
    for bad in (tmp_path, tmp_path / "nothing", wide / "result.json"):
        assert f"{bad} is not a run folder: it has no config.toml" in refused("compare", wide, bad)
    assert not (tmp_path / "compare.png").exists()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.toml", "[run\n", "config.toml: not valid TOML: "),
        ("config.toml", "[run]\nroundz = 3\n", "run.roundz: unknown key; nearest valid key is 'run.rounds'"),
        ("result.json", "{", "result.json is damaged: it must be a JSON object"),
        ("result.json", "[]", "result.json is damaged: it must be a JSON object"),
        ("result.json", '{"test_loss": "low"}', "result.json is damaged: test_loss must be a number, got 'low'"),
        ("result.json", '{"bytes_up": true}', "result.json is damaged: bytes_up must be a number, got True"),
        ("result.json", '{"ledger": 3}', "result.json is damaged: ledger must be a table, got 3"),
        ("result.json", b"\xff\xfe", "result.json is damaged: it is not text"),
        ("audit.json", "", "audit.json is damaged: it must be a JSON object"),
        ("audit.json", '{"strongest": {"psnr": []}}', "audit.json is damaged: strongest.psnr must be a number, got []"),
        ("metrics.jsonl", '{"round": 1}\n{"rou\n{"round": 3}\n', "metrics.jsonl is damaged in line 2: it must be a"),
        ("metrics.jsonl", '{"train_accuracy": 1}\n', "metrics.jsonl is damaged in line 1: it has no round"),
        ("metrics.jsonl", '{"round": {}}\n', "metrics.jsonl is damaged in line 1: round must be a number, got {}"),
        ("metrics.jsonl", "[" * 100_000 + "\n", "metrics.jsonl is damaged in line 1: it must be a JSON object"),
    ],
)
def test_damage_is_told_in_one_line(
    refused: Callable[..., str], wide: Path, trained: Path, tmp_path: Path, name: str, text: str | bytes, said: str
) -> None:
    bad = shutil.copytree(wide, tmp_path / "bad")
    (bad / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused("compare", trained, bad)
    assert str(bad) in line and said in line


def test_plots_that_cannot_be_written(refused: Callable[..., str], wide: Path, trained: Path, tmp_path: Path) -> None:
    assert "--out must name a .png file, got 'plot.pdf'" in refused("compare", wide, trained, "--out", "plot.pdf")
    missing = tmp_path / "missing" / "plot.png"
    said = refused("compare", wide, trained, "--out", missing)
    assert f"plot {missing} cannot be written: No such file or directory" in said


# --- what a run has cost so far, in each round's metrics -------------------------------------------------------


def test_the_last_rounds_totals_are_the_results(wide: Path, trained: Path) -> None:
    for folder in (wide, trained):
        lines, result = metrics_of(folder), result_of(folder)
        assert {name: lines[-1][name] for name in SO_FAR} == {name: result[name] for name in SO_FAR}
        for before, after in pairwise(lines):
            assert all(before[name] < after[name] for name in ("exchanges", "bytes_up", "bytes_down"))
            assert before["exposures_max"] <= after["exposures_max"]
        assert lines[0]["exposures_max"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["after the round", "before its checkpoint"])
@pytest.mark.parametrize(("mode", "chunk"), [("synchronous", 4), ("pipelined", "epoch"), ("single-pass", "spread")])
def test_a_resumed_runs_totals_go_on_exactly(
    mode: str, chunk: int | str, killed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for its nodes registering once more, which has its cost."""
    settings = small_settings(
        dropping={"policy": "random", "keep": 0.5}, protocol={"mode": mode, "chunk": chunk, "dtype": "float16"}
    )
    simulate(settings, out=tmp_path / "whole")
    save, saved = observing.save_checkpoint, []

    def kill(*args: Any) -> None:
        saved.append(args)
        if len(saved) == 3:
            raise KeyboardInterrupt
        save(*args)

    def stop(metrics: dict[str, Any]) -> None:
        if metrics["round"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if killed == "before its checkpoint":
            patch.setattr(observing, "save_checkpoint", kill)
        simulate(settings, out=tmp_path / "cut", report=stop if killed == "after the round" else None)
    assert len(metrics_of(tmp_path / "cut")) == (2 if killed == "after the round" else 3)
    simulate(settings, out=tmp_path / "cut", resume=True)
    whole, cut = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "cut")
    for line in (*whole, *cut):
        del line["seconds"]
        line.pop("trunk_seconds", None)
    assert cut[:2] == whole[:2]
    registered = cut[2]["bytes_up"] - whole[2]["bytes_up"]
    assert 0 < registered < whole[0]["bytes_up"]
    for line in cut[2:]:
        line["exchanges"] -= 5
        line["bytes_up"] -= registered
    assert cut == whole
