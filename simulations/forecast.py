"""Whether a forecast survives dropping: the mean venous pressure of the next second, on pigs that are held out.

    python simulations/forecast.py --seeds 0 1 2

Twelve pigs give their records, of which first layers learn; those of 24 others are released once, under each policy,
and the trunk learns from all; 16 pigs are held out (`configs/pig-forecast.toml`). Beside them, without any privacy:

- `persistence`: the pressure stays as it is. `mean change`: it changes as it does on average in training.
- `ridge`: a linear model of whole windows, its ridge chosen by leaving training pigs out; `all windows`: it learns also
  from windows that overlap, one every 0.1 s, as nothing else here does.
- `central`: whole networks trained end to end on the raw windows of all 36 pigs.

`ridge, released` is the linear model of what the private policy releases; `donors alone` its trunk, had it learned from
the donors' records only.

RMSE is in mmHg, R2 that of the change from the last pressure, `pigs` the 10th and 90th percentile of single pigs' RMSE;
intervals are 95 % over seeds (Student's t). `gain` is by how much the RMSE is below the ridge's, with a 95 % interval
over pigs drawn with replacement, and `better` on how many of them it is.

Leakage is that of the runs' audits; `error` is how far, in mmHg, the best attack stays from the windows if it also has
all of the donors' windows that begin every 0.1 s, and knows what followed each window, as the server does (`mean`: a
guess without any release). Writes a table and `forecast.json` to `simulations/results/forecast`.
"""

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import t

from fedsplit import simulate
from fedsplit.audit.attacks import lmmse
from fedsplit.audit.audit import audit, known_before
from fedsplit.audit.evidence import rehearsed, released
from fedsplit.audit.transcript import Subjects
from fedsplit.data import Records
from fedsplit.data import pigs as pigs_data
from fedsplit.model.split import SplitModel
from fedsplit.model.tasks import task_of
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings, check_settings, load_settings
from fedsplit.release.policies import All
from fedsplit.release.policy import Policy
from fedsplit.runs.auditing import audit_run
from fedsplit.server.trunk import trunk_outputs
from fedsplit.server.warmup import WarmUp, public_release, warm_up
from fedsplit.service.served import Served

RESULTS = Path(__file__).parent / "results" / "forecast"
CONFIG = Path(__file__).parent.parent / "configs" / "pig-forecast.toml"
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FOLDS = 6
REDRAWN = 5000  # times that pigs are drawn with replacement
PRIVATE = "private: 8 units"
LINEAR = "ridge"
# Widths, activations and epochs that forecast best on pigs 1..36, by leaving pigs out; the private policy, too, among
# those that leaked no more in audits than a quarter of 64.
RIVALS: dict[str, tuple[dict[str, Any], int, str]] = {
    "no dropping, 64 units": ({"policy": "none"}, 64, "identity"),
    "top-8 of 16": ({"policy": "top-k", "k": 8}, 16, "relu"),
    "random, 1/4 of 64": ({"policy": "random", "keep": 0.25}, 64, "relu"),
    "random, 1/4 of 256": ({"policy": "random", "keep": 0.25}, 256, "relu"),
}
CENTRAL_EPOCHS = 80
Float = NDArray[np.float64]
Whose = NDArray[np.int64]


class Pigs:
    """All windows, flat, with what follows, in mmHg.

    Attributes
    ----------
    train, test : Records
    trained, tested : int64 arrays
        Whose they are.
    """

    def __init__(self, settings: Settings) -> None:
        source = Experiment(settings).source
        devices = [source.device(d) for d in range(source.count)]
        self.train, self.trained = _joined([d.train for d in devices])
        self.test, self.tested = _joined([d.test for d in devices])

    @property
    def change(self) -> Float:
        """What is to be forecast of the pigs held out."""
        return self.test.y[:, 0].astype(np.float64)


def _joined(parts: list[Records]) -> tuple[Records, Whose]:
    whose = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return Records(np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts])), whose


def ridge(x: Float, y: Float, whose: Whose) -> Callable[[Float], Float]:
    """Return a linear model whose ridge was chosen by leaving out a sixth of the individuals at a time."""
    folds = np.array_split(np.unique(whose), FOLDS)
    errors = [
        sum(
            np.square(_ridge(x[~out], y[~out], size)(x[out]) - y[out]).sum()
            for out in (np.isin(whose, f) for f in folds)
        )
        for size in RIDGES
    ]
    return _ridge(x, y, RIDGES[int(np.argmin(errors))])


def _ridge(x: Float, y: Float, size: float) -> Callable[[Float], Float]:
    centre, level = x.mean(axis=0), y.mean()
    a = x - centre
    slope = np.linalg.solve(a.T @ a / len(a) + size * np.eye(a.shape[1]), a.T @ (y - level) / len(a))
    return lambda new: (new - centre) @ slope + level


