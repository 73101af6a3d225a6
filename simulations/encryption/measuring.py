"""Times and bytes of all schemes, and what an attack makes of a release."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from fedsplit.audit.audit import audit
from fedsplit.audit.evidence import rehearsed
from fedsplit.audit.transcript import Subjects
from fedsplit.device.home import Home
from fedsplit.plan.experiment import Experiment
from fedsplit.runs.folder import run_settings
from fedsplit.service.served import Served
from simulations.encryption.halves import Raw, Whole, records_of
from simulations.encryption.homomorphic import measured
from simulations.encryption.schemes import OURS, Scheme, Spent, schemes
from simulations.shared.options import option
from simulations.shared.results import Results
from simulations.shared.settings import finished

BATCHES = (1, 64)
SUBJECTS = 100  # records that are attacked
_FIRST = 3  # repetitions that do not count
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Which run, and how often."""

    run: Path | None = option(None, help="folder of a finished run", positional=True)
    repeats: int = option(200, quick=5)


def study(options: Options) -> Results:
    """Attack a release, and measure all schemes with single records and with many."""
    torch.set_num_threads(1)
    with finished(options.run) as run, TemporaryDirectory() as folder:
        served, home = Served.of_run(run), Home.create(Path(folder) / "home", [0])
        raw = records_of(run, served)
        batches = {}
        for batch in BATCHES:
            repeats = max(1, options.repeats // (1 + batch // 16))
            batches[batch] = measure(schemes(served, raw[:batch], home), raw[:batch], repeats)
        whole = Whole(served, raw)
        encrypted, said = measured(served, whole.scaled(raw), whole(raw.tobytes()))
        batches[1] |= encrypted  # these encrypt each record by itself
        return {"attack": attacked(run, served), "batches": batches, "said": said}


def measure(found: Sequence[Scheme], raw: Raw, repeats: int) -> dict[str, Row]:
    """Return medians over repetitions of each scheme's times and bytes, per record; raises RuntimeError.

    Parameters
    ----------
    found : sequence of Scheme
        The first says what all that see the record must answer.
    raw : array (records, *input_shape)
    repeats : int
    """
    expected = found[0].server(found[0].device(raw))
    times: dict[str, list[Spent]] = {scheme.name: [] for scheme in found}
    for _ in range(repeats + _FIRST):
        for scheme in found:
            outputs, spent = scheme.timed(raw)
            if OURS not in scheme.name and not np.allclose(outputs, expected, atol=1e-3):
                raise RuntimeError(f"{scheme.name}: another prediction")
            times[scheme.name].append(spent)
    down = expected.nbytes / len(raw)
    return {name: _row(name, rows[_FIRST:], len(raw), down) for name, rows in times.items()}


def _row(name: str, rows: list[Spent], records: int, down: float) -> Row:
    device, server, up = (median(column) / records for column in zip(*rows, strict=True))
    seen = "activations" if OURS in name else "the record"
    return {"device_us": 1e6 * device, "server_us": 1e6 * server, "bytes_up": up, "bytes_down": down, "seen": seen}


def attacked(run: Path, served: Served, seed: int = 0) -> dict[str, float]:
    """Return what the strongest attack makes of releases (dB), and the best guess without any."""
    settings = run_settings(run)
    experiment = Experiment(settings)
    subjects = Subjects.choose(experiment.source, experiment.public, settings.donors, SUBJECTS, seed)
    bundle = served.bundle
    report = audit(rehearsed(bundle.layer, bundle.dropping, bundle.dtype, subjects, seed), seed=seed).report
    guess = max(scores["psnr"] for scores in report["baselines"].values())
    return {"strongest": report["strongest"]["psnr"], "without": guess}
