"""Whole runs of the private and the paper's profile, attacked with everything that left the devices.

    python simulations/profiles.py configs/mnist-private.toml configs/mnist-paper.toml --seeds 1 2 3

Each run is followed by its audit. Beside them: training on all their records (public ones included) without dropping.
Writes a table and `profiles.json` to `simulations/results/profiles`.
"""

import argparse
import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fedsplit import simulate
from fedsplit.data import Records
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings, load_settings
from fedsplit.release.policies import All
from fedsplit.runs.auditing import audit_run
from fedsplit.server.trunk import Trunk, TrunkOptions
from fedsplit.server.warmup import WarmUp, public_release, warm_up

RESULTS = Path(__file__).parent / "results" / "profiles"


def _profile(path: str, seed: int) -> dict[str, Any]:
    """Run a profile in one process and audit it."""
    settings = load_settings(path, [f"run.seed={seed}", "run.engine=inline"])
    with TemporaryDirectory() as folder:
        result = simulate(settings, out=Path(folder) / "run")
        report = audit_run(Path(folder) / "run", seed=seed)
    identified = max(scores["identification"] for scores in report["attacks"].values())
    return {
        "name": settings.run.name,
        "seed": seed,
        "accuracy": result["test_accuracy"],
        "public_only": result.get("public_only_accuracy"),
        "gain": result.get("gain_over_public"),
        "gain_interval": result.get("gain_interval"),
        "undropped": _without_dropping(settings, seed),
        "releases": report["criterion"]["releases_max"],
        "equations": report["criterion"]["equations_max"],
        "leverage": report["criterion"]["leverage_max"],
        "attack": report["strongest"]["attack"],
        "psnr": report["strongest"]["psnr"],
        "class_mean": report["baselines"].get("class mean", report["baselines"]["mean"])["psnr"],
        "identified": identified,
        "control": report["control"]["psnr"],
        "targets": report["targets"],
        "candidates": report["candidates"],
        "audit_cpu_seconds": report["cpu_seconds"],
    }


def _without_dropping(settings: Settings, seed: int) -> float:
    """Return the accuracy of the same network trained centrally on all records, public ones included."""
    source = Experiment(settings).source
    model, public = Experiment(settings).model, Experiment(settings).public
    donors = settings.donors
    parts = [source.device(d).train for d in range(source.count) if d not in donors]
    parts = [r for r in (public, *parts) if r is not None and len(r)]
    records = Records(np.concatenate([r.x for r in parts]), np.concatenate([r.y for r in parts]))
    tests = [source.device(d).test for d in source.test_devices]
    test = Records(np.concatenate([r.x for r in tests]), np.concatenate([r.y for r in tests]))
    everything = All()
    warm_up(model, records, source.task, everything, WarmUp(30, 2e-3, settings.protocol.batch_size, 0.0), seed)
    options = TrunkOptions("adam", 1e-3, 0.0, 0.0, "constant", 64, 1)
    trunk = Trunk(model.trunk, model.first_layer.cut_shape, source.task, source.outputs, options, 1, seed)
    return float(trunk.evaluate(public_release(model, test, everything, "float32", seed))["test_accuracy"])


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="whole runs, attacked with all that left", title_justify="left")
    for name in ("run", "seed", "accuracy", "no dropping", "public only", "gain", "releases", "PSNR", "identified"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for r in rows:
        gain = "-" if r["gain"] is None else f"{100 * r['gain']:+.1f} ± {100 * r['gain_interval']:.1f}"
        alone = "-" if r["public_only"] is None else f"{r['public_only']:.3f}"
        figures = (f"{r['accuracy']:.3f}", f"{r['undropped']:.3f}", alone, gain, str(r["releases"]))
        table.add_row(
            r["name"], str(r["seed"]), *figures, f"{r['psnr']:.1f} dB ({r['attack']})", f"{r['identified']:.3f}"
        )
    return table


def _said(rows: list[dict[str, Any]]) -> str:
    """Say the means over seeds, and the gain with the interval of all seeds' test records together."""
    mean = {key: float(np.mean([r[key] for r in rows])) for key in ("accuracy", "undropped", "psnr", "identified")}
    said = f"{rows[0]['name']}: accuracy {mean['accuracy']:.3f} (no dropping {mean['undropped']:.3f}), "
    said += f"strongest {mean['psnr']:.1f} dB (worst seed {max(r['psnr'] for r in rows):.1f}), "
    said += f"identified {mean['identified']:.3f} (worst seed {max(r['identified'] for r in rows):.3f})"
    if rows[0]["gain"] is not None:
        gain = float(np.mean([r["gain"] for r in rows]))
        half = float(np.sqrt(np.sum([r["gain_interval"] ** 2 for r in rows])) / len(rows))
        said += f", gain over public only {100 * gain:+.1f} ± {100 * half:.1f} points"
    return said


def main() -> None:
    """Run, audit, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    jobs = [(config, seed) for config in arguments.configs for seed in arguments.seeds]
    rows = [_profile(*job) for job in track(jobs, "running and attacking", console=Console(stderr=True))]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "profiles.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    console = Console(width=130)
    console.print(_table(rows))
    for name in dict.fromkeys(r["name"] for r in rows):
        console.print(_said([r for r in rows if r["name"] == name]))


if __name__ == "__main__":
    main()
