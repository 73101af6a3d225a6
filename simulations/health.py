"""Whether health monitoring survives dropping: is an exercise noticed as new that nobody has released before.

    python simulations/health.py --seeds 0 1 2

Each exercise of the smart-watch data in turn is the novelty, of which no record is used before the test. People 1 and 2
give their records, from which the first layer learns (`donors`; `random`: it stays as it was drawn); devices of people
3..7 release their windows once, and the server learns from these and the donors'. Of people 8, 9 and 10 the first third
of each recording of a known exercise (4 to 8 windows of 2 s) calibrates their own device, unless a method is
`uncalibrated`; all that is measured is of the rest. Windows share no sample. The methods are in `detectors.py`.

- `window`, `precision`: area under the ROC curve, and average precision, of single windows; `episode`: of every 8
  consecutive windows. Within one device, averaged over devices, exercises and seeds.
- `alarms`, `found`: false alarms per day, and the share of episodes of the new exercise found, at the threshold for 10
  or 100 false alarms per device and day that the other held-out people's normal episodes give. `noticed`, `delay`: how
  often the new exercise is noticed at all when it follows upon a known one, and the seconds that this takes (median).
- `PSNR`, `identified`, `leverage`: of the audit's attacks on 100 private windows, released the same way.

Both the calibration and the normal records tested are of one session: what another day adds is not in this data.
Two more cases, not proofs: tumours as a table, and one recorded series with one anomaly, if the package aeon is there
(`pip install --no-deps aeon==1.6.0`). Writes `health.json` and `health.png` to `simulations/results/health`.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import bleeding, tumours
from detectors import (
    ROUNDS,
    Method,
    Releases,
    Rows,
    Scorer,
    autoencoder,
    classifier,
    neighbours,
    recordings,
    released,
    svdd,
)
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import t

from fedsplit.audit.audit import audit
from fedsplit.audit.evidence import rehearsed
from fedsplit.audit.transcript import Subjects
from fedsplit.common.seeds import seed_of
from fedsplit.data import Records, wearables
from fedsplit.model.split import SplitModel
from fedsplit.model.tasks import task_of
from fedsplit.model.zoo import build_model
from fedsplit.release.policies import All, Bits, Random, TopK
from fedsplit.release.policy import Policy as DroppingPolicy
from fedsplit.server.novelty.detector import Detector
from fedsplit.server.novelty.space import Features, Space
from fedsplit.server.novelty.trunk import Judged, auc, judge
from fedsplit.server.warmup import WarmUp, warm_up
from fedsplit.wire.query import EPISODE

RESULTS = Path(__file__).parent / "results" / "health"
KNOWN = len(wearables.CLASSES) - 1  # exercises, and so recordings of a device
DONORS, TRAINING = (1, 2), tuple(range(1, 8))  # people
PRIVATE, LIBRARY, UNTRAINED = "private", "recordings", "recordings, untrained"


@dataclass(frozen=True)
class Policy:
    """What is dropped, and the first layer's channels, of 50 outputs each."""

    dropping: DroppingPolicy
    width: int = 16


POLICIES = {
    "none": Policy(All()),
    PRIVATE: Policy(Bits(1), width=8),
    "top-48": Policy(TopK(48)),
    "paper": Policy(Random(0.25)),
}
CELLS = {  # of the study: first layer and policy, and whether every seed is attacked or the first alone
    ("donors", "none"): False,
    ("donors", PRIVATE): True,
    ("random", "none"): False,
    ("random", PRIVATE): False,
    ("donors", "top-48"): True,
    ("donors", "paper"): False,
}
RATES = (10, 100)  # false alarms per device and day
SECONDS = 2.0  # of a window
TARGETS = 100  # of the audit


