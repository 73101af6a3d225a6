"""What happens when nodes do not answer, answer late, or lie."""

import math
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import simulated_json, small_settings
from flwr.app import Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from references import largest_difference, moved, trained

from fedsplit.common.errors import RunError
from fedsplit.flower.grid import InProcessGrid
from fedsplit.flower.record import from_record, to_record
from fedsplit.release.admitted import unguarded
from fedsplit.release.kept import Kept
from fedsplit.runs.client_app import client_app
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.training import TrainingRun
from fedsplit.server import attendance
from fedsplit.server.checkpoint import load_checkpoint
from fedsplit.wire import exchange as wire
from fedsplit.wire.ledger import Reason

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]  # whole runs


Change = Callable[[int, Message, Message], Message | None]


class FaultyGrid(InProcessGrid):
    """Changes or swallows replies: ``change(round of the message, message, reply)``."""

    change: Change

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            sent = from_record(message.content)
            (identifier,) = super().push_messages([message])
            number = 0
            if message.metadata.message_type != "query":
                number = int(np.frombuffer(sent[sent.index(self.marker) :], dtype="<i8", count=2)[1])
            reply = self.change(number, message, self._replies.pop(identifier))
            if reply is not None:
                self._replies[identifier] = reply
            ids.append(identifier)
        return ids


def train(tmp_path: Path, change: Change, nodes: int = 5, **changes: dict[str, Any]) -> TrainingRun:
    protocol = {"timeout": 0.2, **changes.pop("protocol", {})}
    settings = small_settings(protocol=protocol, **changes)
    folder = tmp_path / "run"
    RunFolder(folder).open(settings, resume=False)
    run = TrainingRun(settings, folder)
    grid = FaultyGrid(client_app(simulated_json(settings), str(folder / "nodes")), nodes)
    grid.change = change
    grid.marker = run.strategy.progress.run.to_bytes(8, "little")
    run.train(grid)
    return run


def kept(number: int, message: Message, reply: Message) -> Message:
    return reply


def node_of(message: Message) -> int:
    return message.metadata.dst_node_id - 2


def in_round_2_of_node_1(change: Callable[[Message], Message]) -> Change:
    def changes(number: int, message: Message, reply: Message) -> Message:
        return change(reply) if number == 2 and node_of(message) == 1 else reply

    return changes


def test_a_silent_node_is_left_out_and_its_gradients_wait(tmp_path: Path) -> None:
    seen = []

    def silent_in_round_2(number: int, message: Message, reply: Message) -> Message | None:
        seen.append(number)
        return None if number == 2 and node_of(message) == 1 else reply

    run = train(tmp_path, silent_in_round_2)
    assert run.result is not None and run.result["rounds"] == 4
    # its chunk of round 2 is missing: the other two training devices' and 3, 4 train in every round
    assert run.result["samples"] == 4 * sum(7 + 3 * d for d in range(5)) - 10
    assert run.strategy.progress.pending == []


def test_late_gradients_are_applied_once(tmp_path: Path) -> None:
    """A reply that is lost on its way is asked for again, and counts once: as many gradients as records."""
    counted = []

    def lose(number: int, message: Message, reply: Message) -> Message | None:
        if number == 2 and node_of(message) == 1:
            return None
        if message.metadata.message_type == "train" and reply.has_content():
            counted.append(int(upload_of(reply).gradients.records.sum()))
        return reply

    run = train(tmp_path, lose)
    assert run.result is not None and sum(counted) == run.result["samples"]


def test_gradients_too_late_are_dropped(tmp_path: Path) -> None:
    def never_again(number: int, message: Message, reply: Message) -> Message | None:
        return None if number >= 2 and node_of(message) == 1 else reply

    run = train(tmp_path, never_again, run={"rounds": 6}, protocol={"max-staleness": 1})
    assert run.result is not None and run.result["rounds"] == 6
    assert run.strategy.progress.pending == []


