"""The guard through the real ClientApp, with a server that sends what it likes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import small_settings
from flwr.app import MessageType
from hostile_server import NOTHING_LEAVES, Server, Start, all_of, only_refusals, private, run_settings, said
from proposals import WIDTH, N, dense, flat
from torch import nn

from fedsplit import DeviceData, SplitModel
from fedsplit.common.errors import ConfigError
from fedsplit.device.home import Home
from fedsplit.device.nodes import real_node
from fedsplit.plan.experiment import Experiment
from fedsplit.wire.ledger import Reason


def tanh_model() -> SplitModel:
    return SplitModel.from_sequential(nn.Sequential(nn.Linear(N, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)), (N,))


NAMED = ["hostile_server:private"]


def test_a_number_that_is_said_is_found(tmp_path: Path) -> None:
    """In all the ways in which the tests below look for it."""
    x = private(1, 3).train.x
    for told in (
        x[3].tobytes(),
        b"..." + x[3, :1].astype(">f8").tobytes(),
        str(x[5, 2]),
        f"{x[0]}",
        repr(float(x[9, 9])),
    ):
        server = Server(run_settings(tmp_path), tmp_path)
        (server.heard if isinstance(told, bytes) else server.errors).append(told)  # type: ignore[arg-type]
        with pytest.raises(AssertionError):
            said(server)
        with pytest.raises(AssertionError):
            said(Server(run_settings(tmp_path), tmp_path), f"a log says {x[7, 7]}")


def state_of(server: Server, run: int = 1, node: int = 0) -> dict[str, bytes]:
    folder = server.states / f"{run:x}" / str(node)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_the_shipped_limits_allow_goes_through(server: Start) -> None:
    hostile = server()
    upload = hostile.send(hostile.ask())
    assert upload is not None and len(upload.release.targets) == 60 and not len(upload.refused)
    assert upload.ledger.exposures == 1 and upload.ledger.equations <= 2 and 0 < upload.ledger.leverage < 0.9


def test_one_pixel_weights_bring_refusals(server: Start) -> None:
    hostile = server("refusals = 1000")
    only_refusals(hostile.send(hostile.ask(weights=flat(np.eye(WIDTH, N), 9.0))), all_of(Reason.WEIGHTS))
    leverage = hostile.send(hostile.ask(weights=flat(np.eye(WIDTH, N))))
    sent = np.repeat(leverage.release.devices, leverage.release.records) if leverage else np.zeros(0)
    refused = {d: (Reason(r), n) for d, r, n in leverage.refused.tolist()} if leverage else {}
    assert {d: n + int((sent == d).sum()) for d, (_, n) in refused.items()} == dict.fromkeys(range(3), 20)
    assert {r for r, _ in refused.values()} == {Reason.LEVERAGE}
    assert leverage is not None and not leverage.release.counts.any()  # what has left had no active output


def test_one_pixel_bits_bring_refusals(server: Start) -> None:
    hostile = server(dropping={"policy": "bits", "k": None, "bits": 1})
    only_refusals(hostile.send(hostile.ask(weights=flat(np.eye(WIDTH, N)))), all_of(Reason.WEIGHTS))


def test_a_giant_row_brings_refusals(server: Start) -> None:
    hostile, rows = server(), dense()
    rows[4] *= 1e8
    only_refusals(hostile.send(hostile.ask(weights=flat(rows))), all_of(Reason.WEIGHTS))
    assert hostile.send(hostile.ask()) is not None


@pytest.mark.parametrize("policy", [{"policy": "none", "k": None}, {"policy": "random", "k": None, "keep": 1.0}])
def test_settings_that_keep_everything_bring_refusals(policy: dict[str, Any], server: Start) -> None:
    hostile = server(dropping=policy, model={"builder": "test_hostile_server:tanh_model"})
    only_refusals(hostile.send(hostile.ask()), all_of(Reason.EQUATIONS))


def test_an_older_round_brings_refusals(server: Start) -> None:
    hostile = server()
    hostile.send(hostile.ask(5, rows=[(0, 0, 0, 10)]))
    old = hostile.ask(4, rows=[(0, 0, 10, 20), (1, 0, 0, 20)], weights=flat(dense(1)))
    only_refusals(hostile.send(old), {0: (Reason.ORDER, 10), 1: (Reason.ORDER, 20)})


@pytest.mark.parametrize("policy", ["top-k", "random", "at-most"])
def test_a_replay_brings_the_same_bytes_and_costs_nothing(policy: str, server: Start) -> None:
    """Also with later rounds between, also of a part of the chunk, and after the cap."""
    k = {"k": None, "keep": 0.1} if policy == "random" else {"k": 2}
    hostile = server("refusals = 0\nleverage = 1.0", dropping={"policy": policy, **k})
    old = hostile.ask(3, rows=[(0, 0, 0, 10), (1, 0, 0, 20)])
    replies = [hostile.send(old)]
    hostile.send(hostile.ask(4, rows=[(0, 0, 0, 20)], weights=flat(dense(1))))
    refusal = hostile.send(hostile.ask(4, rows=[(2, 0, 0, 1)], weights=flat(dense(1), 9.0)))
    only_refusals(refusal, {2: (Reason.CAPPED, 1)})  # one too many
    refusal = hostile.send(hostile.ask(5, rows=[(2, 0, 0, 20)], weights=flat(dense(1))))
    only_refusals(refusal, {2: (Reason.CAPPED, 20)})
    ledgers = {name: content for name, content in state_of(hostile).items() if name.startswith("ledger")}
    replies += [hostile.send(old), hostile.send(hostile.ask(3, rows=[(1, 0, 0, 20)]))]
    assert ledgers == {name: content for name, content in state_of(hostile).items() if name.startswith("ledger")}
    parts = [r.release for r in replies if r is not None]
    assert len(parts) == 3 and len(parts[0].targets) > 20
    for one, other in zip(parts[0].arrays(), parts[1].arrays(), strict=True):
        assert one.tobytes() == other.tobytes()
    tail = int(parts[2].counts.sum())
    assert parts[0].codes[-tail:].tobytes() == parts[2].codes.tobytes()
    assert parts[0].bitmap[-20:].tobytes() == parts[2].bitmap.tobytes()


def test_rounds_made_up_to_get_other_masks_bring_refusals(server: Start) -> None:
    hostile = server("leverage = 1.0", dropping={"policy": "at-most", "k": 2})
    asked = hostile.send(hostile.ask(1))
    assert asked is not None and len(asked.release.targets) == 60
    for round_number in (2, 3, 2**32 - 1):
        only_refusals(hostile.send(hostile.ask(round_number)), all_of(Reason.RELEASES))
    only_refusals(hostile.send(hostile.ask(4, weights=flat(dense(3)))), all_of(Reason.RELEASES))


def test_evaluation_has_limits_too(server: Start) -> None:
    hostile, rows = server(), [(d, 0, 0, 10) for d in range(3)]
    first_time = hostile.send(hostile.ask(rows=rows), MessageType.EVALUATE)
    assert first_time is not None and len(first_time.release.targets) == 30
    other = hostile.ask(2, rows=rows, weights=flat(dense(3)))
    only_refusals(hostile.send(other, MessageType.EVALUATE), all_of(Reason.RELEASES, 10))
    only_refusals(
        hostile.send(hostile.ask(2, rows=rows, weights=flat(dense(3), 9.0)), MessageType.EVALUATE),
        all_of(Reason.RELEASES, 10),
    )


def test_in_simulation_a_new_run_begins_new_ledgers(server: Start) -> None:
    """Simulated nodes are born with a run. Real ones are not; see below."""
    hostile = server()
    for run in (1, 2):
        upload = hostile.send(hostile.ask(run=run, weights=flat(dense(run))))
        assert upload is not None and len(upload.release.targets) == 60 and upload.ledger.exposures == 1


def test_a_real_node_counts_over_all_runs(server: Start, tmp_path: Path) -> None:
    Home.create(tmp_path / "home", [0, 1, 2], NAMED)
    settings = {"protocol": {"mode": "single-pass", "chunk": "epoch"}, "first-layer": {"strategy": "frozen"}}
    hostile = server(home=tmp_path / "home", **settings)
    upload = hostile.send(hostile.ask())
    assert upload is not None and len(upload.release.targets) == 60
    for run in (1, 2, 2**62):
        only_refusals(hostile.send(hostile.ask(2, run=run, weights=flat(dense(3)))), all_of(Reason.RELEASES))
    (tmp_path / "home" / "ledger-train.npz").unlink()
    assert hostile.send(hostile.ask(3)) is None and hostile.errors[-1] == NOTHING_LEAVES


def test_a_real_node_runs_no_code_that_its_owner_has_not_allowed(server: Start, tmp_path: Path) -> None:
    """It needs no model's: that of a run is not named."""
    Home.create(tmp_path / "home", [0, 1, 2], ["hostile_server:model"])
    hostile = server(home=tmp_path / "home", protocol={"mode": "single-pass", "chunk": "epoch"})
    assert hostile.send(hostile.ask()) is None
    assert "data.builder 'hostile_server:private' is not among what the node's owner allows" in hostile.errors[-1]
    assert "hostile_server:model" not in hostile.terms


