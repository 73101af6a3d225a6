"""Statistics and tables of studies, by hand."""

import math

import numpy as np
import pytest

from simulations.shared import results
from simulations.shared.statistics import between, by, interval, medians, spread
from simulations.shared.tables import figure, markdown, megabytes, page, percent


def test_intervals_are_students() -> None:
    middle, half = interval([0.5, 0.7])
    assert middle == pytest.approx(0.6)
    assert half == pytest.approx(12.706 * math.sqrt(0.02) / math.sqrt(2), rel=1e-4)  # one degree of freedom
    assert interval([1, 2, 3])[1] == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert math.isnan(interval([0.5])[1])


def test_intervals_are_written_where_values_differ() -> None:
    assert between([0.5, 0.7]) == "0.600 ± 1.271"
    assert between([0.01, 0.03], 2, "+") == "+0.02 ± 0.13"
    assert between([0.5]) == between([0.5, 0.5]) == "0.500"
    assert spread([0.5, 0.7, 0.9]) == "0.700 ± 0.200"
    assert spread([0.5]) == "0.500 ± 0.000"


def test_rows_come_together_in_their_order() -> None:
    rows = [{"a": 2, "b": 1}, {"a": 1, "b": 2}, {"a": 2, "b": 3}]
    assert by(rows, "a") == {(2,): [rows[0], rows[2]], (1,): [rows[1]]}
    assert medians([{"x": 1.0, "y": 3.0}, {"x": 2.0, "y": 5.0}, {"x": 9.0, "y": 4.0}]) == {"x": 2.0, "y": 4.0}


def test_a_table_is_markdown() -> None:
    assert markdown(("", "b"), [("x", 1), ("y",)], "title") == "**title**\n\n|  | b |\n|---|---|\n| x | 1 |\n| y |  |"
    assert page("a", "", "b") == "a\n\nb"
    assert (figure(1234.5), figure(99.96), figure(2.25)) == ("1,234", "100.0", "2.2")
    assert (megabytes(1.23e6), megabytes(1.235e6, 2), percent(0.925)) == ("1.2", "1.24", "92 %")


def test_what_numpy_has_is_written_as_numbers(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    found = {"array": np.array([1.5, 2.5]), "one": np.int64(3), "path": tmp_path, "pair": (1, 2)}
    results.write("x", True, found)
    assert results.read("x", True) == {"array": [1.5, 2.5], "one": 3, "path": str(tmp_path), "pair": [1, 2]}
