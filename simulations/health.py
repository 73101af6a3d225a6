"""Whether health monitoring survives dropping: is an exercise noticed as new that nobody has released before.

    python simulations/health.py --seeds 1 2 3

Each exercise of the smart-watch data in turn is the novelty, of which no record is used before the test. People 1 and 2
give their records, from which the first layer learns (`donors`; `random`: it stays as it was drawn); devices of people
3..7 release their windows once. The trunk learns which recording (person, side, exercise) a release is of. Of people
8, 9 and 10 the first third of each recording of a known exercise (5 to 8 windows of 2 s) calibrates their own device;
all measures are of the last two thirds of every recording, known or new. Windows share no sample.

Measures are areas under the ROC curve, each within one person, averaged over people, exercises and seeds:

- `window`, `precision`: of single windows, and their average precision.
- `episode`: of whole last two thirds (8 to 16 windows); `short`: of every 8 consecutive windows of one.
- `own`: calibrated, else with the training devices' recordings as what is normal. `side`: calibrated with the person's
  other side instead, whose movements are mirrored.
- `late`: calibrated, but of the last third alone, so that a third (8 s or more) lies between.
- `alarms`, `found`: at each device's own threshold for 5 % false alarms, the share of normal and of new windows above.

Both the calibration and the normal records tested are of one session: what another day adds is not in this data.

`classifier` is what is usually done, without calibration: a trunk that learns the exercises, and its largest output;
for the first seed only.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata, t

from fedsplit.data import Records, wearables
from fedsplit.dropping import Dropping, simulation_secret
from fedsplit.forward import Chunk, forward
from fedsplit.model import SplitModel, build_model
from fedsplit.novelty import Normal, Space, Teaching, features, teach, threshold
from fedsplit.trunk import Batches, trunk_outputs
from fedsplit.warmup import WarmUp, warm_up
from fedsplit.wire import Release

RESULTS = Path(__file__).parent / "results" / "health"
EXERCISES = len(wearables.CLASSES)
DONORS, HELD_OUT = (1, 2), wearables.HELD_OUT
POLICIES = {"none": Dropping("none"), "top-48": Dropping("top-k", k=48)}
BLOCK = 8  # windows of a short episode
FALSE_ALARMS = 0.05
Scores = NDArray[np.float64]
Rows = NDArray[np.int64]


class Windows:
    """All windows, by device and within it by recording and time.

    Attributes
    ----------
    x, y, device, person : arrays (windows,)
    recording : int64 array (windows,)
        7 * device + exercise: there is one recording of each.
    part : float64 array (windows,)
        How much of its recording lies before a window, 0..1.
    """

    def __init__(self) -> None:
        pool = wearables.load(overlap=False)
        order = np.argsort(pool.owners, kind="stable")
        self.x, self.y, self.device = pool.x[order], pool.y[order], pool.owners[order]
        self.person = self.device // wearables.SIDES + 1
        self.recording = EXERCISES * self.device + self.y
        self.part = np.zeros(len(order))
        for recording in np.unique(self.recording):
            rows = np.flatnonzero(self.recording == recording)
            self.part[rows] = np.arange(len(rows)) / len(rows)


def released(model: SplitModel, dropping: Dropping, windows: Windows, seed: int) -> Batches:
    """Return what the devices release of all windows."""
    devices, records = np.unique(windows.device, return_counts=True)
    index = np.concatenate([np.arange(n) for n in records])
    chunk = Chunk(devices, records, index, index[:, None], windows.x, windows.y)
    weights = model.first_layer.flatten(model.first_layer.initial_weights())
    kept = forward(
        model.first_layer,
        dropping,
        lambda device: simulation_secret(seed, device),
        chunk,
        weights,
        0,
        b"health",
        want_slopes=False,
    ).kept
    return Batches.join([Release.pack(kept, devices, records, windows.y, "float16", dropping.bits)])


def split_model(windows: Windows, known: Rows, layer: str, dropping: Dropping, seed: int) -> SplitModel:
    """Return a model whose first layer is random or has learned the known exercises from donors."""
    torch.manual_seed(seed)
    model = build_model("sensor-cnn", windows.x.shape[1:], len(known), 16, "relu")
    if layer == "donors":
        rows = np.isin(windows.person, DONORS) & np.isin(windows.y, known)
        records = Records(windows.x[rows], np.searchsorted(known, windows.y[rows]))
        warm_up(model, records, "classification", dropping, WarmUp(40, 0.002, 64, 0.0), seed)
    return model


def embedded(model: SplitModel, batches: Batches, training: Rows, targets: Rows, seed: int) -> tuple[Scores, Scores]:
    """Train a new trunk on the targets and return its outputs and features of all windows."""
    torch.manual_seed(seed)
    first = model.first_layer
    cut, width = first.cut_shape, first.cut_shape[0]
    numbers = np.unique(targets, return_inverse=True)[1].astype(np.int64)
    trunk = build_model("sensor-cnn", first.input_shape, int(numbers.max()) + 1, width, "relu").trunk
    teach(trunk, cut, batches.take(training), numbers, Teaching(), seed)
    return trunk_outputs(trunk.eval(), cut, batches).astype(np.float64), features(trunk, cut, batches)


def auc(new: NDArray[np.bool_], scores: Scores) -> float:
    """Return the probability that something new scores higher than something normal."""
    ranks, n = rankdata(scores), int(new.sum())
    return float((ranks[new].sum() - n * (n + 1) / 2) / (n * (len(new) - n)))


def precision(new: NDArray[np.bool_], scores: Scores) -> float:
    """Return the average precision of finding what is new."""
    found = new[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(found) / np.arange(1, len(found) + 1))[found].mean())


class Fold:
    """One novelty: what is normal, what is tested, and the measures."""

    def __init__(self, windows: Windows, novel: int, units: Scores, training: Rows) -> None:
        self.windows, self.novel, self.units, self.training = windows, novel, units, training
        held_out, first = np.isin(windows.person, HELD_OUT), windows.part < 1 / 3
        self.calibration = np.flatnonzero(held_out & first & (windows.y != novel))
        self.test = np.flatnonzero(held_out & ~first)
        self.population = Normal.of(units[training], windows.recording[training])

    def normal(self, device: int, by: str) -> Normal:
        """Return what is normal for a device."""
        if by == "all":
            return self.population
        source = device if by == "own" else device ^ 1
        rows = self.calibration[self.windows.device[self.calibration] == source]
        return Normal.of(self.units[rows], self.windows.recording[rows])

    def episodes(self, rows: Rows, size: int | None) -> Iterator[Rows]:
        """Yield each recording's rows, or every ``size`` consecutive ones."""
        for recording in np.unique(self.windows.recording[rows]):
            own = rows[self.windows.recording[rows] == recording]
            for start in range(1 if size is None else max(1, len(own) - size + 1)):
                yield own[start : None if size is None else start + size]

    def window_measures(self, rows: Rows, by: str) -> tuple[float, float]:
        """Return AUC and average precision of windows."""
        scores = np.zeros(len(rows))
        for device in np.unique(self.windows.device[rows]).tolist():
            mine = self.windows.device[rows] == device
            scores[mine] = self.normal(device, by).scores(self.units[rows[mine]])
        return self.per_person(rows, scores)

    def per_person(self, rows: Rows, scores: Scores) -> tuple[float, float]:
        """Return AUC and average precision, means over people."""
        new, person = self.windows.y[rows] == self.novel, self.windows.person[rows]
        parts = [(new[person == p], scores[person == p]) for p in HELD_OUT]
        both = [(auc(*part), precision(*part)) for part in parts]
        first, second = np.mean(both, axis=0).tolist()
        return first, second

    def episode_auc(self, by: str, size: int | None = None) -> float:
        """Return the AUC of episodes."""
        episodes = list(self.episodes(self.test, size))
        normal = {d: self.normal(d, by) for d in np.unique(self.windows.device[self.test]).tolist()}
        scores = [normal[int(self.windows.device[e[0]])].episode_score(self.units[e]) for e in episodes]
        return self.per_person(np.array([e[0] for e in episodes]), np.array(scores))[0]

    def at_threshold(self) -> tuple[float, float]:
        """Return the shares of normal and of new windows above their device's own threshold, means over devices."""
        w, shares = self.windows, []
        for device in np.unique(w.device[self.test]).tolist():
            own = self.calibration[w.device[self.calibration] == device]
            limit = threshold(self.units[own], w.recording[own], FALSE_ALARMS)
            rows = self.test[w.device[self.test] == device]
            above = self.normal(device, "own").scores(self.units[rows]) > limit
            new = w.y[rows] == self.novel
            shares.append((above[~new].mean(), above[new].mean()))
        alarms, found = np.mean(shares, axis=0).tolist()
        return alarms, found

    def measures(self) -> dict[str, float]:
        """Return all of them by name."""
        result: dict[str, float] = {}
        for by in ("all", "own", "side"):
            result[f"window-{by}"], result[f"precision-{by}"] = self.window_measures(self.test, by)
            result[f"episode-{by}"] = self.episode_auc(by)
            result[f"short-{by}"] = self.episode_auc(by, BLOCK)
        late = self.test[self.windows.part[self.test] >= 2 / 3]
        result["window-late"] = self.window_measures(late, "own")[0]
        result["alarms"], result["found"] = self.at_threshold()
        return result