def sums_of_node_1(folder: Path, exponent: float, lost: range, protocol: dict[str, Any]) -> list[tuple[int, Any]]:
    """Return node 1's (record counts, sums) in all backward halves; some of its answers fail."""
    heard: list[tuple[int, Any]] = []
    asked = []

    def loses(number: int, message: Message, reply: Message) -> Message | None:
        if message.metadata.message_type == "train" and node_of(message) == 1:
            asked.append(number)
            if len(asked) in lost:  # a node that is silent would not be asked again before it has registered
                return Message(Error(2, "lost"), reply_to=message)
            if len(sums := upload_of(reply).gradients.sums):
                heard.append((int(upload_of(reply).gradients.records.sum()), sums[0]))
        return reply

    train(folder, loses, protocol={"max-staleness": 2, "staleness-weight": exponent, **protocol})
    return heard


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("lost", "place", "late"),
    [(range(2, 3), 0, 1), (range(2, 4), 0, 2), (range(4, 5), 2, 1)],
    ids=["one", "two", "in the last round"],
)
def test_gradients_that_come_late_count_less(lost: range, place: int, late: int, dtype: str, tmp_path: Path) -> None:
    """Until they come, everything is the same: the sum is (1 + s)^-a of what it would be, the count is not."""
    found = [sums_of_node_1(tmp_path / str(a), a, lost, {"dtype": dtype})[: place + 1] for a in (0.0, 0.5, 2.0)]
    (count, whole), others = found[0][place], [f[place] for f in found[1:]]
    assert count == 10 and np.abs(whole).max() > 0.1
    for a, (records, sums) in zip((0.5, 2.0), others, strict=True):
        assert records == count
        np.testing.assert_allclose(
            sums, (1 + late) ** -a * whole, rtol=1e-5, atol=(1e-6, 2e-3)[dtype == "float16"] * np.abs(whole).max()
        )
    for plain, weighed in zip(found[0][:place], found[1][:place], strict=True):
        assert np.array_equal(plain[1], weighed[1])  # those that are in time


def test_synchronous_weighs_the_late_part_of_a_sum_alone(tmp_path: Path) -> None:
    """The fourth answer is lost, round 2's backward half: it comes with round 3's. g3 + g2 / 2^a, so differences
    halve from one a to the next."""
    found = [sums_of_node_1(tmp_path / str(a), a, range(4, 5), {"mode": "synchronous"}) for a in (0.0, 1.0, 2.0)]
    assert [records for records, _ in found[0]] == [10, 20, 10]
    none, one, two = (f[1][1] for f in found)
    assert np.abs(one - two).max() > 0.01
    np.testing.assert_allclose(none - one, 2 * (one - two), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["synchronous", "pipelined"])
def test_a_straggler_in_the_last_round_does_not_end_the_run(mode: str, tmp_path: Path) -> None:
    def silent_at_the_end(number: int, message: Message, reply: Message) -> Message | None:
        return None if number == 4 and node_of(message) == 1 else reply

    run = train(tmp_path, silent_at_the_end, protocol={"mode": mode})
    assert run.result is not None and run.result["test_accuracy"] is not None


def test_too_few_answers_end_the_run_after_a_checkpoint(tmp_path: Path) -> None:
    def all_but_one_fall_silent(number: int, message: Message, reply: Message) -> Message | None:
        return reply if number < 3 or node_of(message) == 0 else None

    with pytest.raises(RunError, match=r"round 3: 1 of 5 nodes answered, protocol\.min-nodes is 2"):
        train(tmp_path, all_but_one_fall_silent, protocol={"min-nodes": 2})
    assert trained(tmp_path / "run")


def test_more_nodes_needed_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"5 nodes are connected, protocol\.min-nodes is 6"):
        train(tmp_path, kept, protocol={"min-nodes": 6})


@pytest.mark.parametrize("reason", ["", " \n ", "boom"])
def test_an_error_reply_leaves_the_node_out(reason: str, tmp_path: Path) -> None:
    def fails(number: int, message: Message, reply: Message) -> Message:
        return Message(Error(2, reason), reply_to=message) if number == 2 and node_of(message) == 1 else reply

    run = train(tmp_path, fails)
    assert run.result is not None and run.result["rounds"] == 4


def upload_of(reply: Message) -> wire.Upload:
    return wire.Upload.from_bytes(from_record(reply.content), parameters=130)


def release_of(reply: Message) -> wire.Release:
    return upload_of(reply).release


def replaced(reply: Message, payload: bytes) -> Message:
    """Return the reply with another payload."""
    reply.content = to_record(payload)
    return reply


def changed(reply: Message, **fields: Any) -> Message:
    """Return the reply with some of its upload's fields changed."""
    return replaced(reply, wire.Upload(**{**vars(upload_of(reply)), **fields}).to_bytes())


def garbage(reply: Message, size: int = 7) -> Message:
    return replaced(reply, (b"garbage" * size)[:size])