def without_privacy(pigs: Pigs) -> dict[str, Float]:
    """Return forecasts of the pigs held out that no seed changes."""
    count, found = len(pigs.test), {}
    for name, records, whose in (
        (LINEAR, pigs.train, pigs.trained),
        ("ridge, all windows", *overlapping(np.unique(pigs.trained))),
    ):
        x, y, new = (values.astype(np.float64) for values in (records.x[:, 0], records.y[:, 0], pigs.test.x[:, 0]))
        found[name] = ridge(x, y, whose)(new)
    return {"persistence": np.zeros(count), "mean change": np.full(count, pigs.train.y.mean()), **found}


def overlapping(devices: Whose | tuple[int, ...]) -> tuple[Records, Whose]:
    """Return the windows of some devices, one every 0.1 s, and whose they are."""
    pieces, owners = pigs_data.pieces(step=5)
    own = np.isin(owners - 1, devices)
    return Records(*pigs_data.relative(pieces[own])), owners[own] - 1


def central(settings: Settings, pigs: Pigs) -> Float:
    """Return forecasts of the whole network trained on raw windows, without any cut."""
    model, everything = Experiment(settings).model, All()
    assert settings.public is not None
    options = WarmUp(CENTRAL_EPOCHS, settings.public.lr, settings.protocol.batch_size, penalty=0.0)
    warm_up(model, pigs.train, task_of("regression"), everything, options, settings.run.seed)
    return forecasts(model, pigs.test, everything, "float32", settings.run.seed)


def forecasts(model: SplitModel, records: Records, policy: Policy, dtype: str, seed: int) -> Float:
    """Return what a trunk makes of what is released of some records."""
    batches = public_release(model, records, policy, dtype, seed)
    return trunk_outputs(model.trunk.eval(), model.first_layer.cut_shape, batches)[:, 0].astype(np.float64)


def run(settings: Settings, pigs: Pigs) -> tuple[dict[str, Float], dict[str, Any]]:
    """Train and attack; return forecasts of the trunk and of a ridge on the same releases, and what leaked."""
    seed, policy, dtype = settings.run.seed, Experiment(settings).policy, settings.protocol.dtype
    with TemporaryDirectory() as name:
        folder = Path(name) / "run"
        result = simulate(settings, out=folder)
        served = Served.of_run(folder)
        report = audit_run(folder, seed=seed)
        subjects = Subjects.load(folder / "audit")
    model = SplitModel(served.bundle.layer, served.trunk)
    seen, new = (
        batches.dense(np.arange(len(batches)))[0].astype(np.float64)
        for batches in (public_release(model, records, policy, dtype, seed) for records in (pigs.train, pigs.test))
    )
    linear = ridge(seen, pigs.train.y[:, 0].astype(np.float64), pigs.trained)(new)
    leak = {
        "psnr": report["strongest"]["psnr"],
        "psnr_mean": report["baselines"]["mean"]["psnr"],
        "identified": max(scores["identification"] for scores in report["attacks"].values()),
        "equations": report["criterion"]["equations_max"],
        "leverage": report["criterion"]["leverage_max"],
        "control": report["control"]["holds"],
        "donors_alone_r2": result["public_only_r2"],
        "run_rmse": result["test_rmse"],
        "would_refuse": sum(result["guard"]["refused"].values()),
        **stronger(model, policy, dtype, subjects, settings.donors, seed),
    }
    return {"trunk": forecasts(model, pigs.test, policy, dtype, seed), "ridge": linear}, leak


def stronger(
    model: SplitModel, policy: Policy, dtype: str, subjects: Subjects, donors: tuple[int, ...], seed: int
) -> dict[str, float]:
    """Attack with all windows of the donors, overlapping, and with what was forecast; return errors in mmHg."""
    public, _ = overlapping(donors)
    found = audit(rehearsed(model.first_layer, policy, dtype, replace(subjects, public=public), seed), seed=seed)
    layer, x = model.first_layer, subjects.x.reshape(len(subjects.x), -1)
    weights = layer.flatten(layer.initial_weights())
    known, own = (
        np.concatenate([released(layer, policy, dtype, weights, r.x, seed)[1].astype(np.float64), r.y], axis=1)
        for r in (public, Records(subjects.x, subjects.y))
    )
    linear = lmmse(known_before(public, 0), (known, public.x.reshape(len(public.x), -1), None), own, None)
    errors = {name: float(np.sqrt(np.mean(np.square(guess - x)))) for name, guess in found.guesses.items()}
    scale = pigs_data.SCALING.divide[0]
    best = min([errors[name] for name in errors if name != "mean"] + [float(np.sqrt(np.mean(np.square(linear - x))))])
    return {"error": scale * best, "error_mean": scale * errors["mean"]}


def rival(private: Settings, policy: dict[str, Any], width: int, activation: str) -> Settings:
    """Return the private settings with another first layer, unguarded: the limits would refuse most policies."""
    raw = private.tables()
    raw["dropping"] = policy
    raw["model"] |= {"width": width, "activation": activation}
    raw["public"]["penalty"] = 0.0
    raw["guard"]["mode"] = "observe"
    return check_settings(raw)


