"""Labels at home: what crosses the wire, and what the server refuses."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import references
import torch
from labels_at_home import DEVICES, HEAD, Wire, at_home, bodies, forms, labels_in, run
from own import linear
from references import centralised, largest_difference, moved, trained

from fedsplit.wire.coding import quantise
from fedsplit.wire.exchange import Upload
from fedsplit.wire.head import HeadDownload, HeadUpload, Rows
from fedsplit.wire.release import Release

# --- what crosses the wire ---------------------------------------------------------------------------------------


def gradients_in(payloads: list[bytes], rows: np.ndarray) -> bool:
    """Whether a gradient at the outputs of some record stands anywhere, as it is or scaled as values are."""
    written = [form for row in rows for form in forms(row)]
    written += [quantise(row.astype(np.float32), np.array([row.size]), "float16")[0].tobytes() for row in rows]
    return any(form in payload for form in written for payload in payloads)


def logit_gradients(download: HeadDownload, y: np.ndarray) -> np.ndarray:
    """Softmax minus one-hot of each record, plainly."""
    h, w = download.features.values().astype(np.float64), download.head.astype(np.float64)
    z = h @ w[:24].reshape(3, 8).T + w[24:]
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True) - np.eye(3)[y]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("per_node", [1, 2])
def test_the_wire_carries_neither_labels_nor_gradients_at_the_outputs(per_node: int, dtype: str, out: Path) -> None:
    settings = at_home(protocol={"chunk": "epoch", "dtype": dtype}, devices={"per-node": per_node})
    _, wire = run(settings, out)
    everything = bodies([*wire.sent, *wire.came])
    homes = np.array_split(np.arange(DEVICES), -(-DEVICES // per_node))
    data = [linear(d, DEVICES) for d in range(DEVICES)]
    for device in data:
        assert not labels_in(everything, device.train.y) and not labels_in(everything, device.test.y)
    asked = [(n, p) for n, p in wire.sent if HeadDownload.is_in(p)]
    assert len(asked) == 4 * len(homes) + len([h for h in homes if {3, 4} & set(h.tolist())])
    for node, payload in asked:
        download = HeadDownload.from_bytes(payload, HEAD)
        y = np.concatenate([data[d].train.y for d in homes[node]])
        if len(y) != len(download.features.codes):  # those at the end, of the test records
            y = np.concatenate([data[d].test.y for d in download.devices.tolist()])
        gradients = logit_gradients(download, y)
        assert not gradients_in(everything, gradients)


@pytest.mark.slow
def test_what_is_looked_for_on_the_wire_would_be_found(out: Path) -> None:
    """With shared labels they are there, and a gradient at the outputs is found in a message that has one."""
    _, wire = run(at_home(protocol={"chunk": "epoch", "labels": "shared"}), out)
    everything = bodies(wire.came)
    assert all(labels_in(everything, linear(d, DEVICES).train.y) for d in range(DEVICES))
    rows = np.random.default_rng(0).normal(size=(4, 3))
    for dtype in ("float16", "float32"):
        assert gradients_in([Rows.pack(rows.astype(np.float32), dtype).codes.tobytes()], rows)
    assert gradients_in([rows.tobytes()], rows[:1])


@pytest.mark.slow
def test_releases_of_other_modes_must_have_labels_and_these_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def labelled(node: int, sent: bytes, came: bytes) -> bytes:
        if node != 1 or HeadDownload.is_in(sent):
            return came
        upload = Upload.from_bytes(came, parameters=130)
        if not len(upload.release.counts):
            return came
        y = np.zeros(len(upload.release.counts), np.int64)
        return replace(upload, release=Release(**{**vars(upload.release), "targets": y})).to_bytes()

    def unlabelled(node: int, sent: bytes, came: bytes) -> bytes:
        upload = Upload.from_bytes(came, parameters=130)
        if node != 1 or not len(upload.release.counts):
            return came
        y = np.zeros((len(upload.release.counts), 0), np.float32)
        return replace(upload, release=Release(**{**vars(upload.release), "targets": y})).to_bytes()

    run(at_home(), tmp_path / "home", lambda wire: setattr(wire, "change", labelled))
    assert "targets must not be there: labels stay at home (offence 1)" in caplog.text
    run(at_home(protocol={"labels": "shared"}), tmp_path / "shared", lambda wire: setattr(wire, "change", unlabelled))
    assert "targets must be classes in 0..2 (offence 1)" in caplog.text


# --- the server does not trust the devices -----------------------------------------------------------------------


def head_upload(sent: bytes, came: bytes) -> HeadUpload:
    return HeadUpload.from_bytes(came, HEAD, HeadDownload.from_bytes(sent, HEAD), test=False)


def first_of_node_1(tell: Callable[[HeadUpload], HeadUpload | None]) -> Callable[[Wire], None]:
    """Have node 1 answer its first question about labels otherwise."""
    told = []

    def change(node: int, sent: bytes, came: bytes) -> bytes | None:
        if node != 1 or told or not HeadDownload.is_in(sent):
            return came
        told.append(1)
        lie = tell(head_upload(sent, came))
        return lie and lie.to_bytes()

    return lambda wire: setattr(wire, "change", change)


LIES: dict[str, tuple[Callable[[HeadUpload], HeadUpload], str]] = {
    "another message's": (
        lambda u: replace(u, nonce=u.nonce ^ 1),
        "nonce must be that of the message",
    ),
    "fewer records": (
        lambda u: replace(u, records=3),
        "records must be 7, those that were asked about, or 0",
    ),
    "more right than there are": (
        lambda u: replace(u, correct=8),
        r"correct must be in 0\.\.7",
    ),
    "a negative loss": (
        lambda u: replace(u, loss=-1.0),
        "loss must be in 0",
    ),
    "no loss": (
        lambda u: replace(u, loss=float("nan")),
        "loss must be in 0",
    ),
    "gradients of fewer records": (
        lambda u: replace(u, features=Rows(u.features.codes[:3], u.features.exponents[:3])),
        "features must have 7 rows",
    ),
    "more features": (
        lambda u: replace(u, features=Rows.pack(np.zeros((7, 9), np.float32), "float32")),
        "features must have 8 columns",
    ),
    "another head": (
        lambda u: replace(u, head=u.head[:-1]),
        "head must have 27 rows, got 26",
    ),
    "a head of nan": (
        lambda u: replace(u, head=u.head * np.nan),
        "head must be finite",
    ),
    "a head too large": (
        lambda u: replace(u, head=u.head * 1e6),
        "head must be a gradient that labels can give",
    ),
    "a bias too large": (
        lambda u: replace(u, head=np.append(u.head[:-1], 7.2)),
        "head must be a gradient that labels can give",
    ),
    "features too large": (
        lambda u: replace(u, features=Rows.pack(u.features.values() * np.float32(100), "float32")),
        "features must be gradients that labels can give",
    ),
}


@pytest.fixture(scope="module")
def without_node_1_at_first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return what a run ends with in which node 1 is silent when its labels are first asked."""
    folder = tmp_path_factory.mktemp("silent") / "run"
    run(at_home(protocol={"timeout": 0.2}), folder, first_of_node_1(lambda upload: None))
    return trained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("lie", LIES)
def test_a_lying_node_is_left_out(
    lie: str, without_node_1_at_first: dict[str, torch.Tensor], out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tell, refusal = LIES[lie]
    training, _ = run(at_home(), out, first_of_node_1(tell))
    (told,) = [record.message for record in caplog.records if "left out" in record.message]
    assert re.fullmatch(rf"node 3 \(devices 1\) is left out: {refusal}.* \(offence 1\)", told)
    assert moved(training.settings, trained(out)) > 1e-3
    assert largest_difference(trained(out), without_node_1_at_first) == 0.0


def test_a_node_that_is_silent_about_its_labels_counts_for_nothing_in_the_round(
    without_node_1_at_first: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = at_home()
    first, *others = references.chunks(settings)
    without = tuple(torch.cat([part[:7], part[14:]]) for part in first)
    monkeypatch.setattr(references, "chunks", lambda _: [without, *others])
    assert largest_difference(without_node_1_at_first, centralised(settings)) < 1e-5
