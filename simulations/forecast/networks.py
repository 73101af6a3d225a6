"""Forecasts of networks, with and without dropping, and what their releases leak."""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

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
from fedsplit.plan.settings import Settings
from fedsplit.release.policies import All
from fedsplit.release.policy import Policy
from fedsplit.runs.auditing import audit_run
from fedsplit.server.trunk import trunk_outputs
from fedsplit.server.warmup import WarmUp, public_release, warm_up
from fedsplit.service.served import Served
from simulations.forecast.data import Float, Pigs, overlapping
from simulations.forecast.linear import ridge


def central(settings: Settings, pigs: Pigs, epochs: int) -> Float:
    """Return forecasts of the whole network trained on raw windows, without any cut."""
    model, everything = Experiment(settings).model, All()
    assert settings.public is not None
    options = WarmUp(epochs, settings.public.lr, settings.protocol.batch_size, penalty=0.0)
    warm_up(model, pigs.train, task_of("regression"), everything, options, settings.run.seed)
    return Trained(model, everything, "float32", settings.run.seed).forecasts(pigs.test)


@dataclass(frozen=True)
class Trained:
    """A model, and how it releases records."""

    model: SplitModel
    policy: Policy
    dtype: str
    seed: int

    def forecasts(self, records: Records) -> Float:
        """Return what the trunk makes of what is released of some records."""
        batches = public_release(self.model, records, self.policy, self.dtype, self.seed)
        outputs = trunk_outputs(self.model.trunk.eval(), self.model.first_layer.cut_shape, batches)
        return outputs[:, 0].astype(np.float64)

    def linear(self, pigs: Pigs) -> Float:
        """Return what a ridge makes of the same releases."""
        seen, new = (self._dense(records) for records in (pigs.train, pigs.test))
        return ridge(seen, pigs.train.y[:, 0].astype(np.float64), pigs.trained)(new)

    def _dense(self, records: Records) -> Float:
        batches = public_release(self.model, records, self.policy, self.dtype, self.seed)
        return batches.dense(np.arange(len(batches)))[0].astype(np.float64)

    def stronger(self, subjects: Subjects, donors: tuple[int, ...]) -> dict[str, float]:
        """Attack with all windows of the donors, overlapping, and with what was forecast; return errors in mmHg."""
        public, _ = overlapping(donors)
        evidence = rehearsed(
            self.model.first_layer, self.policy, self.dtype, replace(subjects, public=public), self.seed
        )
        guesses = dict(audit(evidence, seed=self.seed).guesses)
        mean = guesses.pop("mean")
        guesses["linear"] = self._knowing_targets(subjects, public)
        x, scale = subjects.x.reshape(len(subjects.x), -1), float(pigs_data.SCALING.divide[0])
        best = min(_rmse(guess, x) for guess in guesses.values())
        return {"error": scale * best, "error_mean": scale * _rmse(mean, x)}

    def _knowing_targets(self, subjects: Subjects, public: Records) -> Float:
        """Return the guesses of a linear attacker who knows what followed each window."""
        layer = self.model.first_layer
        weights = layer.flatten(layer.initial_weights())
        known, own = (
            np.concatenate([released(layer, self.policy, self.dtype, weights, r.x, self.seed)[1], r.y], axis=1)
            for r in (public, Records(subjects.x, subjects.y))
        )
        flat = public.x.reshape(len(public.x), -1)
        features = (known.astype(np.float64), flat, None)
        return lmmse(known_before(public, 0), features, own.astype(np.float64), None)


def _rmse(guess: Float, truth: Any) -> float:
    return float(np.sqrt(np.mean(np.square(guess - truth))))


def run(settings: Settings, pigs: Pigs) -> tuple[dict[str, Float], dict[str, Any]]:
    """Train and attack; return forecasts of the trunk and of a ridge on the same releases, and what leaked."""
    seed = settings.run.seed
    with TemporaryDirectory() as name:
        folder = Path(name) / "run"
        result = simulate(settings, out=folder)
        served = Served.of_run(folder)
        report = audit_run(folder, seed=seed)
        subjects = Subjects.load(folder / "audit")
    model = SplitModel(served.bundle.layer, served.trunk)
    trained = Trained(model, Experiment(settings).policy, settings.protocol.dtype, seed)
    leak = {**_leak(result, report), **trained.stronger(subjects, settings.donors)}
    return {"trunk": trained.forecasts(pigs.test), "ridge": trained.linear(pigs)}, leak


def _leak(result: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Return what a run's result and its audit say."""
    return {
        "psnr": report["strongest"]["psnr"],
        "psnr_mean": report["baselines"]["mean"]["psnr"],
        "identified": max(scores["identification"] for scores in report["attacks"].values()),
        "equations": report["criterion"]["equations_max"],
        "leverage": report["criterion"]["leverage_max"],
        "control": report["control"]["holds"],
        "donors_alone_r2": result["public_only_r2"],
        "run_rmse": result["test_rmse"],
        "would_refuse": sum(result["guard"]["refused"].values()),
    }
