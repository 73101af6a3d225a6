"""The guard over several releases: records that share segments, leverage that adds up, and observing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from proposals import LAYER, OWNER, WIDTH, Guards, N, dense, first, flat, held, outputs, release

from fedsplit.common.errors import StateError
from fedsplit.guard.accountant import ExposureAccountant
from fedsplit.guard.guard import Guard
from fedsplit.guard.limits import Limits
from fedsplit.guard.proposal import Proposal
from fedsplit.wire.ledger import Reason

# --- records that share segments -----------------------------------------------------------------------------------


def test_windows_that_overlap_leave_one_by_one(guards: Guards) -> None:
    """Each shares a segment with the next: every other one may leave, not none of them."""
    segments = np.arange(5)[:, None] + [0, 1]
    assert guards().admit(release(first(5, 1), segments=segments)).tolist() == [0, 3, 0, 3, 0]
    assert held(guards) == {i: (1, 1) for i in range(6)}
    again = release(first(5, 1), flat(dense(1)), segments=segments)
    assert guards().admit(again).tolist() == [Reason.RELEASES] * 5


def test_a_refused_window_does_not_stand_in_the_others_way(guards: Guards) -> None:
    segments = np.arange(3)[:, None] + [0, 1]
    kept = outputs(9, 1, 1)
    assert guards().admit(release(kept, segments=segments)).tolist() == [Reason.EQUATIONS, 0, Reason.RELEASES]
    assert held(guards) == {1: (1, 1), 2: (1, 1)}


def test_a_window_that_left_before_is_not_charged_beside_its_neighbour(guards: Guards) -> None:
    """With one bit, of which there is no leverage to know."""
    asks = [
        release(first(len(r), 1), records=r, segments=np.array(r)[:, None] + [0, 1], one_bit=True)
        for r in ([0], [0, 1], [0, 1, 2])
    ]
    for ask in asks:
        assert guards(releases=2).admit(ask).tolist() == [0] * len(ask.records)
    assert held(guards) == {0: (1, 0), 1: (2, 0), 2: (2, 0), 3: (1, 0)}


def test_equations_of_windows_add_up_on_what_they_share(guards: Guards) -> None:
    segments = np.arange(4)[:, None] + [0, 1]
    guard = guards(releases=9, enforce=False)
    assert guard.admit(release(first(4, 2), segments=segments)).tolist() == [0, Reason.EQUATIONS, 0, Reason.EQUATIONS]


def test_what_overlapping_windows_tell_together_is_not_known(guards: Guards) -> None:
    """Segments do not say which numbers they share: one release of each is all, in one chunk and in two."""
    segments = np.arange(3)[:, None] + [0, 1]
    ask = release(first(3, 1), segments=segments)
    assert guards(releases=9).admit(ask.take(np.array([0, 1]))).tolist() == [0, Reason.RELEASES]
    assert guards(releases=9).admit(ask).tolist() == [0, Reason.RELEASES, 0]
    other = release(first(3, 1), flat(dense(1)), segments=segments)
    assert guards(releases=9).admit(other).tolist() == [0, Reason.RELEASES, 0]  # more of the same windows is known


# --- several releases ----------------------------------------------------------------------------------------------


def pair(first_row: list[float], second_row: list[float]) -> list[np.ndarray]:
    """Weights of two rounds; only their first row is sent."""
    found = []
    for row in (first_row, second_row):
        rows = dense()
        rows[0] = [*row, *[0] * (N - len(row))]
        found.append(flat(rows))
    return found


def test_leverage_is_that_of_all_releases_together(guards: Guards) -> None:
    """Each row tells of half of two numbers: together x + y and x - y tell both, x + y and z + u do not."""
    sum_, difference = pair([1, 1], [1, -1])
    _, others = pair([1, 1], [0, 0, 1, 1])
    guard = guards(releases=2)
    assert guard.admit(release(first(2, 1), sum_)).tolist() == [0, 0]
    assert guards().accountant.most().leverage == pytest.approx(0.5)
    asks = [release(first(1, 1), others, records=[0]), release(first(1, 1), difference, records=[1])]
    assert [int(guards(releases=2).admit(ask)[0]) for ask in asks] == [0, Reason.LEVERAGE]
    assert held(guards) == {0: (2, 2), 1: (1, 1)}
    assert guards().accountant.most().leverage == pytest.approx(0.5)


def test_masks_of_one_round_are_added_to_those_of_another(guards: Guards) -> None:
    """Also under equal weights, and in chunks of one name: two rows of two numbers tell both."""
    rows = dense()
    rows[:2] = 0
    rows[0, :2], rows[1, :2] = [1, 1], [1, -1]
    masks = first(2, 1), first(2, 2) & ~first(2, 1)
    for records in ([0], [1]):  # one release in two chunks
        ask = release(masks[0][:1], flat(rows), records=records, mask_round=1)
        assert guards(releases=2).admit(ask).tolist() == [0]
    ask = release(masks[1], flat(rows), mask_round=2)
    assert guards(releases=2).admit(ask).tolist() == [Reason.LEVERAGE] * 2


def test_patterns_that_were_not_kept_count_as_if_they_told_everything(guards: Guards) -> None:
    """Where the owner allows more releases than when the first one left, or a file has gone."""
    guards().admit(release(first(1, 1), records=[0]))
    guards(releases=2).admit(release(first(1, 1), records=[1]))
    lost = release(first(1, 1), records=[2], mask_round=1)
    guards(releases=2).admit(lost)
    (guards().accountant.path.with_suffix(".history") / f"{lost.name.hex()}.npz").unlink()
    again = release(first(4, 1), flat(dense(1)))
    assert guards(releases=2).admit(again).tolist() == [Reason.RELEASES, 0, Reason.RELEASES, 0]


def test_damaged_patterns_are_refused(guards: Guards) -> None:
    guards(releases=2).admit(release(first(1, 1)))
    (path,) = guards().accountant.path.with_suffix(".history").iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    before = guards().accountant.path.read_bytes()
    with pytest.raises(StateError, match="damaged: what has left cannot be known"):
        guards(releases=2).admit(release(first(1, 1), flat(dense(1))))
    assert guards().accountant.path.read_bytes() == before


def test_of_two_exchanges_at_once_the_second_is_refused(guards: Guards) -> None:
    """Or both would let the same record leave for its only time, under masks of their own."""
    one, other = guards(), guards()
    assert one.admit(release(first(1, 1), mask_round=1)).tolist() == [0]
    with pytest.raises(StateError, match="changed by another process"):
        other.admit(release(first(1, 1), mask_round=2))
    assert held(guards) == {0: (1, 1)}


def test_nothing_leaves_that_was_not_written_down(guards: Guards, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ExposureAccountant, "save", fails)
    with pytest.raises(OSError, match="No space"):
        guards().admit(release(first(1, 1)))


# --- observing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        release(first(4, 2)),
        release(outputs(2, 5, 1, 9), owners=[0, 0, 1, 1]),
        release(first(4, 1), owners=[0, 0, 1, 1], active=[1, 1, 0.5, 0.5]),
        release(first(5, 1), segments=np.arange(5)[:, None] + [0, 1]),
        release(first(2, 1), flat(dense() * np.array([1e5] + [1] * 9)[:, None])),
        release(first(2, 1), flat(dense(1)), records=[100, 0]),
        release(first(2, 1), records=[100, 0], round_number=1),
    ],
    ids=["fits", "equations", "activity", "overlap", "giant", "releases", "replay"],
)
def test_observing_reports_what_enforcing_refuses(ask: Proposal, tmp_path: Path) -> None:
    codes = {}
    for enforce in (False, True):
        path = tmp_path / f"{enforce}.npz"
        ExposureAccountant.create(path, OWNER)
        guard = Guard(Limits(), ExposureAccountant(path, OWNER), LAYER, enforce=enforce)
        guard.admit(release(first(1, 1), records=[100]))
        codes[enforce] = guard.admit(ask).tolist()
        counted = {n for n, _ in ExposureAccountant(path, OWNER).rows()} - {100}
        leaves = [i for i, code in enumerate(codes[enforce]) if not (enforce and code)]
        assert counted == set(ask.segments[leaves].ravel().tolist()) - {100}
        assert enforce or guard.accountant.refused == 0
    assert codes[False] == codes[True]


def test_observing_caps_nothing_and_computes_no_leverage(guards: Guards) -> None:
    for number in range(3):
        ask = release(first(2, 9), flat(np.eye(WIDTH, N)), mask_round=number)
        assert set(guards(enforce=False, refusals=0).admit(ask).tolist()) <= {Reason.EQUATIONS, Reason.RELEASES}
    assert held(guards) == {0: (3, 27), 1: (3, 27)}
    assert np.isnan(guards().accountant.most().leverage)
