"""Labels at home: what is computed, what crosses the wire, what either side refuses."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import references
import torch
from conftest import new_node, simulated_json, small_settings
from flwr.app import Message
from own import linear
from references import centralised, delayed, largest_difference, moved, trained
from torch import nn

from fedsplit import simulate
from fedsplit.common.errors import ConfigError, WireError
from fedsplit.device.at_home import AtHomeNode
from fedsplit.device.home import Home
from fedsplit.device.link import HOME
from fedsplit.device.nodes import real_node
from fedsplit.flower.grid import InProcessGrid
from fedsplit.flower.record import TERMS, from_record, to_record
from fedsplit.model.head import Head, cut_head
from fedsplit.model.tasks import task_of
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from fedsplit.runs.client_app import client_app
from fedsplit.runs.folder import open_run_folder
from fedsplit.runs.training import TrainingRun
from fedsplit.service.served import Served
from fedsplit.wire.coding import quantise
from fedsplit.wire.container import Reader
from fedsplit.wire.exchange import Download, Upload, weights_digest
from fedsplit.wire.head import HeadDownload, HeadUpload, Rows
from fedsplit.wire.release import Release

DEVICES = 5
HEAD = Head(8, 3, bias=True, task=task_of("classification"))  # of own:linear_model
AT_HOME = {"mode": "synchronous", "labels": "at-home", "batch-size": 1000}


def at_home(**changes: dict[str, Any]) -> Settings:
    """Return a small run with labels at home, of chunks that leave no device a single record."""
    protocol = {**AT_HOME, "chunk": 7, **changes.pop("protocol", {})}
    return small_settings(protocol=protocol, **changes)


# --- what is computed --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_without_dropping_it_is_centralised_sgd(kind: str, out: Path) -> None:
    """Fifty rounds over three nodes of two devices."""
    settings = at_home(
        run={"rounds": 50},
        data={"builder": f"own:{kind}"},
        model={"builder": f"own:{kind}_model"},
        devices={"per-node": 2},
    )
    simulate(settings, out=out)
    found = trained(out)
    assert moved(settings, found) > 0.01
    assert largest_difference(found, centralised(settings)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("chunk", ["epoch", 7])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_pipelined_applies_first_layer_gradients_one_round_late(kind: str, chunk: int | str, out: Path) -> None:
    """As with shared labels: see ``test_exactness.py``."""
    settings = at_home(
        run={"rounds": 8},
        data={"builder": f"own:{kind}"},
        model={"builder": f"own:{kind}_model"},
        devices={"per-node": 2},
        protocol={"mode": "pipelined", "chunk": chunk},
        first_layer={"lr": 0.3},
    )
    simulate(settings, out=out)
    found = trained(out)
    assert moved(settings, found) > 0.01
    assert largest_difference(found, delayed(settings)) < 1e-5
    assert largest_difference(found, centralised(settings)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_how_devices_are_packed_into_nodes_changes_nothing(dtype: str, tmp_path: Path) -> None:
    for per_node in (1, 2, 5):
        settings = at_home(
            run={"rounds": 10},
            devices={"per-node": per_node},
            protocol={"dtype": dtype},
            dropping={"policy": "random", "keep": 0.5},
            first_layer={"strategy": "FedAdam", "lr": 0.01},
        )
        simulate(settings, out=tmp_path / str(per_node))
    found = [trained(tmp_path / str(per_node)) for per_node in (1, 2, 5)]
    assert largest_difference(found[0], found[1]) < 1e-5
    assert largest_difference(found[0], found[2]) < 1e-5


CASES: dict[str, dict[str, dict[str, Any]]] = {
    "adam": {"trunk": {"optimizer": "adam", "lr": 0.01}},
    "momentum and decay": {"trunk": {"momentum": 0.9, "weight-decay": 0.01}},
    "dropping and a schedule": {"dropping": {"policy": "random", "keep": 0.5}, "trunk": {"schedule": "cosine"}},
    "dropout and batch norm": {"model": {"builder": "own:random_model"}},
    "thinning": {"trunk": {"thinning": 0.5}},
    "a frozen first layer": {"first-layer": {"strategy": "frozen"}},
    "a sum of each device's": {"first-layer": {"strategy": "FedMedian"}},
    "some devices": {"devices": {"fraction": 0.5}},
    "several passes": {"protocol": {"trunk-epochs": 3}, "model": {"builder": "own:random_model"}},
    "regression": {
        "data": {"builder": "own:regression", "task": "regression", "outputs": 1},
        "model": {"builder": None, "name": "mlp", "width": 8},
        "trunk": {"lr": 0.01},
    },
    "binary": {
        "data": {"builder": None, "name": "breast-cancer", "task": None, "outputs": None},
        "devices": {"count": 5, "partition": "iid"},
        "model": {"builder": None, "name": "mlp", "width": 8},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["synchronous", "pipelined"])
@pytest.mark.parametrize("case", CASES)
def test_where_labels_are_changes_nothing(case: str, mode: str, tmp_path: Path) -> None:
    """Weights and scores are those of shared labels; what would tell of single classes is not there."""
    results = {}
    for labels in ("shared", "at-home"):
        changes = {**CASES[case], "protocol": {"labels": labels, "mode": mode, **CASES[case].get("protocol", {})}}
        settings = at_home(run={"rounds": 6}, **changes)
        results[labels] = simulate(settings, out=tmp_path / labels)
    shared, private = results["shared"], results["at-home"]
    assert largest_difference(trained(tmp_path / "shared"), trained(tmp_path / "at-home")) < 1e-5
    for score in ("test_loss", "test_accuracy", "test_rmse"):
        assert shared.get(score) == pytest.approx(private.get(score), abs=1e-5)
    assert "test_f1" not in private and "test_r2" not in private
    lines = [[json.loads(line) for line in (tmp_path / m / "metrics.jsonl").open()] for m in ("shared", "at-home")]
    for line, other in zip(*lines, strict=True):
        assert line["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)
        assert line.get("train_accuracy") == pytest.approx(other.get("train_accuracy"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["synchronous", "pipelined"])
def test_an_interrupted_run_resumes_exactly_and_its_model_predicts(mode: str, tmp_path: Path) -> None:
    settings = at_home(
        run={"rounds": 6},
        protocol={"dtype": "float16", "mode": mode, "trunk-epochs": 2},
        first_layer={"strategy": "FedAdam", "lr": 0.01},
        trunk={"optimizer": "adam", "lr": 0.01},
    )
    whole = simulate(settings, out=tmp_path / "whole")

    def interrupt(metrics: dict[str, object]) -> None:
        if metrics["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(settings, out=tmp_path / "cut", report=interrupt)
    resumed = simulate(settings, out=tmp_path / "cut", resume=True)
    assert largest_difference(trained(tmp_path / "whole"), trained(tmp_path / "cut")) == 0.0
    assert resumed["test_loss"] == whole["test_loss"]
    served = Served.of_run(tmp_path / "cut")
    head = {k.rpartition(".")[2]: v for k, v in trained(tmp_path / "cut").items() if k.startswith("trunk.2.")}
    assert torch.equal(served.trunk[2].weight, head["weight"]) and torch.equal(served.trunk[2].bias, head["bias"])


def test_gradients_are_those_of_autograd() -> None:
    rng = np.random.default_rng(0)
    layer, y = nn.Linear(8, 3).double(), rng.integers(0, 3, 6)
    x = torch.from_numpy(rng.normal(size=(6, 8)).astype(np.float32))
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(p.float())
    inputs = x.double().requires_grad_()
    loss = nn.functional.cross_entropy(layer(inputs), torch.from_numpy(y), reduction="sum")
    loss.backward()
    flat = np.concatenate([p.detach().numpy().ravel() for p in layer.parameters()]).astype(np.float32)
    found = HEAD.sums(flat, x.numpy(), y)
    assert found.loss == pytest.approx(loss.item())
    np.testing.assert_allclose(found.features, inputs.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(found.head[:24].reshape(3, 8), layer.weight.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(found.head[24:], layer.bias.grad.numpy(), atol=1e-12)
    assert found.correct == int((layer(inputs).argmax(1).numpy() == y).sum())


# --- what crosses the wire ---------------------------------------------------------------------------------------


class Wire(InProcessGrid):
    """Keeps all payloads, and may change or swallow replies."""

    def __init__(self, settings: Settings, states: Path, nodes: int) -> None:
        super().__init__(client_app(simulated_json(settings), str(states)), nodes)
        self.sent: list[tuple[int, bytes]] = []
        self.came: list[tuple[int, bytes]] = []
        self.change: Callable[[int, bytes, bytes], bytes | None] = lambda node, sent, came: came

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            node, sent = message.metadata.dst_node_id - 2, from_record(message.content)
            (identifier,) = super().push_messages([message])
            ids.append(identifier)
            reply = self._replies[identifier]
            if reply.has_error():
                continue
            came = from_record(reply.content)
            if message.metadata.message_type != "query":
                changed = self.change(node, sent, came)
                if changed is None:
                    del self._replies[identifier]
                    continue
                reply.content = to_record(changed)
            self.sent.append((node, sent))
            self.came.append((node, came))
        return ids


def run(
    settings: Settings, folder: Path, prepare: Callable[[Wire], None] = lambda wire: None
) -> tuple[TrainingRun, Wire]:
    open_run_folder(folder, settings, resume=False)
    training = TrainingRun(settings, folder)
    wire = Wire(settings, folder / "nodes", -(-DEVICES // settings.devices.per_node))
    prepare(wire)
    training.train(wire)
    return training, wire


def forms(rows: np.ndarray) -> list[bytes]:
    """Numbers in every way that a message writes them."""
    found = [rows.astype(dtype).tobytes() for dtype in ("u1", "<u2", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8")]
    return found if rows.dtype.kind == "i" else found[5:]


def bodies(messages: Iterable[tuple[int, bytes]]) -> list[bytes]:
    """Return what stands behind the payloads' tables of arrays, where small numbers are many."""
    return [payload[Reader(payload, payload[3]).offset :] for _, payload in messages if payload]


