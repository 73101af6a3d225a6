"""The tables of the study of faults."""

from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

from simulations.shared.results import Results
from simulations.shared.statistics import by
from simulations.shared.tables import markdown, page

COLUMNS = ("fault", "what was seen", "accuracy to undisturbed, points", "by seed", "left more than once", "outcome")


def tables(results: Results) -> str:
    """Return what became of each fault, and of nodes whose clocks are wrong."""
    clocks = [f"- {clock}: {outcome}" for clock, outcome in results["clocks"].items()]
    return page(markdown(COLUMNS, _rows(results["rows"])), "\n".join(clocks))


def _rows(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for (case,), mine in by(rows, "case").items():
        if "gap" not in mine[0]:
            yield [case, "", "", "", "", mine[0]["outcome"]]
            continue
        gaps = [row["gap"] for row in mine]
        seeds, twice = ", ".join(f"{gap:+.1f}" for gap in gaps), sum(row["most"] > 1 for row in mine)
        yield [case, mine[0]["seen"], f"{mean(gaps):+.1f}", seeds, str(twice), mine[0]["outcome"]]
