"""The table of the study of a service under load."""

from collections.abc import Sequence
from statistics import median

from simulations.serving.measuring import Turn
from simulations.serving.service import KINDS
from simulations.shared.results import Results
from simulations.shared.statistics import medians
from simulations.shared.tables import markdown, page

COLUMNS = ("service", "errors", "p50, ms", "p99, ms", "records a second", "CPU a record, us", "MB", "grown by")


def tables(results: Results) -> str:
    """Return medians over turns, and the ratio of both services' CPU time."""
    turns: dict[str, list[Turn]] = results["turns"]
    rows = [(kind, *_cells(mine)) for kind, mine in turns.items()]
    ours, theirs = (turns[kind] for kind in KINDS)
    pairs = [cpu([one]) / cpu([other]) for one, other in zip(ours, theirs, strict=True)]
    said = (
        f"CPU of fedsplit's service to the other's, a record: {cpu(ours) / cpu(theirs):.2f} over all turns, "
        f"{min(pairs):.2f} to {max(pairs):.2f} (median {median(pairs):.2f}) by turns."
    )
    return page(markdown(COLUMNS, rows), said)


def cpu(turns: Sequence[Turn]) -> float:
    """Return CPU seconds a record over some turns."""
    return sum(turn["cpu_seconds"] for turn in turns) / sum(turn["records"] for turn in turns)


def _cells(turns: list[Turn]) -> list[str]:
    middle, errors = medians(turns), sum(turn["errors"] for turn in turns)
    times = [f"{1000 * middle[name]:.1f}" for name in ("p50", "p99")]
    grown = turns[-1]["memory_mb"] - turns[0]["memory_mb"]
    rates = [f"{middle['records_per_second']:,.0f}", f"{1e6 * cpu(turns):.0f}", f"{middle['memory_mb']:.0f}"]
    return [f"{errors:.0f}", *times, *rates, f"{grown:+.1f}"]