def labels_in(payloads: list[bytes], y: np.ndarray) -> bool:
    """Whether labels, in their order, stand anywhere: as numbers of any type, counted from 0 or 1, or one-hot."""
    found = [*forms(y), *forms(y + 1), *forms(np.eye(3, dtype=np.int64)[y])]
    return any(form in payload for form in found for payload in payloads)


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


# --- the devices do not trust the server -------------------------------------------------------------------------


def ask(node: AtHomeNode, rows: list[tuple[int, int, int, int]], number: int = 1, **fields: Any) -> HeadDownload:
    """Have a node release some records; return an honest question about them, with some fields changed."""
    weights = node.first_layer.flatten(node.first_layer.initial_weights())
    upload = node.exchange(Download(1, number, 0, False, weights, np.array(rows), [], nonce=5))
    release, rng = upload.release, np.random.default_rng(0)
    features = Rows.pack(rng.normal(size=(len(release.counts), 8)).astype(np.float32), "float32")
    head = rng.normal(size=27).astype(np.float32)
    honest = HeadDownload(1, number, 7, weights_digest(weights), release.devices, release.records, head, features)
    return replace(honest, **fields)


@pytest.fixture
def node(tmp_path: Path) -> AtHomeNode:
    settings = at_home(devices={"per-node": DEVICES})
    found = new_node(settings, 0, 1, tmp_path / "run" / "nodes")
    assert isinstance(found, AtHomeNode)
    return found


