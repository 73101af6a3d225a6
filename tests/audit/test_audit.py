"""The audit: what it reads back is what was released, what it finds is what leaked, and it distrusts itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from fedsplit import simulate
from fedsplit.audit import audit as audit_module
from fedsplit.audit.evidence import Evidence, equations, recorded, rehearsed
from fedsplit.audit.transcript import Subjects, exchanges
from fedsplit.common.errors import ConfigError, DataError, RunError
from fedsplit.data import Records
from fedsplit.model.layer import FirstLayer
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings, check_settings, load_settings
from fedsplit.release.policies import All, Bits, Random, TopK, Units
from fedsplit.release.policy import Policy
from fedsplit.runs.auditing import audit_policy, audit_run, preview_record
from fedsplit.runs.forgetting import forget_device

TARGETS = 40

pytestmark = pytest.mark.slow  # whole runs and their attacks


def digits(**changes: dict[str, Any]) -> Settings:
    """Return a short run over digits that records targets."""
    raw: dict[str, Any] = {
        "run": {"name": "audited", "rounds": 3, "engine": "inline"},
        "data": {"name": "digits"},
        "devices": {"count": 12, "per-node": 6, "partition": "iid", "test": 2},
        "public": {"devices": [0, 1], "epochs": 0},
        "model": {"name": "mlp", "width": 48},
        "dropping": {"policy": "random", "keep": 0.4},
        "protocol": {"mode": "pipelined"},
        "audit": {"targets": TARGETS},
    }
    for section, values in changes.items():
        raw[section] = values if section == "dropping" else {**raw.get(section, {}), **values}
    return check_settings(raw)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audited") / "run"
    simulate(digits(), out=folder)
    return folder


def evidence_of(folder: Path) -> Evidence:
    settings = load_settings(folder / "config.toml")
    layer = Experiment(settings).model.first_layer
    return recorded(folder / "audit", layer, Experiment(settings).policy, settings.protocol.dtype)


def test_the_recorded_equations_hold_for_the_originals(run: Path) -> None:
    """Every release of every round, under the weights of that round."""
    evidence = evidence_of(run)
    found = equations(evidence, np.arange(TARGETS))
    assert min(len(r) for r in found.rhs) > 10
    for x, rows, rhs, noise in zip(evidence.subjects.x, found.rows, found.rhs, found.noise, strict=True):
        assert np.all(np.abs(rows @ x.ravel().astype(np.float64) - rhs) <= 3 * noise + 1e-4)
    assert len(evidence.seen) == 3 * 2  # rounds x nodes with targets


def test_the_recorded_sums_are_those_of_the_recorded_gradients(run: Path) -> None:
    """dW = delta' X over the node's records: checked with the originals, which the attacker does not have."""
    evidence = evidence_of(run)
    settings = load_settings(run / "config.toml")
    source = Experiment(settings).source
    assert evidence.groups
    for group in evidence.groups:
        devices = [d for d in range(source.count) if d not in (0, 1) and len(source.device(d).train)]
        known = {x.tobytes(): x for d in devices for x in source.device(d).train.x}
        targets = group.places >= 0
        assert targets.any()
        rows = np.stack([evidence.subjects.x[p] for p in group.places[targets]])
        assert all(row.tobytes() in known for row in rows)
        assert len(group.deltas) == len(group.sums) == 3


@pytest.mark.parametrize("mode", ["synchronous", "pipelined"])
@pytest.mark.parametrize("dropout", [None, 0.0, 0.3])
def test_every_recorded_sum_is_put_together_with_its_releases(mode: str, dropout: float | None, tmp_path: Path) -> None:
    """Also the last round's, and where a node is asked for several sums in a round, each of some devices."""
    known = {"uplink": 1.0, "downlink": 1.0, "release-seconds": 1e-3, "gradient-seconds": 1e-3}
    profile = {} if dropout is None else {"profile": {**known, "dropout": dropout}}
    protocol = {"mode": mode, "max-staleness": 3, **({"deadline": 60.0} if profile else {})}
    simulate(digits(devices=profile, protocol=protocol), out=tmp_path / "run")
    evidence = evidence_of(tmp_path / "run")
    recorded = list(exchanges(tmp_path / "run" / "audit", evidence.layer.size))
    assert sum(len(g.sums) for g in evidence.groups) == sum(len(e.upload.gradients.sums) for e in recorded) >= 6
    for group in evidence.groups:
        for delta, total in zip(group.deltas, group.sums, strict=True):  # the bias's part is the sum of all deltas
            assert np.abs(total[-48:]).max() > 0
            assert np.allclose(total[-48:], delta.sum(axis=0, dtype=np.float64), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "policy",
    [
        All(),
        Units(48),
        TopK(5),
        Bits(1),
        Bits(3),
    ],
    ids=repr,
)
def test_the_inequalities_hold_for_the_originals(policy: Policy) -> None:
    settings = digits()
    experiment = Experiment(settings)
    source, layer = experiment.source, experiment.model.first_layer
    subjects = Subjects.choose(source, None, (0, 1), TARGETS, 0)
    found = equations(rehearsed(layer, policy, "float32", subjects, 0), np.arange(TARGETS))
    width = 48
    for x, rows, rhs, noise, (left, right) in zip(
        subjects.x, found.rows, found.rhs, found.noise, found.inequalities, strict=True
    ):
        assert np.all(left @ x.astype(np.float64) <= right + 1e-5)
        assert np.all(np.abs(rows @ x.astype(np.float64) - rhs) <= 2 * noise + 1e-4)
        assert len(left) == width if policy.code.bits == 1 else len(left) + len(rows) == width


