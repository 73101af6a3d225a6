"""What attacks make of private windows."""

from typing import Any

import numpy as np

from fedsplit.audit.audit import audit
from fedsplit.audit.evidence import rehearsed
from fedsplit.audit.transcript import Subjects
from fedsplit.data import Records, wearables
from simulations.health.data import DONORS, POLICIES, TRAINING, Windows, split_model

NOVEL = wearables.CLASSES.index("TRAP")


def leakage(windows: Windows, layer: str, policy: str, seed: int, targets: int) -> dict[str, Any]:
    """Attack private windows released as in the fold whose novelty is TRAP."""
    first = split_model(windows, NOVEL, layer, POLICIES[policy], seed).first_layer
    subjects = _subjects(windows, targets, seed)
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


def _subjects(windows: Windows, targets: int, seed: int) -> Subjects:
    """Choose what is attacked, by somebody who knows the exercise and the donors' windows."""
    known, given = windows.y != NOVEL, np.isin(windows.person, DONORS)
    private = np.flatnonzero(np.isin(windows.person, np.setdiff1d(TRAINING, DONORS)) & known)
    chosen = np.sort(np.random.default_rng(seed).choice(len(private), targets, replace=False))
    return Subjects(
        x=windows.x[private[chosen]],
        y=windows.y[private[chosen]],
        device=windows.device[private[chosen]],
        index=chosen,
        candidates=windows.x[private],
        place=chosen,
        public=Records(windows.x[given & known], windows.y[given & known]),
        stand_in=False,
    )