ROWS = [(0, 0, 0, 7), (1, 0, 0, 4)]


def test_a_node_answers_for_its_release_alone(node: AtHomeNode) -> None:
    honest = ask(node, ROWS)
    found = node.apply_head(honest, test=False)
    assert found.records == 11 and found.nonce == 7
    rows = {
        "another round": {"round_number": 2},
        "another run": {"run": 2},
        "other weights": {"digest": honest.digest ^ 1},
        "another device": {"devices": np.array([0, 2])},
        "records between devices": {"records": np.array([6, 5])},
        "one device": {"devices": np.array([0]), "records": np.array([11])},
    }
    for change in rows.values():
        upload = node.apply_head(replace(honest, **change), test=False)
        assert (upload.records, upload.loss, upload.correct, len(upload.head), len(upload.features.codes)) == (
            0,
            0,
            0,
            0,
            0,
        )
    assert node.apply_head(honest, test=True).records == 0  # they are no test records


def test_of_a_single_record_nothing_leaves(node: AtHomeNode) -> None:
    assert node.apply_head(ask(node, [(0, 0, 3, 4)]), test=False).records == 0
    assert node.apply_head(ask(node, [(0, 0, 3, 5)], number=2), test=False).records == 2
    assert node.apply_head(ask(node, [(0, 0, 3, 4), (1, 0, 0, 4)], number=3), test=False).records == 0


