"""What whole runs of the private and the paper's profile give away: attacks on everything that left the devices.

    python -m simulations profiles configs/mnist-private.toml configs/mnist-paper.toml --seeds 1 2 3

Each run is followed by its audit. Beside them: training on all their records (public ones included) without dropping.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fedsplit import simulate
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings, load_settings
from fedsplit.release.policies import All
from fedsplit.runs.auditing import audit_run
from fedsplit.server.trunk import Trunk, TrunkOptions
from fedsplit.server.warmup import WarmUp, public_release, warm_up
from simulations.shared.options import option
from simulations.shared.results import Results
from simulations.shared.settings import joined, tested, training
from simulations.shared.statistics import by
from simulations.shared.study import CONFIGS
from simulations.shared.tables import figure, markdown, page
from simulations.shared.workers import progress, quiet

COLUMNS = (
    "run",
    "seed",
    "accuracy",
    "same records, no dropping",
    "public records alone",
    "gain (points)",
    "releases",
    "strongest attack",
    "identified",
)


@dataclass(frozen=True)
class Options:
    """Which runs."""

    configs: tuple[Path, ...] = option(
        (CONFIGS / "mnist-private.toml", CONFIGS / "mnist-paper.toml"),
        quick=(CONFIGS / "digits.toml",),
        positional=True,
    )
    seeds: tuple[int, ...] = option((1, 2, 3), quick=(1,))
    epochs: int = option(30, quick=3, help="of the training without dropping")
    set: tuple[str, ...] = option(
        (), quick=("run.rounds=2", "audit.targets=10"), help="KEY=VALUE, as in fedsplit simulate"
    )


def study(options: Options) -> Results:
    """Run, attack, and train without dropping."""
    quiet()
    jobs = [(config, seed) for config in options.configs for seed in options.seeds]
    rows = []
    for config, seed in progress(jobs, "running and attacking"):
        settings = load_settings(config, [f"run.seed={seed}", "run.engine=inline", *options.set])
        rows.append({**profile(settings), "undropped": without_dropping(settings, options.epochs)})
    return {"rows": rows}


def profile(settings: Settings) -> dict[str, Any]:
    """Run a profile in one process and audit it."""
    seed = settings.run.seed
    with TemporaryDirectory() as folder:
        result = simulate(settings, out=Path(folder) / "run")
        report = audit_run(Path(folder) / "run", seed=seed)
    criterion, strongest, baselines = (report[name] for name in ("criterion", "strongest", "baselines"))
    return {
        "name": settings.run.name,
        "seed": seed,
        "accuracy": result["test_accuracy"],
        "public_only": result.get("public_only_accuracy"),
        "gain": result.get("gain_over_public"),
        "gain_interval": result.get("gain_interval"),
        **{name: criterion[f"{name}_max"] for name in ("releases", "equations", "leverage")},
        "attack": strongest["attack"],
        "psnr": strongest["psnr"],
        "class_mean": baselines.get("class mean", baselines["mean"])["psnr"],
        "identified": max(scores["identification"] for scores in report["attacks"].values()),
        "control": report["control"]["psnr"],
        **{name: report[name] for name in ("targets", "candidates", "cpu_seconds")},
    }


def without_dropping(settings: Settings, epochs: int) -> float:
    """Return the accuracy of the same network trained centrally on all records, public ones included."""
    experiment = Experiment(settings)
    source, model, public = experiment.source, experiment.model, experiment.public
    records = joined([*([public] if public else []), *training(source, settings.donors)])
    seed, everything = settings.run.seed, All()
    warm_up(model, records, source.task, everything, WarmUp(epochs, 2e-3, settings.protocol.batch_size, 0.0), seed)
    options = TrunkOptions("adam", 1e-3, 0.0, 0.0, "constant", 64, 1)
    trunk = Trunk(model.trunk, model.first_layer.cut_shape, source.task, source.outputs, options, 1, seed)
    found = trunk.evaluate(public_release(model, tested(source), everything, "float32", seed))
    return float(found["test_accuracy"])


def tables(results: Results) -> str:
    """Return a row for each run, and a sentence of each profile's means."""
    profiles = by(results["rows"], "name").values()
    return page(markdown(COLUMNS, map(_cells, results["rows"])), "\n".join(f"- {said(rows)}" for rows in profiles))


def _cells(row: dict[str, Any]) -> list[str]:
    gain = "-" if row["gain"] is None else f"{100 * row['gain']:+.1f} ± {100 * row['gain_interval']:.1f}"
    alone = "-" if row["public_only"] is None else f"{row['public_only']:.3f}"
    attack = f"{figure(row['psnr'])} dB ({row['attack']})"
    figures = [f"{row['accuracy']:.3f}", f"{row['undropped']:.3f}", alone, gain, str(row["releases"])]
    return [row["name"], str(row["seed"]), *figures, attack, f"{row['identified']:.3f}"]


def said(rows: list[dict[str, Any]]) -> str:
    """Say the means over seeds, and the gain with the interval of all seeds' test records together."""
    middle = {key: mean(row[key] for row in rows) for key in ("accuracy", "undropped", "psnr", "identified")}
    worst = {key: max(row[key] for row in rows) for key in ("psnr", "identified")}
    text = (
        f"{rows[0]['name']}: accuracy {middle['accuracy']:.3f} (no dropping {middle['undropped']:.3f}), "
        f"strongest {middle['psnr']:.1f} dB (worst seed {worst['psnr']:.1f}), "
        f"identified {middle['identified']:.3f} (worst seed {worst['identified']:.3f})"
    )
    if rows[0]["gain"] is None:
        return text
    half = float(np.sqrt(np.sum([row["gain_interval"] ** 2 for row in rows])) / len(rows))
    return text + f", gain over public only {100 * mean(row['gain'] for row in rows):+.1f} ± {100 * half:.1f} points"
