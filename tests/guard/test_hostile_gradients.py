"""The guard through the real ClientApp, with a server that sends what gradients it likes."""

import numpy as np
import pytest
from hostile_server import Start, all_of, only_refusals, private
from proposals import WIDTH, N, dense, flat

from fedsplit.wire.ledger import Reason

LOOSE = "gradients = true\nleverage = 1.0"


def test_gradients_are_refused_by_default(server: Start) -> None:
    hostile = server()
    asked = hostile.ask()
    upload = hostile.send(asked)
    assert upload is not None
    back = hostile.ask(2, rows=[], pending=[hostile.cut(upload, asked, np.ones((60, WIDTH)))])
    answer = hostile.send(back)
    only_refusals(answer, all_of(Reason.GRADIENTS))
    assert answer is not None and answer.lost.tolist() == [1]


@pytest.mark.parametrize("per_device", [False, True])
def test_one_hot_cut_gradients_bring_refusals(per_device: bool, server: Start) -> None:
    hostile = server(LOOSE)
    asked = hostile.ask()
    upload = hostile.send(asked)
    assert upload is not None
    one_hot = np.zeros((60, WIDTH))
    one_hot[7] = 1
    back = hostile.ask(2, rows=[], pending=[hostile.cut(upload, asked, one_hot)], per_device=per_device)
    answer = hostile.send(back)
    only_refusals(answer, all_of(Reason.GRADIENTS))
    assert answer is not None and answer.lost.tolist() == [1] and answer.ledger.gradient == 0


def test_cut_gradients_that_cancel_but_for_one_record_bring_refusals(server: Start) -> None:
    """Twice the same chunk: first a, then -a + e_7. Together, or subtracted, they are record 7."""
    hostile = server(LOOSE + "\ngradient-share = 1.0\ngradient-leverage = 0.6")
    asked = hostile.ask()
    upload = hostile.send(asked)
    assert upload is not None
    spread = np.ones((60, WIDTH))
    other = -spread
    other[7] += 0.5
    cuts = [hostile.cut(upload, asked, deltas) for deltas in (spread, other)]
    answers = [hostile.send(hostile.ask(2, rows=[], pending=[cut])) for cut in cuts]
    sums = [answer.gradients.sums for answer in answers if answer is not None and len(answer.gradients.sums)]
    assert len(sums) == 1  # the first alone
    pattern = np.unpackbits(upload.release.bitmap, axis=1, count=WIDTH, bitorder="little")
    x = np.concatenate([private(d, 3).train.x for d in range(3)])
    np.testing.assert_allclose(sums[0][0], np.concatenate([(pattern.T @ x).ravel(), pattern.sum(axis=0)]), rtol=1e-4)
    refused = [r for answer in answers if answer is not None for r in answer.refused.tolist()]
    assert sorted(refused) == [[d, Reason.GRADIENTS, 20] for d in range(3)]


def test_two_cut_gradients_for_one_chunk_in_a_message_are_refused(server: Start) -> None:
    hostile = server(LOOSE)
    asked = hostile.ask()
    upload = hostile.send(asked)
    assert upload is not None
    cut = hostile.cut(upload, asked, np.ones((60, WIDTH)))
    assert hostile.send(hostile.ask(2, rows=[], pending=[cut, cut]), honest=False) is None


def test_a_chunk_asked_for_again_without_one_record_gives_no_difference(server: Start) -> None:
    hostile = server(LOOSE + "\ngradient-share = 1.0\ngradient-leverage = 0.6")
    answers = []
    for round_number, rows in ((1, [(0, 0, 0, 20), (1, 0, 0, 20)]), (1, [(0, 0, 0, 20), (1, 0, 0, 19)])):
        asked = hostile.ask(round_number, rows=rows)
        upload = hostile.send(asked)
        assert upload is not None
        cut = hostile.cut(upload, asked, np.ones((sum(r[3] for r in rows), WIDTH)))
        answers.append(hostile.send(hostile.ask(2, rows=[], pending=[cut])))
    assert answers[0] is not None and answers[1] is not None
    assert len(answers[0].gradients.sums) == 1 and len(answers[1].gradients.sums) == 0
    assert {r for _, r, _ in answers[1].refused.tolist()} == {Reason.GRADIENTS}


def test_after_a_partial_refusal_gradients_are_of_what_left(server: Start) -> None:
    """Records 0..9 of device 1 have left before: of the chunk only the others are pending."""
    hostile = server(LOOSE + "\ngradient-share = 1.0\ngradient-leverage = 1.0")
    hostile.send(hostile.ask(1, rows=[(1, 0, 0, 20)], weights=flat(dense(5))))
    asked = hostile.ask(2)
    upload = hostile.send(asked)
    assert upload is not None
    assert upload.release.devices.tolist() == [0, 2] and upload.refused.tolist() == [[1, Reason.RELEASES, 20]]
    answer = hostile.send(hostile.ask(3, rows=[], pending=[hostile.cut(upload, asked, np.ones((40, WIDTH)))]))
    assert answer is not None and answer.gradients.records.tolist() == [40]
    pattern = np.unpackbits(upload.release.bitmap, axis=1, count=WIDTH, bitorder="little")
    x = np.concatenate([private(d, 3).train.x for d in (0, 2)])
    np.testing.assert_allclose(answer.gradients.sums[0][: WIDTH * N], (pattern.T @ x).ravel(), rtol=1e-4, atol=1e-5)
