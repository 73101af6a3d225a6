"""Audits of runs and of policies: from a folder or a settings file to a report."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedsplit.audit.attack import Attack, attacks_named
from fedsplit.audit.audit import Audit, audit
from fedsplit.audit.evidence import Evidence, recorded, rehearsed, released_bytes
from fedsplit.audit.page import page
from fedsplit.audit.standard import STANDARD
from fedsplit.audit.transcript import Subjects
from fedsplit.common.errors import ConfigError, DataError
from fedsplit.common.files import put
from fedsplit.device.home import Home
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from fedsplit.release.making import Chunk
from fedsplit.release.streams import simulation_secret
from fedsplit.runs.folder import RunFolder
from fedsplit.server.warmup import WarmUp, warm_up

_TARGETS = 200  # of an audit before any training, unless the settings say


def audit_run(folder: Path, *, seed: int, quick: bool = False, attacks: Sequence[str] = ()) -> dict[str, Any]:
    """Audit a finished run that recorded targets; write ``audit.json`` and ``audit.html`` into its folder.

    Parameters
    ----------
    folder : Path
    seed : int
        Equal seeds, equal figures.
    quick : bool
        As of :func:`fedsplit.audit.audit.audit`.
    attacks : sequence of str
        Attacks (module:Class) beside those of the run's settings and the standard ones.

    Raises
    ------
    DataError
        If the folder lacks what an audit needs.
    """
    run = RunFolder(folder)
    settings = run.trained()
    more = _own_attacks(settings, attacks)
    experiment = Experiment(settings)
    layer = experiment.model.first_layer
    layer.load_weights(load_file(run.weights))
    evidence = recorded(run.recordings, layer, experiment.policy, settings.protocol.dtype)
    return _write(run, audit(evidence, seed=seed, quick=quick, more=more), evidence, settings)


def _own_attacks(settings: Settings, more: Sequence[str] = ()) -> list[Attack]:
    named = dict.fromkeys([*settings.audit.attacks, *more])
    return attacks_named(list(named), [attack.name for attack in STANDARD])


def audit_policy(
    settings: Settings, out: Path, *, seed: int, quick: bool = False, attacks: Sequence[str] = ()
) -> dict[str, Any]:
    """Audit one release of private records as the settings would make it, before any training.

    Public records, if the settings name some, warm the first layer up as a run would.

    Parameters
    ----------
    settings : Settings
    out : Path
        The folder to write into.
    seed, quick, attacks
        As of :func:`audit_run`.

    Raises
    ------
    FedsplitError
        If the settings do not fit together or the data.
    """
    more = _own_attacks(settings, attacks)
    experiment = Experiment(settings)
    source, model, policy = experiment.source, experiment.model, experiment.policy
    public, chosen = experiment.public, settings.public
    if chosen is not None and public is not None and chosen.epochs:
        options = WarmUp(chosen.epochs, chosen.lr, settings.protocol.batch_size, chosen.penalty)
        warm_up(model, public, source.task, policy, options, settings.run.seed)
    private = sum(len(source.device(d).train) for d in range(source.count) if d not in settings.donors)
    targets = settings.audit.targets or min(_TARGETS, private)
    subjects = Subjects.choose(source, public, settings.donors, targets, settings.run.seed)
    evidence = rehearsed(model.first_layer, policy, settings.protocol.dtype, subjects, seed)
    folder = RunFolder(out)
    folder.make()
    return _write(folder, audit(evidence, seed=seed, quick=quick, more=more), evidence, settings)


@dataclass(frozen=True)
class Preview:
    """What one record would release, and what attacks make of it."""

    payload: bytes
    sent: int
    width: int
    bits: int
    report: dict[str, Any]

    @property
    def how(self) -> str:
        """What is sent of the outputs."""
        return f"leave above zero, {self.width} codes of {self.bits} bits in all" if self.bits else "leave"


def preview_record(
    settings: Settings, device: int, record: int, weights: Path | None, home: Path | None, page_path: Path
) -> Preview:
    """Release one record as the settings would have it, attack it, and write a page.

    Parameters
    ----------
    settings : Settings
    device, record : int
        The device's id, and the index of one of its training records.
    weights : Path or None
        File of the first layer's weights (safetensors). None is for the initial weights.
    home : Path or None
        The folder of the device's node: masks and noise are drawn from its secret. None is for the simulation's secret.
    page_path : Path
        The page (HTML) that is written.

    Returns
    -------
    Preview
        The attacker's public records are those of the settings, or else the device's other records.

    Raises
    ------
    FedsplitError
        If there is no such record, or the settings do not fit together.
    """
    node = Home(home) if home is not None else None
    if node and device not in node.devices:
        raise ConfigError(f"device {device} is not on node {home}: it has {', '.join(map(str, node.devices))}")
    experiment = Experiment(settings)
    source, layer = experiment.source, experiment.model.first_layer
    if weights is not None:
        try:
            layer.load_weights(load_file(weights))
        except (OSError, RuntimeError, KeyError, SafetensorError):
            raise DataError(f"weights {weights} are missing, damaged or of another first layer") from None
    records = source.device(device).train
    if not 0 <= record < len(records):
        raise ConfigError(f"device {device} has {len(records)} training records, there is no record {record}")
    public = experiment.public
    others = np.delete(np.arange(len(records)), record)
    at = np.array([record])
    one = Subjects(
        x=records.x[at],
        y=records.y[at],
        device=np.array([device]),
        index=at,
        candidates=records.x[[record, *others]],
        place=np.zeros(1, dtype=np.int64),
        public=records.take(others) if public is None else public,
        stand_in=public is None,
    )
    policy, dtype, seed = experiment.policy, settings.protocol.dtype, settings.run.seed
    evidence = rehearsed(layer, policy, dtype, one, seed)
    found = audit(evidence, seed=seed)
    shape = layer.input_shape
    put(page_path, page(found, one.x, shape if len(shape) == 3 else None, f"Device {device}, record {record}"))
    secret = simulation_secret(seed, device) if node is None else node.device_secret(device)
    chunk = Chunk(np.array([device]), np.ones(1, np.int64), at, at[:, None], one.x, one.y)
    payload, sent = released_bytes(layer, policy, dtype, chunk, secret)
    return Preview(payload, sent, layer.width, policy.code.bits, found.report)


def _write(folder: RunFolder, found: Audit, evidence: Evidence, settings: Settings) -> dict[str, Any]:
    report = {
        "name": settings.run.name,
        "policy": settings.dropping.policy,
        "mode": settings.protocol.mode,
        **found.report,
        "devices": evidence.subjects.devices.tolist(),
    }
    put(folder.report, json.dumps(report, indent=2) + "\n")
    shape = evidence.layer.input_shape
    count = report["targets"]
    text = page(found, evidence.subjects.x[:count], shape if len(shape) == 3 else None, f"Audit of {settings.run.name}")
    put(folder.page, text)
    return report