def test_nothing_is_known_of_what_random_dropping_did_not_send() -> None:
    settings = digits()
    experiment = Experiment(settings)
    source, layer = experiment.source, experiment.model.first_layer
    subjects = Subjects.choose(source, None, (0, 1), TARGETS, 0)
    found = equations(rehearsed(layer, Random(0.5), "float16", subjects, 0), np.arange(TARGETS))
    assert not any(len(right) for _, right in found.inequalities)


def test_an_audit_finds_what_leaked_and_repeats(run: Path) -> None:
    report = audit_run(run, seed=0)
    again = audit_run(run, seed=0)
    assert {**report, "cpu_seconds": 0} == {**again, "cpu_seconds": 0}
    base = max(scores["psnr"] for scores in report["baselines"].values())
    assert report["strongest"]["psnr"] > base + 5  # three releases of 64 numbers, and gradients
    assert report["control"]["holds"] and report["control"]["psnr"] > 60
    assert report["criterion"]["releases_max"] == 3
    assert report["attacks"].keys() >= {"Wiener", "constrained", "gradient"}
    assert not report["public"]["stand_in"]
    saved = json.loads((run / "audit.json").read_text())
    assert saved["strongest"] == report["strongest"]
    text = (run / "audit.html").read_text()
    assert text.count("<img") == 1 and "data:image/png;base64," in text and "http" not in text


def test_a_quick_audit_and_one_before_training(run: Path, tmp_path: Path) -> None:
    assert audit_run(run, seed=0, quick=True)["attacks"].keys() == {
        "Wiener",
        "linear, with label",
        "decoder, with label",
        "gradient",
    }
    report = audit_policy(digits(dropping={"policy": "bits", "bits": 1}), tmp_path / "policy", seed=0)
    assert report["criterion"]["leverage_max"] == 0 and "Wiener" in report["skipped"]
    assert (tmp_path / "policy" / "audit.html").exists()


def test_without_public_records_the_report_says_who_stands_in(tmp_path: Path) -> None:
    raw = digits().model_dump(by_alias=True, exclude_none=True)
    del raw["public"]
    report = audit_policy(check_settings(raw), tmp_path / "policy", seed=0, quick=True)
    assert report["public"]["stand_in"]


def test_more_releases_are_more_equations(run: Path, tmp_path: Path) -> None:
    once = audit_policy(digits(), tmp_path / "policy", seed=0, quick=True)
    assert audit_run(run, seed=0, quick=True)["criterion"]["equations_max"] > once["criterion"]["equations_max"]


@pytest.mark.parametrize("layer", [nn.Linear(64, 4), nn.Conv1d(2, 3, 5), nn.Conv2d(1, 2, 3, stride=2)])
def test_the_control_holds_for_narrow_layers_too(layer: nn.Module) -> None:
    shape = {"Linear": (64,), "Conv1d": (2, 32), "Conv2d": (1, 8, 8)}[type(layer).__name__]
    first = FirstLayer(layer, nn.ReLU(), shape)
    x = np.random.default_rng(0).uniform(size=(20, *shape)).astype(np.float32)
    nothing = np.zeros(20, dtype=np.int64)
    subjects = Subjects(x, nothing, nothing, np.arange(20), x, np.arange(20), Records(x[:0], nothing[:0]), False)
    evidence = rehearsed(first, All(), "float32", subjects, 0)
    assert audit_module._control(evidence, 0)["holds"]


