"""Labels at home: what devices refuse, and which settings are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import new_node
from labels_at_home import DEVICES, Wire, at_home, bodies, labels_in, run
from own import linear
from references import largest_difference, moved, trained
from torch import nn

from fedsplit import simulate
from fedsplit.common.errors import ConfigError, WireError
from fedsplit.device.at_home import AtHomeNode
from fedsplit.device.home import Home
from fedsplit.device.link import HOME
from fedsplit.device.nodes import real_node
from fedsplit.flower.record import TERMS
from fedsplit.model.head import cut_head
from fedsplit.plan.experiment import Experiment
from fedsplit.wire.exchange import Download, weights_digest
from fedsplit.wire.head import HeadDownload, Rows

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