def study(windows: Windows, novel: int, layer: str, policy: str, seed: int, *, usual: bool) -> dict[str, float]:
    """Run one fold; ``usual`` adds the classifier."""
    dropping, known = POLICIES[policy], np.array([c for c in range(EXERCISES) if c != novel])
    model = split_model(windows, known, layer, dropping, seed)
    batches = released(model, dropping, windows, seed)
    training = np.flatnonzero(~np.isin(windows.person, HELD_OUT) & (windows.y != novel))
    found = embedded(model, batches, training, windows.recording[training], seed)[1]
    fold = Fold(windows, novel, Space.of(found[training], windows.recording[training]).units(found), training)
    measured = fold.measures()
    if usual:
        outputs = embedded(model, batches, training, windows.y[training], seed)[0]
        measured["classifier"] = fold.per_person(fold.test, -outputs.max(axis=1)[fold.test])[0]
    return measured


def main() -> None:
    """Run all folds, print a table and write the measures of each."""
    parser = argparse.ArgumentParser(description="Is an exercise that nobody has released before noticed as new?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--layers", nargs="+", default=["donors", "random"], choices=["donors", "random"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    windows, rows = Windows(), []
    for seed in arguments.seeds:
        for layer in arguments.layers:
            for policy in POLICIES:
                for novel in range(EXERCISES):
                    measured = study(windows, novel, layer, policy, seed, usual=seed == arguments.seeds[0])
                    rows.append({"seed": seed, "layer": layer, "policy": policy, "novel": novel, **measured})
                (arguments.out / "health.json").write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)


def show(rows: list[dict[str, float | int | str]]) -> None:
    """Print means over exercises, and over seeds with the 95 % half-width of Student's t."""
    kinds = list(dict.fromkeys((str(r["layer"]), str(r["policy"])) for r in rows))
    table = Table("measure", *[" ".join(kind) for kind in kinds])
    for name in [k for k in rows[0] if k not in ("seed", "layer", "policy", "novel")]:
        cells = []
        for kind in kinds:
            chosen = [r for r in rows if (r["layer"], r["policy"]) == kind and name in r]
            seeds = [np.mean([float(r[name]) for r in chosen if r["seed"] == s]) for s in {r["seed"] for r in chosen}]
            n = len(seeds)
            half = t.ppf(0.975, n - 1) * np.std(seeds, ddof=1) / np.sqrt(n) if n > 1 else float("nan")
            cells.append(f"{np.mean(seeds):.3f} ± {half:.3f}")
        table.add_row(name, *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