def test_a_blunt_attack_fails_the_audit(run: Path, main: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "negative_control", lambda *_: 12.0)
    with pytest.raises(SystemExit, match="1"):
        main("audit", run, "--quick")


def test_fail_above_is_for_continuous_integration(run: Path, main: Callable[..., None]) -> None:
    main("audit", run, "--quick", "--fail-above", "100")
    with pytest.raises(SystemExit, match="1"):
        main("audit", run, "--quick", "--fail-above", "5")


def test_audits_of_what_cannot_be_audited_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a run folder: it has no config\.toml"):
        audit_run(tmp_path, seed=0)
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    (bare / "audit" / "subjects.npz").write_bytes(b"PK damaged")
    with pytest.raises(DataError, match=r"subjects\.npz is damaged"):
        audit_run(bare, seed=0)
    shutil.rmtree(bare / "audit")
    with pytest.raises(DataError, match=r"only a run with \[audit\] targets can be audited"):
        audit_run(bare, seed=0)


def test_too_many_targets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"audit\.targets must be at most \d+ .*, got 9999"):
        simulate(digits(audit={"targets": 9999}), out=tmp_path / "run")


def test_single_class_and_constant_features_are_no_obstacle(tmp_path: Path) -> None:
    """The prior must not divide by a variance of zero."""
    folder = tmp_path / "devices"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for device in range(3):
        x = rng.normal(size=(40, 9)).astype(np.float32)
        x[:, 4:] = 1.5
        np.savez(folder / f"{device}.npz", x=x, y=np.zeros(40, int), x_test=x[:5], y_test=np.zeros(5, int))
    raw = digits(dropping={"policy": "top-k", "k": 3}).model_dump(by_alias=True, exclude_none=True)
    raw |= {"data": {"folder": str(folder), "outputs": 2}, "devices": {"test": "all"}, "audit": {"targets": 20}}
    del raw["public"]
    report = audit_policy(check_settings(raw), tmp_path / "policy", seed=0)
    assert all(np.isfinite(s["psnr"]) and np.isfinite(s["nmse"]) for s in report["attacks"].values())


def test_a_preview_shows_the_bytes_of_one_record(tmp_path: Path) -> None:
    settings = digits(dropping={"policy": "top-k", "k": 4})
    shown = preview_record(settings, 5, 2, None, None, tmp_path / "preview.html")
    assert shown.sent == 4 and shown.width == 48
    assert len(shown.payload) < 90
    assert (tmp_path / "preview.html").read_text().startswith("<!doctype html>")
    with pytest.raises(ConfigError, match=r"device 5 has \d+ training records, there is no record 9999"):
        preview_record(settings, 5, 9999, None, None, tmp_path / "preview.html")
    with pytest.raises(DataError, match=r"weights .* are missing, damaged or of another first layer"):
        preview_record(settings, 5, 2, tmp_path / "nothing.safetensors", None, tmp_path / "preview.html")


def test_a_forgotten_device_is_in_no_file_and_the_run_goes_on(tmp_path: Path) -> None:
    settings = digits(
        protocol={"mode": "single-pass", "chunk": "spread"}, dropping={"policy": "top-k", "k": 6}, run={"rounds": 6}
    )
    folder = tmp_path / "run"
    kill_after(settings, folder, 3)
    before = sorted((folder / "releases").glob("*.npz"))
    held = sum((np.load(path)["devices"] == 4).sum() for path in before)
    assert held > 0
    assert forget_device(folder, 4).records == held
    after = sorted((folder / "releases").glob("*.npz"))
    assert len(after) == len(before) == 3
    assert not any((np.load(path)["devices"] == 4).any() for path in after)
    assert not (folder / "audit").exists()
    result = simulate(settings, out=folder, resume=True)
    assert result["rounds"] == 6
    with pytest.raises(RunError, match="holds no checkpoint"):
        forget_device(tmp_path, 4)


def kill_after(settings: Settings, folder: Path, rounds: int) -> None:
    def stop(metrics: dict[str, Any]) -> None:
        if metrics["round"] == rounds:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(settings, out=folder, report=stop)