def empty(reply: Message) -> Message:
    reply.content = RecordDict()
    return reply


def lying_release(reply: Message, **fields: Any) -> Message:
    return changed(reply, release=wire.Release(**{**vars(release_of(reply)), **fields}))


def kept_of(release: wire.Release) -> Kept:
    return Kept(release.counts, release.bitmap, release.values(), release.width)


def fewer_records(reply: Message, refused: list[list[int]]) -> Message:
    """Return the reply with the last of its device's ten records left out of the release."""
    release = release_of(reply)
    kept = kept_of(release).take(np.arange(10) < 9)
    shorter = wire.Release.pack(unguarded(kept, "test"), release.devices, np.array([9]), release.targets[:9], "float32")
    return changed(reply, release=shorter, refused=np.array(refused, dtype=np.int64).reshape(-1, 3))


def twice_the_records(reply: Message) -> Message:
    release = release_of(reply)
    kept = Kept.join([kept_of(release)] * 2, release.width)
    targets = np.concatenate([release.targets] * 2)
    return changed(
        reply, release=wire.Release.pack(unguarded(kept, "test"), release.devices, np.array([20]), targets, "float32")
    )


LIES: dict[str, tuple[Callable[[Message], Message], str]] = {
    "another node's device": (
        lambda r: lying_release(r, devices=np.array([4])),
        "devices must be those that were asked",
    ),
    "a class that does not exist": (
        lambda r: lying_release(r, targets=np.full(10, 3)),
        "targets must be classes in 0..2",
    ),
    "float targets": (
        lambda r: lying_release(r, targets=np.zeros(10, np.float32)),
        "targets must be classes in 0..2",
    ),
    "a device that failed and did not": (
        lambda r: changed(r, failed=np.array([1])),
        "devices must be those that were asked",
    ),
    "more records in the gradient": (
        lambda r: changed(r, gradients=wire.Gradients(np.array([-1]), np.array([1000]), np.ones((1, 130)))),
        "gradient records must be those of the pending chunks",
    ),
    "a gradient that was not asked for": (
        lambda r: changed(r, gradients=wire.Gradients(np.array([1, 2]), np.array([10, 10]), np.ones((2, 130)))),
        "gradient records must be those of the pending chunks",
    ),
    "fewer records without a refusal": (
        lambda r: fewer_records(r, []),
        "records: device 1 released 9, asked 10",
    ),
    "fewer records and another device's refusal": (
        lambda r: fewer_records(r, [[2, Reason.EQUATIONS, 1]]),
        "records: device 1 released 9, asked 10",
    ),
    "more records than were asked for": (
        twice_the_records,
        "records: device 1 released 20, asked 10",
    ),
    "a negative ledger": (
        lambda r: changed(r, ledger=wire.Ledger(*[-1.0] * 8)),
        "ledger must not be negative",
    ),
    "an upload sent again": (
        lambda r: changed(r, nonce=upload_of(r).nonce ^ 1),
        "nonce must be that of the message: this upload answers another one",
    ),
    "no upload": (
        garbage,
        "magic must be b'fs': not a fedsplit message",
    ),
    "an upload of a version that this server does not know": (
        lambda r: replaced(r, b"fs\x01" + from_record(r.content)[3:]),
        "version must be 2, got 1",
    ),
    "more than any answer": (
        lambda r: garbage(r, 5_000_000),
        r"size must be at most \d{4,5} bytes, got 5000000",
    ),
    "no payload": (
        empty,
        "message must hold one packed array under 'fedsplit'",
    ),
}


@pytest.fixture(scope="module")
def without_node_1_in_round_2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return what a run ends with in which node 1 is silent in round 2."""

    def silent(number: int, message: Message, reply: Message) -> Message | None:
        return None if number == 2 and node_of(message) == 1 else reply

    folder = tmp_path_factory.mktemp("silent")
    train(folder, silent)
    return trained(folder / "run")


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_node_is_left_out(
    lie: str,
    without_node_1_in_round_2: dict[str, torch.Tensor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tell, refusal = LIES[lie]
    run = train(tmp_path, in_round_2_of_node_1(tell))
    (told,) = re.findall("node .* is left out.*", caplog.text)
    assert re.fullmatch(rf"node 3 \(devices 1\) is left out: {refusal} \(offence 1\)", told)
    assert "quarantined" not in caplog.text
    found = trained(tmp_path / "run")
    assert moved(run.settings, found) > 1e-3
    assert largest_difference(found, without_node_1_in_round_2) == 0.0


def test_what_a_node_said_before_is_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its upload of the last round, byte by byte: neither the records nor the gradients count twice."""
    payloads = []

    def again(number: int, message: Message, reply: Message) -> Message:
        if node_of(message) == 1 and message.metadata.message_type == "train":
            payloads.append(from_record(reply.content))
            return replaced(reply, payloads[-2]) if number == 3 else reply
        return reply

    run = train(tmp_path, again)
    (told,) = re.findall("node .* is left out.*", caplog.text)
    assert told.startswith("node 3 (devices 1) is left out: nonce must be that of the message")
    assert run.result is not None and run.result["samples"] == 4 * sum(7 + 3 * d for d in range(5)) - 10


