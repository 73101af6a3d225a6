"""What happens when nodes do not answer, or answer late."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_nodes import kept, node_of, train, upload_of
from flwr.app import Error, Message
from references import trained

from fedsplit.common.errors import RunError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]  # whole runs


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