def part_of(download: HeadDownload, *devices: int) -> HeadDownload:
    """Return the question about some of the devices that it is about."""
    mine = np.isin(download.devices, devices)
    rows = np.repeat(mine, download.records)
    features = Rows(download.features.codes[rows], download.features.exponents[rows])
    kept = {"devices": download.devices[mine], "records": download.records[mine], "features": features}
    return replace(download, **kept)


def test_devices_of_a_node_answer_together_or_apart(node: AtHomeNode) -> None:
    """A server has perhaps not heard of all; what it may subtract are sums over devices, never a record's."""
    honest = ask(node, [*ROWS, (2, 0, 0, 1)])
    both, first, second = (node.apply_head(part_of(honest, *d), test=False) for d in ((0, 1), (0,), (1,)))
    assert (both.records, first.records, second.records) == (11, 7, 4)
    np.testing.assert_allclose(both.head, first.head + second.head, atol=1e-9)
    assert np.array_equal(both.features.values(), np.concatenate([first.features.values(), second.features.values()]))
    for devices in ((0, 1, 2), (2,), (1, 2)):
        assert node.apply_head(part_of(honest, *devices), test=False).records == 0


def test_of_test_records_sums_alone_leave(node: AtHomeNode) -> None:
    weights = node.first_layer.flatten(node.first_layer.initial_weights())
    release = node.evaluate(Download(1, 1, 0, False, weights, np.array([(3, 0, 0, 6), (4, 0, 0, 6)]), [])).release
    assert release.targets.shape == (12, 0)
    features = Rows.pack(np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32), "float32")
    head = np.random.default_rng(1).normal(size=27).astype(np.float32)
    digest = weights_digest(weights)
    upload = node.apply_head(HeadDownload(1, 1, 7, digest, release.devices, release.records, head, features), test=True)
    assert upload.records == 12 and upload.loss > 0
    assert upload.head.size == upload.features.codes.size == 0
    y = np.concatenate([linear(d, DEVICES).test.y for d in (3, 4)])
    assert upload.correct == ((features.values() @ head[:24].reshape(3, 8).T + head[24:]).argmax(1) == y).sum()


def test_gradients_that_are_not_finite_do_not_leave(node: AtHomeNode) -> None:
    honest = ask(node, ROWS)
    with pytest.raises(WireError, match="features and head must not be so large"):
        node.apply_head(replace(honest, head=np.full(27, 3e38, np.float32) * np.tile([1, -1, 1], 9)), test=False)


def test_a_node_whose_labels_are_shared_answers_no_question_about_them(node: AtHomeNode, tmp_path: Path) -> None:
    payload = ask(node, ROWS).to_bytes()
    settings = at_home(protocol={"labels": "shared"}, devices={"per-node": DEVICES})
    other = new_node(settings, 0, 1, tmp_path / "other" / "nodes")
    with pytest.raises(WireError, match="kind must be 2, got 5"):
        other.answer("train", payload)