def test_every_message_has_a_nonce_of_its_own(tmp_path: Path) -> None:
    nonces = []

    def note(number: int, message: Message, reply: Message) -> Message:
        if number:
            nonces.append(wire.Download.from_bytes(from_record(message.content), parameters=130).nonce)
            assert upload_of(reply).nonce == nonces[-1]
        return reply

    train(tmp_path, note)
    assert len(set(nonces)) == len(nonces) > 20


# --- who is asked ----------------------------------------------------------------------------------------------


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


# --- refusals and ledgers --------------------------------------------------------------------------------------


def test_a_device_may_refuse_records_and_the_run_counts_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    refusal = [[1, Reason.EQUATIONS, 1]]
    run = train(tmp_path, in_round_2_of_node_1(lambda r: fewer_records(r, refusal)), first_layer={"strategy": "frozen"})
    assert "left out" not in caplog.text
    assert run.result is not None
    assert run.result["samples"] == 4 * sum(7 + 3 * d for d in range(5)) - 1
    assert run.result["guard"]["refused"]["equations"] > 0


def test_all_of_a_devices_records_may_be_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refuses(reply: Message) -> Message:
        release = release_of(reply)
        kept = Kept.join([], release.width)
        nothing = wire.Release.pack(
            unguarded(kept, "test"), np.zeros(0, int), np.zeros(0, int), np.zeros(0, int), "float32"
        )
        return changed(reply, release=nothing, refused=np.array([[1, 99, 10]]))

    run = train(tmp_path, in_round_2_of_node_1(refuses), first_layer={"strategy": "frozen"})
    assert "left out" not in caplog.text
    assert run.result is not None
    assert run.result["samples"] == 4 * sum(7 + 3 * d for d in range(5)) - 10
    assert run.result["guard"]["refused"]["reason 99"] == 10  # of a later version, perhaps


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """Balle and Wang 2018, theorem 5, for a sensitivity of 1."""

    def below(x: float) -> float:
        return math.erfc(-x / 2**0.5) / 2

    return below(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * below(-0.5 / sigma - epsilon * sigma)


def test_the_result_tells_the_most_that_any_node_says_has_left(tmp_path: Path) -> None:
    said = wire.Ledger(3.0, 5.0, 77.0, 1e9, 0.5, 1.0, 0.125, 0.75)
    lies, noise = in_round_2_of_node_1(lambda r: changed(r, ledger=said)), {"clip": 1.0, "noise": 9.0}
    run = train(tmp_path, lies, dropping=noise, first_layer={"strategy": "frozen"})  # gradients would have no epsilon
    assert run.result is not None
    ledger = run.result["ledger"]
    assert (ledger["releases"], ledger["equations"], ledger["bits"]) == (5, 77, 10**9)
    assert (ledger["gradient_leverage"], ledger["leverage"]) == (0.5, 0.75)
    assert gaussian_delta(ledger["epsilon"], sigma=1.0) == pytest.approx(1e-5, rel=0.02)  # precision 1
    assert ledger["dfil"] == pytest.approx(0.125)
    assert run.result["exposures_max"] == 4  # of the other nodes


@pytest.mark.parametrize("bad", [np.inf, np.nan, 1e12])
def test_a_ledger_without_bounds_does_not_end_the_run(bad: float, tmp_path: Path) -> None:
    lies = in_round_2_of_node_1(lambda r: changed(r, ledger=wire.Ledger(*[bad] * 8)))
    run = train(tmp_path, lies, dropping={"clip": 1.0, "noise": 9.0})  # so that no other node's is infinite
    assert run.result is not None and run.result["rounds"] == 4


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
