"""Records that devices refuse, and ledgers: what a run and its result tell of them."""

import math
from pathlib import Path

import numpy as np
import pytest
from faulty_nodes import changed, fewer_records, in_round_2_of_node_1, release_of, train
from flwr.app import Message

from fedsplit.release.admitted import unguarded
from fedsplit.release.kept import Kept
from fedsplit.wire import exchange as wire
from fedsplit.wire.ledger import Reason

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]  # whole runs


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