def test_a_real_node_opens_no_folder_that_its_owner_has_not_allowed(tmp_path: Path) -> None:
    Home.create(tmp_path / "home", [0], ["own:linear_model"])
    terms = json.loads(Experiment(small_settings()).terms.to_json())
    terms["data"] |= {"builder": None, "folder": str(tmp_path / "other")}
    with pytest.raises(ConfigError, match=r"data\.folder .* is not among what the node's owner allows"):
        real_node(json.dumps(terms), str(tmp_path / "home"))


def test_a_device_of_a_real_node_whose_records_were_changed_sits_out(server: Start, tmp_path: Path) -> None:
    home = Home.create(tmp_path / "home", [0, 1, 2], NAMED)
    home.known(1, private(2, 3))  # what device 1 held before
    settings = {"protocol": {"mode": "single-pass", "chunk": "epoch"}, "first-layer": {"strategy": "frozen"}}
    hostile = server(home=tmp_path / "home", **settings)
    upload = hostile.send(hostile.ask())
    assert upload is not None and upload.failed.tolist() == [1] and upload.release.devices.tolist() == [0, 2]


def test_a_real_node_answers_no_more_questions_in_new_runs(server: Start, tmp_path: Path) -> None:
    """Which weights are refused for being active is a threshold of the server's choice on a record."""
    Home.create(tmp_path / "home", [0, 1, 2], NAMED)
    (tmp_path / "home" / "limits.toml").write_text("refusals = 5")
    settings = {"protocol": {"mode": "single-pass", "chunk": "epoch"}, "first-layer": {"strategy": "frozen"}}
    hostile = server(home=tmp_path / "home", **settings)
    told: list[Reason] = []
    for run in range(1, 12):
        upload = hostile.send(hostile.ask(run=run, rows=[(0, 0, 0, 1)], weights=flat(dense(run), 20.0)))
        assert upload is not None
        told += [Reason(r) for _, r, _ in upload.refused.tolist()]
    assert told == [Reason.WEIGHTS] * 5 + [Reason.CAPPED] * 6


def telling(device_id: int, num_devices: int) -> DeviceData:
    """A device's own code that fails with its records in the text."""
    data = private(device_id, num_devices)
    if device_id == 1:
        raise ValueError(f"cannot use {data.train.x[0].tolist()}")
    return data


def test_a_device_that_fails_says_nothing_of_its_records(server: Start) -> None:
    hostile = server(data={"builder": "test_hostile_server:telling"})
    upload = hostile.send(hostile.ask())
    assert upload is not None and upload.failed.tolist() == [1] and len(upload.release.targets) == 40


@pytest.mark.parametrize("place", ["fedsplit.guard.releaser.forward", "fedsplit.guard.guard.coordinates"])
def test_an_unforeseen_error_says_nothing_of_records(
    place: str, server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = server()

    def fails(*arguments: Any, **more: Any) -> None:
        raise ValueError(f"cannot use {private(0, 3).train.x[0].tolist()}")

    with monkeypatch.context() as patched:
        patched.setattr(place, fails)
        assert hostile.send(hostile.ask()) is None
    assert hostile.errors == ["RunError: ValueError in a train message"]
    assert hostile.send(hostile.ask()) is not None
