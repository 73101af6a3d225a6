"""The tables of the study of health monitoring."""

from collections.abc import Iterator, Sequence
from itertools import product
from statistics import mean, median
from typing import Any

from fedsplit.data import wearables
from simulations.health.data import CELLS, POLICIES, PRIVATE
from simulations.health.measures import RATES
from simulations.shared.results import Results
from simulations.shared.statistics import between, by
from simulations.shared.tables import markdown, page

LIBRARY = "recordings"
POLICY = ("first layer", "policy")
FOUND = (*POLICY, "window", "people", "episode", "people", "precision", "PSNR", "identified", "leverage")
WATCHED = (*POLICY, "aim", "alarms a day", "found", "noticed", "delay")
COMPARED = (
    "method",
    "dropping",
    "window",
    "episode",
    "precision",
    "window, uncalibrated",
    "episode, uncalibrated",
)
Row = dict[str, Any]
Cells = dict[tuple[str, str], list[Row]]


def tables(results: Results) -> str:
    """Return what is found by first layer and policy, at thresholds, by novelty, by other methods, and in the cases."""
    rows = results["folds"]
    ours = {
        kind: [r for r in rows if (r["layer"], r["policy"]) == kind and r["method"] == LIBRARY and r["calibrated"]]
        for kind in CELLS
    }
    cells = {kind: mine for kind, mine in ours.items() if mine}
    return page(
        markdown(FOUND, _found(cells, results["leakage"])),
        markdown((*POLICY, *wearables.CLASSES), _novelties(cells), "window / episode, by which exercise is new"),
        markdown(COMPARED, _compared(rows), "first layer from donors"),
        markdown(WATCHED, _watched(cells)),
        markdown(("case", "policy", "AUC", "right"), _cases(results["cases"])),
    )


def by_seed(rows: Sequence[Row], measure: str) -> list[float]:
    """Return each seed's mean over exercises and people."""
    return [mean(row[measure] for row in mine) for _, mine in sorted(by(rows, "seed").items())]


def people(rows: Sequence[Row], measure: str) -> str:
    """Return the means of the person it is least for, and of the one it is most for."""
    means = [mean(row[measure] for row in mine) for mine in by(rows, "person").values()]
    return f"{min(means):.2f}..{max(means):.2f}"


def waited(rows: Sequence[Row], rate: int) -> tuple[str, str]:
    """Return how often the novelty was noticed at all, and the median delay where it was."""
    delays = [delay for row in rows for delay in row[f"delays {rate}"]]
    seen = [delay for delay in delays if delay is not None]
    return f"{len(seen) / len(delays):.2f}", f"{median(seen):.0f} s" if seen else "-"


def _found(cells: Cells, leaked: Sequence[Row]) -> Iterator[list[str]]:
    for kind, mine in cells.items():
        areas = [c for m in ("window", "episode") for c in (between(by_seed(mine, m)), people(mine, m))]
        attacked = [row for row in leaked if (row["layer"], row["policy"]) == kind]
        psnr, identified, leverage = (mean(row[m] for row in attacked) for m in ("psnr", "identified", "leverage"))
        leaks = [f"{psnr:.1f} dB", f"{identified:.2f}", f"{leverage:.2f}"]
        yield [kind[0], POLICIES[kind[1]].name, *areas, between(by_seed(mine, "precision")), *leaks]


def _watched(cells: Cells) -> Iterator[list[str]]:
    for (kind, mine), rate in product(cells.items(), RATES):
        alarms, found = f"{mean(by_seed(mine, f'alarms {rate}')):.0f}", between(by_seed(mine, f"found {rate}"))
        yield [*kind, str(rate), alarms, found, *waited(mine, rate)]


def _novelties(cells: Cells) -> Iterator[list[str]]:
    for kind, mine in cells.items():
        each = {novel: rows for (novel,), rows in by(mine, "novel").items()}
        yield [*kind, *(_areas(each.get(novel, [])) for novel in range(len(wearables.CLASSES)))]


def _areas(rows: Sequence[Row]) -> str:
    return " / ".join(f"{mean(row[m] for row in rows):.2f}" for m in ("window", "episode")) if rows else ""


def _compared(rows: Sequence[Row]) -> Iterator[list[str]]:
    compared = [row for row in rows if row["layer"] == "donors" and row["policy"] in ("none", PRIVATE)]
    for (name, policy), mine in _by_method(compared):
        own, usual = ([row for row in mine if row["calibrated"] is c] for c in (True, False))
        cells = [between(by_seed(own, m)) if own else "cannot" for m in ("window", "episode", "precision")]
        yield [name, policy, *cells, *(between(by_seed(usual, m)) for m in ("window", "episode"))]


def _by_method(rows: Sequence[Row]) -> Iterator[tuple[tuple[str, str], list[Row]]]:
    """Yield rows by method and policy, all policies of a method together."""
    groups = by(rows, "method", "policy")
    order = list(dict.fromkeys(method for method, _ in groups))
    for method, policy in sorted(groups, key=lambda key: order.index(key[0])):
        yield (method, policy), groups[method, policy]


def _cases(cases: Sequence[Row]) -> Iterator[list[str]]:
    for (case, policy), mine in by(cases, "case", "policy").items():
        right = f"{sum(row['right'] for row in mine)} of {len(mine)}" if "right" in mine[0] else "-"
        yield [case, policy, between([row["auc"] for row in mine]), right]