def test_an_owner_can_keep_labels_at_home(tmp_path: Path) -> None:
    """Whatever the server's settings say."""
    home = Home.create(tmp_path / "home", [0], ["own:linear"])
    limits = "releases = 100\nequations = 1.0\nlabels = {}\n"
    frozen = {"first_layer": {"strategy": "frozen"}, "dropping": {"policy": "top-k", "k": 4, "mask": "keyed"}}
    (home.folder / "limits.toml").write_text(limits.format("false"))
    with pytest.raises(ConfigError) as refused:
        real_node(Experiment(at_home(protocol={"labels": "shared"}, **frozen)).terms.to_json(), str(home.folder))
    assert str(refused.value) == (
        "the limits do not allow this run: labels would leave, labels is false (use protocol.labels 'at-home')"
    )
    experiment = Experiment(at_home(**frozen))
    built, layer = real_node(experiment.terms.to_json(), str(home.folder)), experiment.model.first_layer
    weights = layer.flatten(layer.initial_weights())
    upload = built.exchange(Download(1, 1, 0, False, weights, np.array([(0, 0, 0, 7)]), []))
    assert upload.release.targets.shape == (len(upload.release.counts), 0)


@pytest.mark.slow
def test_real_nodes_whose_owners_keep_their_labels_train_a_model(out: Path) -> None:
    """Frozen weights and the same masks: each record leaves once, and the trunk learns from it in every round."""
    settings = at_home(
        run={"rounds": 12},
        protocol={"chunk": "epoch"},
        dropping={"policy": "top-k", "k": 6, "mask": "keyed"},
        first_layer={"strategy": "frozen"},
        trunk={"optimizer": "adam", "lr": 0.02},
    )

    def owned(wire: Wire) -> None:
        for device, context in enumerate(wire._contexts.values()):
            home = Home.create(out.parent / str(device), [device], ["own:linear"])
            (home.folder / "limits.toml").write_text("equations = 1.0\nleverage = 1.0\nactive = 1.0\nlabels = false\n")
            context.node_config = {HOME: str(home.folder)}
            context.run_config = {TERMS: Experiment(settings).terms.to_json()}

    training, wire = run(settings, out, owned)
    assert training.result is not None and training.result["exposures_max"] == 1
    assert training.result["samples"] == 12 * sum(len(linear(d, DEVICES).train) for d in range(DEVICES))
    simulated = simulate(settings, out=out.parent / "simulated")
    assert training.result["test_loss"] == simulated["test_loss"]
    assert largest_difference(trained(out), trained(out.parent / "simulated")) == 0.0
    assert moved(settings, trained(out), ["trunk."]) > 0.1
    assert not any(labels_in(bodies(wire.came), linear(d, DEVICES).train.y) for d in range(DEVICES))


# --- what cannot work is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [{"mode": "single-pass", "chunk": "spread"}, {"mode": "release-once"}])
def test_modes_that_replay_are_refused(protocol: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'at-home' is not for mode '.*', which replays: every label") as refused:
        at_home(protocol=protocol)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_round_of_several_batches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"protocol\.batch-size must be at least 35 with labels at home .* got 34"):
        simulate(at_home(protocol={"batch-size": 34}), out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("nodes/*/*/pending*"))
    simulate(at_home(protocol={"batch-size": 35}, run={"rounds": 1}), out=tmp_path / "other")


@pytest.mark.parametrize(
    ("trunk", "found"),
    [
        (nn.Sequential(nn.Linear(4, 3)), "Sequential of Linear"),
        (nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), "Sequential of Softmax"),
        (nn.Linear(4, 3), "Linear"),
        (nn.Sequential(), "Sequential"),
    ],
)
def test_a_trunk_without_a_head_is_refused(trunk: nn.Module, found: str) -> None:
    with pytest.raises(ConfigError, match=f"the last an nn.Linear, got {found}$"):
        cut_head(trunk)


def test_a_model_without_a_head_is_refused_before_anything_starts(out: Path) -> None:
    with pytest.raises(ConfigError, match="got Sequential of Linear"):
        simulate(at_home(model={"builder": "own:tanh_model"}), out=out)
    assert not out.exists()
