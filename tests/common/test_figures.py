"""The table of figures: what is known of each, and what becomes of one that is not in it."""

import json
from pathlib import Path

import pytest

from fedsplit.common.figures import (
    AUDITED,
    AXES,
    FIGURES,
    OBJECTIVES,
    SHOWN,
    Figure,
    figure,
    is_number,
    others,
    told_first,
)
from fedsplit.runs.comparing import listed, read_runs


def test_a_figure_that_nobody_knows_is_shown_by_its_name() -> None:
    unknown = figure("grams_co2")
    assert unknown == Figure("grams_co2") and unknown.title == "grams_co2" and unknown.shown
    assert unknown.written(0.123456) == "0.1235" and unknown.written(None) == "-"
    assert unknown.of({"grams_co2": 3}) == 3 and unknown.axis is None


def test_a_value_stands_where_its_source_says() -> None:
    result = {"seconds": {"training": 2.5}, "ledger": {"equations": 7}, "test_accuracy": None, "exchanges": True}
    assert figure("seconds").of(result) == 2.5 and figure("equations").of(result) == 7
    assert all(figure(name).of(result) is None for name in ("test_accuracy", "exchanges", "simulated_seconds"))
    assert figure("seconds").of({"seconds": 3.0}) is None
    assert not any(map(is_number, (float("inf"), float("nan"), True, "3", None, 10**400))) and is_number(-2)


def test_which_way_is_better() -> None:
    for name, sign, bound in (("test_accuracy", -1, "least"), ("bytes_up", 1, "most")):
        assert (figure(name).sign, figure(name).bound) == (sign, bound)
    better = {name for name, known in FIGURES.items() if known.better == "higher" and known.objective}
    assert better == {"test_accuracy", "test_auc"} and set(AUDITED) == {"strongest_psnr", "identification"}
    assert figure("test_accuracy").usual_change(0.5) == 0.03 and figure("seconds").usual_change(-50.0) == 5.0
    assert len(OBJECTIVES) == 10 and [known.name for known in AXES][:2] == ["round", "bytes_up"]


def test_the_first_score_is_told() -> None:
    assert told_first({"test_loss": 1.0}) is None
    found = told_first({"test_r2": 0.25, "test_loss": 1.0, "test_accuracy": None})
    assert found is not None and found.name == "test_r2" and found.written(0.25) == "0.2500"


def test_others_are_numbers_that_are_not_in_the_table() -> None:
    assert list(others({"round": 1, "mine": 2, "text": "x", "flag": True, "late": [1], "test_loss": 3.0})) == ["mine"]


def test_runs_are_compared_by_unknown_figures_too(trained: Path, tmp_path: Path) -> None:
    for name, added in (("a", {"mine": 1.5}), ("b", {})):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.toml").write_text((trained / "config.toml").read_text())
        result = json.loads((trained / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps({**result, **added}))
    runs = read_runs([tmp_path / "a", tmp_path / "b"])
    assert runs[0].figures["mine"] == 1.5 and "mine" not in runs[1].figures
    assert listed(runs) == [*(known.name for known in SHOWN), "mine"]


@pytest.mark.parametrize("known", FIGURES.values(), ids=FIGURES)
def test_every_figure_can_be_written(known: Figure) -> None:
    assert known.written(1) and known.least < known.most
