"""The device's side of a prediction: what it sends of a record, what it counts, and what it refuses to send."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from predictions import RECORDS, asking, nobody, released
from torch import nn

from fedsplit.common.errors import DataError, RunError
from fedsplit.data import Scaling
from fedsplit.device import predictor
from fedsplit.device.bundle import Bundle
from fedsplit.device.home import Home
from fedsplit.device.predictor import Predictor
from fedsplit.model.layer import FirstLayer
from fedsplit.model.tasks import task_of
from fedsplit.release.policies import All, TopK
from fedsplit.runs.folder import run_bundle
from fedsplit.service.served import Served
from fedsplit.wire.ledger import Reason
from fedsplit.wire.query import Query

SCALED = Scaling((1.0,), (2.0,), -50.0, 50.0)
OTHERS = {"activation": nn.Identity(), "stride": nn.Conv1d(2, 3, 3, stride=2), "padding": nn.Conv1d(2, 3, 3, padding=1)}


def test_a_repeated_record_releases_nothing_new(trained: Path, served: Served, home: Home) -> None:
    sent: list[bytes] = []

    def note(payload: bytes) -> np.ndarray:
        sent.append(payload)
        return asking(served)(payload)

    first = Predictor(run_bundle(trained), home, note).predict(RECORDS)
    rows = list(home.accountant("test").rows())
    assert len(rows) == 30 and {spent.releases for _, spent in rows} == {1} and not first.refused.any()
    ledger = home.ledger_path("test").read_bytes()
    for _ in range(20):  # another process each time
        again = Predictor(run_bundle(trained), Home(home.folder), note).predict(RECORDS)
        assert np.array_equal(again.outputs, first.outputs)
    assert home.ledger_path("test").read_bytes() == ledger and len(set(sent)) == 1
    twice = Predictor(run_bundle(trained), Home(home.folder), note).predict(np.concatenate([RECORDS[:2], RECORDS[:2]]))
    assert np.allclose(twice.outputs, np.concatenate([first.outputs[:2]] * 2), atol=1e-6)  # of another batch
    assert home.ledger_path("test").read_bytes() == ledger


def test_records_that_are_scaled_already_are_refused(trained: Path, home: Home) -> None:
    """Where raw numbers have a range: 0..255 become 0..1. One that is dark all over is none of them."""
    bundle = replace(run_bundle(trained), scaling=Scaling(divide=(255.0,), low=0.0, high=255.0))
    asks, raw = Predictor(bundle, home, nobody), np.abs(RECORDS[:2]) * 50
    with pytest.raises(DataError, match="records must be raw, up to 255: these look scaled already"):
        asks.predict(raw / 255)
    assert list(home.accountant("test").rows()) == []
    assert not asks.release(raw)[1].any() and not asks.release(np.zeros_like(raw))[1].any()


def test_many_records_are_asked_about_in_parts(
    trained: Path, served: Served, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Predictor(run_bundle(trained), home, asking(served)).predict(RECORDS)
    monkeypatch.setattr(predictor, "MOST_RECORDS", 13)
    sizes: list[int] = []

    def note(payload: bytes) -> np.ndarray:
        sizes.append(len(Query.from_bytes(payload).release.counts))
        return asking(served)(payload)

    parts = Predictor(run_bundle(trained), home, note).predict(RECORDS)
    assert sizes == [13, 13, 4] and parts.values() == whole.values()
    assert np.allclose(parts.outputs, whole.outputs, atol=1e-6)


@pytest.mark.slow
def test_a_record_asked_about_a_thousand_times_is_counted_once(trained: Path, served: Served, home: Home) -> None:
    """Although the limits allow it to leave only once: what has left already can leave again."""
    (home.folder / "limits.toml").write_text("releases = 1\nequations = 0.9\nleverage = 1.0\n")
    sent: list[bytes] = []

    def note(payload: bytes) -> np.ndarray:
        sent.append(payload)
        return np.ones((1, served.bundle.outputs))

    asks = Predictor(run_bundle(trained), Home(home.folder), note)
    asks.predict(RECORDS[:1])
    once = list(home.accountant("test").rows())
    for _ in range(999):
        asks.predict(RECORDS[:1])
    assert len(sent) == 1000 and len(set(sent)) == 1
    assert len(once) == 1 and once[0][1].releases == 1 and list(home.accountant("test").rows()) == once


def test_a_record_is_sent_alike_whatever_it_is_sent_with(trained: Path, home: Home) -> None:
    whole, _ = released(run_bundle(trained), home)
    for i in (0, 7, 29):
        alone, _ = released(run_bundle(trained), home, RECORDS[i : i + 1])
        assert np.array_equal(alone.release.bitmap[0], whole.release.bitmap[i])
        stop = whole.release.counts[: i + 1].sum()
        assert np.array_equal(alone.release.codes, whole.release.codes[stop - alone.release.counts[0] : stop])


def test_what_is_known_as_one_record_leaves_as_one(trained: Path, home: Home) -> None:
    """Else records that float32 cannot tell apart, but a scaling can, would leave uncounted."""
    bundle = replace(run_bundle(trained), scaling=Scaling(subtract=(1e6,), divide=(1e-2,)))
    one, other = (1e6 + 0.03 * np.random.default_rng(seed).random(RECORDS[:1].shape) for seed in (0, 1))
    first, second = (Predictor(bundle, home, nobody).release(raw)[0].release for raw in (one, other))
    assert home.accountant("test").most().releases == 1
    assert np.array_equal(first.codes, second.codes) and np.array_equal(first.bitmap, second.bitmap)


@pytest.mark.parametrize("other", OTHERS)
def test_the_same_weights_in_another_layer_are_another_release(other: str, tmp_path: Path) -> None:
    """Else whoever makes models could ask about a record again and again, uncounted."""
    home = Home.create(tmp_path / "home", [0])
    (home.folder / "limits.toml").write_text("releases = 1\nequations = 0.9\nleverage = 1.0\n")
    torch.manual_seed(0)
    module, raw = nn.Conv1d(2, 3, 3), np.random.default_rng(2).normal(size=(4, 2, 9))
    changed = OTHERS[other] if isinstance(OTHERS[other], nn.Conv1d) else nn.Conv1d(2, 3, 3)
    changed.load_state_dict(module.state_dict())
    activation = nn.ReLU() if isinstance(OTHERS[other], nn.Conv1d) else OTHERS[other]
    refused = []
    for layer in (FirstLayer(module, nn.ReLU(), (2, 9)), FirstLayer(changed, activation, (2, 9))):
        bundle = Bundle(layer, TopK(2), "float32", Scaling(), task_of("binary"), 1)
        refused.append(released(bundle, home, raw)[1])
    assert refused == [[0] * 4, [Reason.RELEASES] * 4]


def test_another_scaling_makes_no_other_record(trained: Path, home: Home) -> None:
    bundle, zeros = run_bundle(trained), np.where(np.abs(RECORDS) < 0.1, 0.0, RECORDS)
    for scaling in (Scaling(), Scaling(divide=(1.0000002,)), Scaling((0.5,), (2.0,))):
        released(replace(bundle, scaling=scaling), home, zeros)
    released(bundle, home, np.where(zeros == 0, -0.0, zeros))
    assert len(list(home.accountant("test").rows())) == 30


def test_the_limits_hold_and_are_told(trained: Path, served: Served, home: Home) -> None:
    (home.folder / "limits.toml").write_text("equations = 0.1\n")
    found = Predictor(run_bundle(trained), Home(home.folder), asking(served)).predict(RECORDS)
    sent = found.refused == 0
    assert set(found.refused.tolist()) <= {0, Reason.EQUATIONS} and not sent.all()
    assert np.isnan(found.outputs[~sent]).all() and np.isfinite(found.outputs[sent]).all()
    assert found.why() == {"equations": int((~sent).sum())}
    assert [value is None for value in found.values()] == (~sent).tolist()
    assert len(list(home.accountant("test").rows())) == sent.sum()


def test_predictions_are_the_whole_networks(trained: Path, served: Served, home: Home) -> None:
    bundle = run_bundle(trained)
    plain = replace(bundle, dropping=All(), dtype="float32")
    found = Predictor(plain, home, asking(served)).predict(RECORDS)
    x = RECORDS.astype(np.float32)
    cut = bundle.layer.activation(bundle.layer.pre_activations(bundle.layer.initial_weights(), x))
    assert np.allclose(found.outputs, served.trunk(cut).detach().numpy(), atol=1e-5)
    assert found.values() == found.outputs.argmax(axis=1).tolist()


@pytest.mark.parametrize(
    ("records", "told"),
    [
        (RECORDS[:, :5], r"must have shape \(records, 12\), got \(30, 5\)"),
        (RECORDS[0], "must have shape"),
        (RECORDS[:0], "must have shape"),
        (np.where(RECORDS > 2, np.nan, RECORDS), "must be finite"),
        (RECORDS + 1e300, "must be in the model's units"),
        ([["a"] * 12], "must be numbers"),
    ],
)
def test_records_that_cannot_be_are_refused(records: np.ndarray, told: str, trained: Path, home: Home) -> None:
    with pytest.raises(DataError, match=told):
        Predictor(run_bundle(trained), home, nobody).predict(records)
    assert not list(home.accountant("test").rows())


def test_other_units_are_refused(trained: Path, home: Home) -> None:
    scaled = replace(run_bundle(trained), scaling=SCALED)
    with pytest.raises(DataError, match="must be in the model's units, -50 to 50"):
        Predictor(scaled, home, nobody).predict(RECORDS * 1000)
    assert np.allclose(SCALED.apply(SCALED.undo(RECORDS.astype(np.float32))), RECORDS, atol=1e-6)


@pytest.mark.parametrize("answer", [np.zeros((29, 3)), np.zeros((30, 2)), np.full((30, 3), np.nan), np.zeros(30)])
def test_an_answer_that_fits_nothing_is_refused(answer: np.ndarray, trained: Path, home: Home) -> None:
    with pytest.raises(RunError, match="the answer must be finite numbers"):
        Predictor(run_bundle(trained), home, lambda _: answer).predict(RECORDS)