class Windows:
    """All windows, by device and within it by recording and time."""

    def __init__(self) -> None:
        pool = wearables.load(overlap=False)
        order = np.argsort(pool.owners, kind="stable")
        self.x, self.y, self.device = pool.x[order], pool.y[order], pool.owners[order]
        self.person = self.device // wearables.SIDES + 1

    def targets(self, novel: int) -> Rows:
        """Return which of its device's recordings a window is of; the novelty's number is the last."""
        return np.where(self.y == novel, KNOWN, self.y - (self.y > novel))


def split_model(windows: Windows, novel: int, layer: str, policy: Policy, seed: int) -> SplitModel:
    """Return a model whose first layer is random or has learned to tell the donors' recordings apart."""
    torch.manual_seed(seed_of(seed, "model"))
    outputs = KNOWN * (int(windows.device.max()) + 1)
    model = build_model("sensor-cnn", windows.x.shape[1:], outputs, policy.width, "relu")
    if layer == "donors":
        rows = np.isin(windows.person, DONORS) & (windows.y != novel)
        records = Records(windows.x[rows], (windows.targets(novel) + KNOWN * windows.device)[rows])
        warm_up(model, records, task_of("novelty"), policy.dropping, WarmUp(40, 0.002, 64, 0.0), seed)
    return model


def methods(releases: Releases, *, rivals: bool) -> Iterator[tuple[str, Method]]:
    """Yield the library's method, and if asked for all others."""
    yield LIBRARY, recordings(releases, ROUNDS)
    if rivals:
        yield UNTRAINED, recordings(releases, 0)
        yield from classifier(releases).items()
        yield "neighbours, releases", neighbours(releases)
        yield "Deep SVDD", svdd(releases)
        yield "autoencoder", autoencoder(releases)


