"""What happens when nodes lie."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty_nodes import (
    changed,
    fewer_records,
    garbage,
    in_round_2_of_node_1,
    kept_of,
    node_of,
    release_of,
    replaced,
    train,
    upload_of,
)
from flwr.app import Message, RecordDict
from references import largest_difference, moved, trained

from fedsplit.flower.record import from_record
from fedsplit.release.admitted import unguarded
from fedsplit.release.kept import Kept
from fedsplit.wire import exchange as wire
from fedsplit.wire.ledger import Reason

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]  # whole runs


def empty(reply: Message) -> Message:
    reply.content = RecordDict()
    return reply


def lying_release(reply: Message, **fields: Any) -> Message:
    return changed(reply, release=wire.Release(**{**vars(release_of(reply)), **fields}))


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