def study(config: Path, seed: int, pigs: Pigs) -> list[dict[str, Any]]:
    """Return a row for every way to forecast: what it says of the held-out windows, and what leaked."""
    private = load_settings(config, [f"run.seed={seed}", "run.engine=inline"])
    rows: list[dict[str, Any]] = []

    def add(name: str, forecast: Float, leak: dict[str, Any] | None = None) -> None:
        rows.append({"name": name, "seed": seed, "forecast": forecast.round(5).tolist(), "leak": leak})

    for name, forecast in without_privacy(pigs).items():
        add(name, forecast)
    found, leak = run(private, pigs)
    add("ridge, released", found["ridge"])
    add(PRIVATE, found["trunk"], leak)
    for name, (policy, width, activation) in RIVALS.items():
        found, leak = run(rival(private, policy, width, activation), pigs)
        add(name, found["trunk"], leak)
    for width in (private.model.width, 64):
        add(f"central, {width} units", central(rival(private, {"policy": "none"}, width, "identity"), pigs))
    return rows


def summary(rows: list[dict[str, Any]], pigs: Pigs) -> list[dict[str, Any]]:
    """Return the measures of each way to forecast, over seeds and pigs."""
    truth, whose = pigs.change, pigs.tested
    squares = {
        name: np.array([np.square(np.array(r["forecast"]) - truth) for r in rows if r["name"] == name])
        for name in dict.fromkeys(r["name"] for r in rows)
    }  # (seeds, windows)
    each = {name: np.array([found[:, whose == p].mean() for p in np.unique(whose)]) for name, found in squares.items()}
    counts = np.unique(whose, return_counts=True)[1]
    drawn = np.random.default_rng(0).integers(len(counts), size=(REDRAWN, len(counts)))
    result = []
    for name, found in squares.items():
        errors = np.sqrt(found.mean(axis=1))
        gains = _rmse(each[LINEAR], counts, drawn) - _rmse(each[name], counts, drawn)
        leaks = [r["leak"] for r in rows if r["name"] == name and r["leak"]]
        result.append(
            {
                "name": name,
                "rmse": _mean(errors),
                "r2": _mean(1 - found.mean(axis=1) / truth.var()),
                "pigs": np.percentile(np.sqrt(each[name]), [10, 90]).tolist(),
                "gain": float(np.sqrt(squares[LINEAR].mean()) - np.sqrt(found.mean())),
                "gain_interval": np.percentile(gains, [2.5, 97.5]).tolist(),
                "better": int((each[name] < each[LINEAR]).sum()),
                **{key: _mean([leak[key] for leak in leaks]) for key in (leaks[0] if leaks else ())},
            }
        )
    return result


def _rmse(each: Float, counts: Whose, drawn: Whose) -> Float:
    """Return the RMSE of all windows of the pigs drawn, a row each."""
    return np.asarray(np.sqrt((each * counts)[drawn].sum(axis=1) / counts[drawn].sum(axis=1)))


def _mean(values: Any) -> list[float]:
    """Return the mean over seeds and the half of its 95 % interval."""
    found = np.asarray(values, np.float64)
    half = t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found)) if len(found) > 1 else np.nan
    return [float(found.mean()), float(half)]


def show(rows: list[dict[str, Any]], pigs: Pigs) -> None:
    """Print the table."""
    table = Table(title=f"{len(pigs.test)} windows of {len(np.unique(pigs.tested))} pigs", title_justify="left")
    for name in ("", "RMSE", "R2", "pigs", "gain", "better", "PSNR", "identified", "error"):
        table.add_column(name, justify="right" if name else "left")
    for r in rows:
        low, high = r["gain_interval"]
        cells = [
            _said(r["rmse"]),
            _said(r["r2"]),
            "{:.2f}-{:.2f}".format(*r["pigs"]),
            f"{r['gain']:+.3f} ({low:+.2f}..{high:+.2f})",
            str(r["better"]),
        ]
        if "psnr" in r:
            cells += [f"{r['psnr'][0]:.1f}", f"{r['identified'][0]:.2f}", f"{r['error'][0]:.2f}"]
        table.add_row(r["name"], *cells)
    console = Console(width=140)
    console.print(table)
    private = next(r for r in rows if r["name"] == PRIVATE)
    alone = np.sqrt(1 - private["donors_alone_r2"][0]) * pigs.change.std()
    console.print(
        f"without any release: PSNR {private['psnr_mean'][0]:.1f}, error {private['error_mean'][0]:.2f}; "
        f"donors alone: RMSE {alone:.3f}, R2 {_said(private['donors_alone_r2'])}"
    )


def _said(found: list[float]) -> str:
    return f"{found[0]:.3f} ± {found[1]:.3f}" if found[1] > 1e-6 else f"{found[0]:.3f}"


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description="Does a forecast on held-out pigs survive dropping?")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    pigs = Pigs(load_settings(arguments.config))
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for seed in track(arguments.seeds, "training and attacking", console=Console(stderr=True)):
        rows += study(arguments.config, seed, pigs)
        found = summary(rows, pigs)
        (arguments.out / "forecast.json").write_text(json.dumps({"rows": found, "raw": rows}, indent=1) + "\n")
    show(found, pigs)


if __name__ == "__main__":
    main()