def first_thirds(targets: Rows) -> Rows:
    """Return the rows of one device's known recordings that calibrate it."""
    parts = [np.flatnonzero(targets == r) for r in np.unique(targets[targets < KNOWN])]
    return np.concatenate([rows[: len(rows) // 3] for rows in parts])


def delays(normal: Scorer, rows: Features, targets: Rows, limit: float) -> Iterator[float]:
    """Yield the seconds until the novelty is noticed, upon each known recording; infinite if it never is."""
    new = rows[targets == KNOWN]
    for recording in np.unique(targets[targets < KNOWN]):
        stream = np.concatenate([rows[targets == recording][1 - EPISODE :], new])
        ends = range(EPISODE, len(stream) + 1)
        above = (i for i, end in enumerate(ends) if normal.episode_score(stream[end - EPISODE : end]) > limit)
        yield SECONDS * (next(above, np.inf) + 1)


Watched = tuple[Judged, Scorer, Features, Rows]  # a device: with its tested windows' rows and targets


def measured(
    method: Method, windows: Windows, releases: Releases, held_out: Sequence[int], *, own: bool, watching: bool
) -> list[Any]:
    """Return the measures of each person who was held out; with ``watching`` those at thresholds, too."""
    population = None if own else method.normal(releases.training)
    judged: dict[int, list[Watched]] = {}
    for person in held_out:
        for device in np.unique(windows.device[windows.person == person]):
            mine = np.flatnonzero(windows.device == device)
            first = first_thirds(releases.batches.targets[mine])
            rest = np.delete(mine, first)
            normal = population or method.own(mine[first])
            targets = releases.batches.targets[rest]
            scored = judge(normal, method.rows[rest], targets, KNOWN)
            judged.setdefault(person, []).append((scored, normal, method.rows[rest], targets))
    found = []
    for person in held_out:
        mine, others = judged[person], [j for o in held_out if o != person for j, *_ in judged[o]]
        found.append({"person": person, **areas([j for j, *_ in mine]), **(alarms(mine, others) if watching else {})})
    return found


def areas(seen: Sequence[Judged]) -> dict[str, float]:
    """Return the measures that need no threshold, means over a person's devices."""
    return {
        "window": float(np.mean([auc(j.new, j.scores) for j in seen])),
        "precision": float(np.mean([precision(j.new, j.scores) for j in seen])),
        "episode": float(np.mean([auc(j.new_episodes, j.episodes) for j in seen])),
    }


def alarms(mine: Sequence[Watched], others: Sequence[Judged]) -> dict[str, Any]:
    """Return what comes of thresholds by other people's normal episodes."""
    seen, result = [j for j, *_ in mine], {}
    known = np.concatenate([j.episodes[~j.new_episodes] for j in others])
    detector = Detector(Space(np.zeros(0), np.zeros((0, 0))), known)  # for its threshold alone
    for rate in RATES:
        limit = detector.threshold(rate, SECONDS)
        above = [(j.episodes > limit, j.new_episodes) for j in seen]
        result[f"alarms {rate}"] = float(np.mean([a[~new].mean() for a, new in above]) * 86_400 / SECONDS)
        result[f"found {rate}"] = float(np.mean([a[new].mean() for a, new in above]))
        waited = [list(delays(*rest, limit)) for _, *rest in mine]
        result[f"delays {rate}"] = [d if np.isfinite(d) else None for device in waited for d in device]
    return result


def precision(new: NDArray[np.bool_], scores: Features) -> float:
    """Return the average precision of finding what is new."""
    found = new[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(found) / np.arange(1, len(found) + 1))[found].mean())


def fold(windows: Windows, novel: int, layer: str, policy: str, seed: int, held_out: Sequence[int]) -> list[Any]:
    """Run one novelty with all methods, or where the study is of first layers and policies with the library's alone."""
    dropping, targets = POLICIES[policy].dropping, windows.targets(novel)
    model = split_model(windows, novel, layer, POLICIES[policy], seed)
    training = np.isin(windows.person, TRAINING) & ~np.isin(windows.person, held_out) & (targets < KNOWN)

    def trunk(outputs: int) -> torch.nn.Module:
        torch.manual_seed(seed_of(seed, "model"))
        return build_model("sensor-cnn", windows.x.shape[1:], outputs, model.first_layer.cut_shape[0], "relu").trunk

    first = model.first_layer
    releases = Releases(
        released(first, dropping, windows.x, windows.device, targets, seed),
        recording=KNOWN * windows.device + targets,
        training=np.flatnonzero(training),
        trunk=trunk,
        cut_shape=first.cut_shape,
        outputs=KNOWN,
        seed=seed,
    )
    rows = []
    named = {"seed": seed, "layer": layer, "policy": policy, "novel": novel}
    for name, method in methods(releases, rivals=layer == "donors" and policy in ("none", PRIVATE)):
        for own in (True, False) if method.own else (False,):
            watching = own and name == LIBRARY
            found = measured(method, windows, releases, held_out, own=own, watching=watching)
            rows += [{**named, "method": name, "calibrated": own, **person} for person in found]
    return rows


def leakage(windows: Windows, layer: str, policy: str, seed: int) -> dict[str, Any]:
    """Attack private windows released as in the fold whose novelty is TRAP."""
    novel = wearables.CLASSES.index("TRAP")
    first = split_model(windows, novel, layer, POLICIES[policy], seed).first_layer
    people = np.setdiff1d(TRAINING, DONORS)
    private = np.flatnonzero(np.isin(windows.person, people) & (windows.y != novel))
    public = np.isin(windows.person, DONORS) & (windows.y != novel)
    chosen = np.sort(np.random.default_rng(seed).choice(len(private), TARGETS, replace=False))
    subjects = Subjects(
        x=windows.x[private[chosen]],
        y=windows.y[private[chosen]],  # the attacker knows the exercise
        device=windows.device[private[chosen]],
        index=chosen,
        candidates=windows.x[private],
        place=chosen,
        public=Records(windows.x[public], windows.y[public]),
        stand_in=False,
    )
    report = audit(rehearsed(first, POLICIES[policy].dropping, "float16", subjects, seed), seed=seed).report
    return {
        "layer": layer,
        "policy": policy,
        "seed": seed,
        "attack": report["strongest"]["attack"],
        "psnr": report["strongest"]["psnr"],
        "identified": max(scores["identification"] for scores in report["attacks"].values()),
        "leverage": report["criterion"]["leverage_max"],
        "mean": report["baselines"]["class mean"]["psnr"],
    }


# ---------------------------------------------------------------------- what is printed


def interval(values: Sequence[float]) -> str:
    """Return the mean, and the 95 % half-width of Student's t."""
    n = len(values)
    half = t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return f"{np.mean(values):.3f} ± {half:.3f}"


def by_seed(rows: Sequence[dict[str, Any]], measure: str) -> list[float]:
    """Return each seed's mean over exercises and people."""
    return [float(np.mean([r[measure] for r in rows if r["seed"] == s])) for s in sorted({r["seed"] for r in rows})]


def people(rows: Sequence[dict[str, Any]], measure: str) -> str:
    """Return the means of the person it is least for, and of the one it is most for."""
    means = [np.mean([r[measure] for r in rows if r["person"] == p]) for p in sorted({r["person"] for r in rows})]
    return f"{min(means):.2f}..{max(means):.2f}"


def waited(rows: Sequence[dict[str, Any]], rate: int) -> tuple[str, str]:
    """Return how often the novelty was noticed at all, and the median delay where it was."""
    delays = [d for r in rows for d in r[f"delays {rate}"]]
    seen = [d for d in delays if d is not None]
    return f"{len(seen) / len(delays):.2f}", f"{np.median(seen):.0f} s" if seen else "-"


def _table(title: str, first: Sequence[str], columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in first:
        table.add_column(name)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def methods_table(rows: list[dict[str, Any]]) -> Table:
    """Return how much each method finds."""
    columns = ("window", "episode", "precision", "uncalibrated window", "episode ")
    table = _table("methods, first layer from donors", ("method", "policy"), columns)
    compared = [r for r in rows if r["layer"] == "donors" and r["policy"] in ("none", PRIVATE)]
    for name, policy in product(*(dict.fromkeys(r[key] for r in compared) for key in ("method", "policy"))):
        mine = [r for r in compared if (r["method"], r["policy"]) == (name, policy)]
        own, usual = ([r for r in mine if r["calibrated"] is c] for c in (True, False))
        cells = [interval(by_seed(own, m)) if own else "cannot" for m in ("window", "episode", "precision")]
        table.add_row(name, policy, *cells, *(interval(by_seed(usual, m)) for m in ("window", "episode")))
    return table


def cells_tables(rows: list[dict[str, Any]], leaked: list[dict[str, Any]]) -> list[Table]:
    """Return what the library's method finds by first layer and policy: areas, at thresholds, by novelty."""
    first = ("layer", "policy")
    measures = ("window", "people", "episode", "people ", "precision", "PSNR", "identified", "leverage")
    found = _table("first layers and policies", first, measures)
    watched = _table("at thresholds from other people", (*first, "aim"), ("alarms a day", "found", "noticed", "delay"))
    novelties = _table("window / episode by novelty", first, wearables.CLASSES)
    for kind in CELLS:
        mine = [r for r in rows if (r["layer"], r["policy"]) == kind and r["method"] == LIBRARY and r["calibrated"]]
        areas = [c for m in ("window", "episode") for c in (interval(by_seed(mine, m)), people(mine, m))]
        attacked = [one for one in leaked if (one["layer"], one["policy"]) == kind]
        leaks = [float(np.mean([a[m] for a in attacked])) for m in ("psnr", "identified", "leverage")]
        leaking = f"{leaks[0]:.1f} dB", f"{leaks[1]:.2f}", f"{leaks[2]:.2f}"
        found.add_row(*kind, *areas, interval(by_seed(mine, "precision")), *leaking)
        for rate in RATES:
            counted = f"{np.mean(by_seed(mine, f'alarms {rate}')):.0f}", interval(by_seed(mine, f"found {rate}"))
            watched.add_row(*kind, str(rate), *counted, *waited(mine, rate))
        each = [[r for r in mine if r["novel"] == novel] for novel in range(KNOWN + 1)]
        novelties.add_row(
            *kind, *(" / ".join(f"{np.mean([r[m] for r in e]):.2f}" for m in ("window", "episode")) for e in each)
        )
    return [found, watched, novelties]


def cases_table(cases: list[dict[str, Any]]) -> Table:
    """Return what comes of the two small cases."""
    table = _table("cases", ("case", "policy"), ("AUC", "right"))
    for kind in dict.fromkeys((c["case"], c["policy"]) for c in cases):
        mine = [c for c in cases if (c["case"], c["policy"]) == kind]
        right = f"{sum(c['right'] for c in mine)} of {len(mine)}" if "right" in mine[0] else "-"
        table.add_row(*kind, interval([c["auc"] for c in mine]), right)
    return table


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the methods' areas on both policies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(r["method"] for r in rows))
    for axis, measure in zip(axes, ("window", "episode"), strict=True):
        for shift, policy in ((-0.15, "none"), (0.15, PRIVATE)):
            for calibrated, fill in ((True, "full"), (False, "none")):
                found = [
                    [
                        r[measure]
                        for r in rows
                        if (r["layer"], r["policy"], r["calibrated"]) == ("donors", policy, calibrated)
                        and r["method"] == n
                    ]
                    for n in names
                ]
                x, y = [np.mean(f) if f else np.nan for f in found], np.arange(len(names)) + shift
                colour, label = (
                    {"none": "C0", PRIVATE: "C1"}[policy],
                    f"{policy}{'' if calibrated else ', uncalibrated'}",
                )
                axis.plot(x, y, "o", color=colour, fillstyle=fill, label=label)
        axis.axvline(0.5, color="grey", linewidth=0.8)
        axis.set(xlabel=f"AUC, {measure}s", yticks=range(len(names)), yticklabels=names, xlim=(0.3, 1))
    axes[0].invert_yaxis()
    axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run all folds, attacks and cases, print tables and write the measures of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", type=int, nargs="+", default=wearables.HELD_OUT, help="people: 6 7 to choose by")
    arguments = parser.parse_args()
    if len(arguments.held_out) < 2:
        parser.error("--held-out must name two people or more: a threshold comes from the others")
    torch.set_num_threads(1)
    windows, rows, leaked, err = Windows(), [], [], Console(stderr=True)
    pairs = list(product(("none", PRIVATE), arguments.seeds))
    cases = [
        {"case": case.__name__, "policy": policy, "seed": seed, **found}
        for case in (tumours, bleeding)
        for policy, seed in pairs
        if (found := case(POLICIES[policy].dropping, POLICIES[policy].width, seed))
    ]
    if not any(c["case"] == "bleeding" for c in cases):
        err.print("left out: the recorded series, for which the package aeon 1.6.0 is not there")
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = {"held_out": list(arguments.held_out), "folds": rows, "leakage": leaked, "cases": cases}
    for (layer, policy), every in CELLS.items():
        for seed, novel in product(arguments.seeds, range(KNOWN + 1)):
            rows += fold(windows, novel, layer, policy, seed, arguments.held_out)
            spent = time.process_time() / 60
            err.print(
                f"{layer}, {policy}: seed {seed}, {wearables.CLASSES[novel]} is new ({spent:.1f} CPU minutes so far)"
            )
        leaked += [leakage(windows, layer, policy, seed) for seed in arguments.seeds[: None if every else 1]]
        (RESULTS / "health.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(rows, RESULTS / "health.png")
    for table in (methods_table(rows), *cells_tables(rows, leaked), cases_table(cases)):
        Console(width=150).print(table)


if __name__ == "__main__":
    main()
