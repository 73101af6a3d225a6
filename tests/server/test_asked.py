"""Who is asked and waited for, and how long; who is asked no more, or anew."""

import re
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import simulated_json, small_settings
from faulty_nodes import Change, garbage, node_of, replaced, train
from flwr.app import Error, Message
from flwr.proto.node_pb2 import NodeInfo

from fedsplit.common.errors import RunError
from fedsplit.flower.grid import InProcessGrid
from fedsplit.runs.client_app import client_app
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.training import TrainingRun
from fedsplit.server import attendance
from fedsplit.server.checkpoint import load_checkpoint
from fedsplit.wire import exchange as wire

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]  # whole runs


def note_kinds(change: Change) -> tuple[Change, list[tuple[int, str, int]]]:
    """Return a change that also notes the node, kind and round of every message."""
    seen: list[tuple[int, str, int]] = []

    def noting(number: int, message: Message, reply: Message) -> Message | None:
        seen.append((node_of(message), message.metadata.message_type, number))
        return change(number, message, reply)

    return noting, seen


@pytest.mark.parametrize("mode", ["synchronous", "pipelined"])
@pytest.mark.parametrize("offences", [1, 3])
def test_a_node_that_always_lies_is_asked_no_more(
    offences: int, mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def lies(number: int, message: Message, reply: Message) -> Message:
        return garbage(reply) if number and node_of(message) == 1 else reply

    change, seen = note_kinds(lies)
    more = {} if offences == 3 else {"max-offences": offences}
    run = train(tmp_path, change, run={"rounds": 6}, protocol={"mode": mode, **more})
    assert [(kind, n) for node, kind, n in seen if node == 1] == [
        ("query", 0),
        *(("train", n) for n in range(1, offences + 1)),
    ]
    for node in (0, 2, 3, 4):
        assert {n for who, kind, n in seen if (who, kind) == (node, "train")} == set(range(1, 7))
        assert [kind for who, kind, _ in seen if who == node].count("query") == 1
    told = re.findall(r"node 3 \(devices 1\) is .*", caplog.text)
    left_out = "node 3 (devices 1) is left out: magic must be b'fs': not a fedsplit message (offence {})"
    assert told[:-1] == [left_out.format(n) for n in range(1, offences + 1)]
    assert told[-1] == f"node 3 (devices 1) is quarantined after {offences} offences"
    assert run.result is not None and run.result["rounds"] == 6
    assert run.result["samples"] == 6 * (sum(7 + 3 * d for d in range(5)) - 10)
    states = {row["node"]: (row["state"], row["offences"]) for row in run.strategy.roster.rows()}
    assert states == {str(n): ("quarantined", offences) if n == 3 else ("connected", 0) for n in range(2, 7)}
    resumed = TrainingRun(run.settings, run.folder.path).strategy
    load_checkpoint(run.folder.checkpoint, resumed)
    accounts = {node: resumed.roster.account(node) for node in (2, 3)}
    assert {n: (a.offences, a.quarantined) for n, a in accounts.items()} == {2: (0, False), 3: (offences, True)}


def test_a_round_goes_on_with_the_first_that_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two of five are wanted and four asked: nobody waits for nodes 3 and 4, who are only slow."""

    def slow(number: int, message: Message, reply: Message) -> Message | None:
        return None if number and message.metadata.message_type == "train" and node_of(message) in (3, 4) else reply

    change, seen = note_kinds(slow)
    devices = {"fraction": 0.4, "over-sampling": 2.0, "test": [0, 1]}
    frozen = {"first_layer": {"strategy": "frozen"}}
    run = train(tmp_path, change, devices=devices, protocol={"timeout": 600.0}, run={"rounds": 6}, **frozen)
    assert run.result is not None and run.result["rounds"] == 6
    for number in range(1, 7):
        assert len({node for node, kind, n in seen if (kind, n) == ("train", number)}) == 4
    assert [kind for _, kind, _ in seen].count("query") == 5 and "has not answered" not in caplog.text
    heard = run.strategy.schedule.heard
    answered = [node for node, kind, n in seen if kind == "train" and node < 3]  # who come at once are all welcome
    assert heard == {node: answered.count(node) for node in range(3)}


def test_a_round_waits_until_its_deadline_and_an_evaluation_does_not(tmp_path: Path) -> None:
    def silent(number: int, message: Message, reply: Message) -> Message | None:
        return None if number == 2 and node_of(message) == 1 else reply

    began = time.monotonic()
    run = train(tmp_path, silent, protocol={"timeout": 600.0, "deadline": 3.0})
    assert run.result is not None and run.result["rounds"] == 4
    assert run.result["samples"] == 4 * sum(7 + 3 * d for d in range(5)) - 10
    assert 3.0 <= time.monotonic() - began < 600


@pytest.mark.parametrize("nodes", [5, 2])
@pytest.mark.parametrize("lie", [False, True])
def test_what_was_to_be_released_once_is_asked_for_until_it_comes(lie: bool, nodes: int, tmp_path: Path) -> None:
    """Also if nobody else is asked any more: the run goes on without, and what comes again is nothing new."""

    def missing(number: int, message: Message, reply: Message) -> Message | None:
        if number in (1, 2) and node_of(message) == 1 and message.metadata.message_type == "train":
            return garbage(reply) if lie else None
        return reply

    packing = {"per-node": -(-5 // nodes)}
    once = {"public": {"devices": [0], "epochs": 1}, "devices": packing}
    run = train(tmp_path, missing, nodes, protocol={"mode": "release-once"}, run={"rounds": 5}, **once)
    assert run.result is not None and run.result["rounds"] == 5
    assert run.result["samples"] == sum(7 + 3 * d for d in range(1, 5))
    assert run.result["exposures_max"] == 1


@pytest.mark.parametrize("exchange", [1, 2, 3])
def test_each_exchange_of_a_round_has_its_deadline_with_labels_at_home(exchange: int, tmp_path: Path) -> None:
    asked: list[int] = []

    def silent(number: int, message: Message, reply: Message) -> Message | None:
        if number == 2 and node_of(message) == 1 and message.metadata.message_type == "train":
            asked.append(number)
            return None if len(asked) == exchange else reply
        return reply

    began = time.monotonic()
    protocol = {"mode": "synchronous", "labels": "at-home", "batch-size": 1000, "timeout": 30.0, "deadline": 1.0}
    run = train(tmp_path, silent, protocol=protocol)
    assert run.result is not None and run.result["rounds"] == 4
    assert len(asked) >= exchange and time.monotonic() - began < 30


def test_offences_need_not_follow_one_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def lies(number: int, message: Message, reply: Message) -> Message:
        return garbage(reply) if number in (1, 3, 5) and node_of(message) == 1 else reply

    change, seen = note_kinds(lies)
    run = train(tmp_path, change, run={"rounds": 7})
    assert [n for node, kind, n in seen if (node, kind) == (1, "train")] == [1, 2, 3, 4, 5]
    assert "node 3 (devices 1) is quarantined after 3 offences" in caplog.text
    assert run.result is not None and run.result["samples"] == 7 * sum(7 + 3 * d for d in range(5)) - 5 * 10


@pytest.mark.parametrize("code", [2, 3, 4, 5, 8])
def test_a_node_that_flower_says_is_gone_is_asked_for_its_devices_anew(code: int, tmp_path: Path) -> None:
    """Unless its ClientApp raised, code 2: then it is there."""

    def fails(number: int, message: Message, reply: Message) -> Message:
        return Message(Error(code, "gone"), reply_to=message) if number == 2 and node_of(message) == 1 else reply

    change, seen = note_kinds(fails)
    run = train(tmp_path, change)
    mine = [(kind, n) for node, kind, n in seen if node == 1]
    assert mine.count(("query", 0)) == (1 if code == 2 else 2)
    assert {n for kind, n in mine if kind == "train"} == {1, 2, 3, 4}
    account = run.strategy.roster.accounts[3]
    assert (account.missed, account.offences, account.quarantined) == (1, 0, False)


def test_a_newcomer_holds_nobody_up(tmp_path: Path) -> None:
    """Node 1 does not say what devices it has before the third question: the run neither waits nor forgets it."""
    questions = []

    def mute(number: int, message: Message, reply: Message) -> Message | None:
        if node_of(message) == 1 and message.metadata.message_type == "query":
            questions.append(time.monotonic())
            return reply if len(questions) == 3 else None
        return reply

    change, seen = note_kinds(mute)
    run = train(tmp_path, lambda *a: (time.sleep(0.01), change(*a))[1], run={"rounds": 20})
    assert run.result is not None and run.result["rounds"] == 20
    assert len(questions) == 3 and min(np.diff(questions)) > 0.1  # it is not asked again before the timeout, 0.2 s
    mine = [n for node, kind, n in seen if (node, kind) == (1, "train")]
    assert 1 < mine[0] < 20 and mine == [*range(mine[0], 21), 20]  # and the flush
    assert run.result["samples"] == 20 * sum(7 + 3 * d for d in range(5)) - (mine[0] - 1) * 10


def test_a_registration_that_no_honest_node_sends_is_an_offence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def lies(number: int, message: Message, reply: Message) -> Message:
        if number == 0 and node_of(message) == 1:
            return replaced(reply, wire.Registration(*(np.array([v]) for v in (5, 10, 0))).to_bytes())
        return reply

    with pytest.raises(RunError, match="a node could not register: devices must be below 5, got 5"):
        train(tmp_path, lies)
    assert "node 3 is left out: devices must be below 5, got 5 (offence 1)" in caplog.text


def test_devices_that_another_node_has_are_refused_without_an_offence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def lies(number: int, message: Message, reply: Message) -> Message:
        if number == 0 and node_of(message) == 1:
            return replaced(reply, wire.Registration(*(np.array([v]) for v in (0, 10, 0))).to_bytes())
        return reply

    with pytest.raises(RunError, match="a node could not register: devices: 0 is registered by another node"):
        train(tmp_path, lies)
    assert "node 3 could not register: devices: 0 is registered by another node" in caplog.text
    assert "offence" not in caplog.text


def test_a_run_says_for_how_many_devices_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And ``nodes.json`` has those that are there already."""
    monkeypatch.setattr(attendance, "_PATIENCE", 0.05)
    there: list[int] = []

    class Late(InProcessGrid):
        def get_nodes(self) -> list[NodeInfo]:
            if "3 of 5 devices are there: waiting for the others, at most 600 s" in caplog.text:
                there.append(len(RunFolder(tmp_path / "run").node_rows()))
                return list(super().get_nodes())
            return list(super().get_nodes())[:3]

    settings, folder = small_settings(protocol={"timeout": 600}), tmp_path / "run"
    RunFolder(folder).open(settings, resume=False)
    run = TrainingRun(settings, folder)
    assert run.train(Late(client_app(simulated_json(settings), str(folder / "nodes")), 5))["nodes"] == 5
    assert there[0] == 3 and len(RunFolder(folder).node_rows()) == 5 and caplog.text.count("devices are there") == 1
