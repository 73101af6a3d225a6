"""The guard: each rule by itself, and what refusals tell."""

import numpy as np
import pytest
from proposals import WIDTH, Guards, N, dense, first, flat, held, outputs, release
from torch import nn

from fedsplit.model.layer import FirstLayer
from fedsplit.wire.ledger import Reason

# --- releases, rule by rule ----------------------------------------------------------------------------------------


def kept_by(activation: nn.Module) -> FirstLayer:
    return FirstLayer(nn.Linear(N, WIDTH), activation, (N,))


def test_what_the_limits_allow_leaves_and_is_written_down(guards: Guards) -> None:
    assert guards().admit(release(first(3, 2), owners=[0, 0, 4])).tolist() == [0, 0, 0]
    assert held(guards) == {0: (1, 2), 1: (1, 2), 4 << 32 | 2: (1, 2)}
    assert guards().accountant.most().leverage == pytest.approx(0.35, abs=0.3)


@pytest.mark.parametrize("times", [2e3, 1e5, 1e7, 1e12])
def test_one_giant_row_is_fishing(times: float, guards: Guards) -> None:
    """However giant: the others must not pass for dead."""
    rows = dense()
    rows[3] *= times
    assert guards().admit(release(first(2, 2), flat(rows))).tolist() == [Reason.WEIGHTS] * 2
    assert held(guards) == {}


@pytest.mark.parametrize("dead", [0.0, 1e-9])
def test_dead_rows_do_not_make_giants_of_the_others(dead: float, guards: Guards) -> None:
    rows = dense()
    rows[3:] *= dead
    assert guards().admit(release(first(2, 2), flat(rows))).tolist() == [0, 0]
    rows[0] *= 1e4
    assert guards().admit(release(first(2, 2), flat(rows), records=[5, 6])).tolist() == [Reason.WEIGHTS] * 2


def test_ordinary_spread_and_no_weights_at_all_are_no_fishing(guards: Guards) -> None:
    rows = dense()
    rows[3] *= 100
    assert guards().admit(release(first(1, 2), flat(rows))).tolist() == [0]
    assert guards().admit(release(first(1, 2), flat(0 * rows), records=[5])).tolist() == [0]


def test_outputs_that_are_nearly_all_active_are_fishing_device_by_device(guards: Guards) -> None:
    active = [0.95, 0.95, 0.85, 0.99, 0.5]
    codes = guards().admit(release(first(5, 2), owners=[0, 0, 1, 2, 2], active=active))
    assert codes.tolist() == [Reason.WEIGHTS, Reason.WEIGHTS, 0, 0, 0]
    assert len(held(guards)) == 3


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Identity(), nn.LeakyReLU()])
def test_giants_and_activity_are_looked_at_for_relu_only(activation: nn.Module, guards: Guards) -> None:
    rows = dense()
    rows[3] *= 1e4
    guard = guards(layer=kept_by(activation))
    assert guard.admit(release(first(2, 2), flat(rows), active=1.0)).tolist() == [0, 0]


def test_bits_of_single_numbers_are_fishing(guards: Guards) -> None:
    """Their thresholds are no equations, and have no leverage: with a row for each number they are the record."""
    single = np.eye(WIDTH, N)
    every = first(2, WIDTH)
    assert guards().admit(release(every, flat(single, -0.5), one_bit=True)).tolist() == [Reason.WEIGHTS] * 2
    assert guards().admit(release(every, flat(1e-9 * single), one_bit=True)).tolist() == [Reason.WEIGHTS] * 2
    assert guards().admit(release(every, flat(dense()), one_bit=True)).tolist() == [0, 0]
    assert guards().accountant.most().leverage == 0


def test_rounds_do_not_go_back(guards: Guards) -> None:
    assert guards().admit(release(first(1, 1), records=[0], round_number=5)).tolist() == [0]
    old = release(first(1, 1), flat(dense(1)), records=[1], round_number=4)
    assert guards().admit(old).tolist() == [Reason.ORDER]
    assert held(guards) == {0: (1, 1)}
    for number, (run, round_number) in enumerate([(1, 5), (1, 6), (2, 1)]):  # a run counts its own rounds
        ask = release(first(1, 1), records=[2 + number], round_number=round_number, run=run)
        assert guards().admit(ask).tolist() == [0]


def test_a_refused_round_does_not_advance(guards: Guards) -> None:
    assert guards().admit(release(first(1, WIDTH), round_number=9)).tolist() == [Reason.EQUATIONS]
    assert guards().admit(release(first(1, 1), round_number=2)).tolist() == [0]


def test_new_weights_or_new_masks_are_a_new_release(guards: Guards) -> None:
    assert guards().admit(release(first(2, 1))).tolist() == [0, 0]
    assert guards().admit(release(first(3, 1), flat(dense(1)))).tolist() == [Reason.RELEASES, Reason.RELEASES, 0]
    assert guards().admit(release(first(3, 1), mask_round=2)).tolist() == [Reason.RELEASES] * 3
    assert held(guards) == {0: (1, 1), 1: (1, 1), 2: (1, 1)}


def test_the_same_again_is_nothing_new(guards: Guards) -> None:
    """Under whatever round and run, and though others of the chunk are new: it is the same bytes."""
    guards().admit(release(first(2, 1), records=[0, 1], round_number=7))
    before = guards().accountant.path.read_bytes()
    assert guards().admit(release(first(2, 1), records=[0, 1], round_number=3, run=8)).tolist() == [0, 0]
    assert guards().accountant.path.read_bytes() == before
    assert guards().admit(release(first(3, 1), records=[1, 2, 0], round_number=8)).tolist() == [0, 0, 0]
    assert held(guards) == {0: (1, 1), 1: (1, 1), 2: (1, 1)}


def test_no_releases_means_none(guards: Guards) -> None:
    assert guards(releases=0).admit(release(first(2, 1))).tolist() == [Reason.RELEASES] * 2


def test_equations_add_up_over_releases(guards: Guards) -> None:
    """An eighth of 16 numbers is 2."""
    assert guards(releases=9).admit(release(outputs(2, 3))).tolist() == [0, Reason.EQUATIONS]
    assert held(guards) == {0: (1, 2)}
    again = release(first(3, 1), flat(dense(1)))
    assert guards(releases=9).admit(again).tolist() == [Reason.EQUATIONS, 0, 0]
    assert held(guards) == {0: (1, 2), 1: (1, 1), 2: (1, 1)}


def test_one_bit_is_no_equation(guards: Guards) -> None:
    assert guards().admit(release(first(2, WIDTH), one_bit=True)).tolist() == [0, 0]
    assert held(guards) == {0: (1, 0), 1: (1, 0)}


def test_a_single_number_has_leverage_1(guards: Guards) -> None:
    rows = dense()
    rows[0] = np.eye(N)[5]
    kept = np.stack([first(1, 1)[0], first(1, 2)[0] & ~first(1, 1)[0]])  # the first has the row, the second has not
    assert guards().admit(release(kept, flat(rows))).tolist() == [Reason.LEVERAGE, 0]
    assert list(held(guards)) == [1]


def test_a_leverage_of_1_is_refused_whatever_rounding_makes_of_it(guards: Guards) -> None:
    """The limit 1 allows all but determined numbers; three rows of three numbers determine them."""
    guard = guards(leverage=1.0, equations=1.0)
    for seed in range(40):
        rows = dense(seed)
        rows[:3, 3:] = 0
        kept = np.concatenate([first(1, 3), first(1, 2)])
        codes = guard.admit(release(kept, flat(rows), records=[2 * seed, 2 * seed + 1]))
        assert codes.tolist() == [Reason.LEVERAGE, 0]


def test_epsilon_adds_up_over_releases(guards: Guards) -> None:
    """Of one release with noise 2 it is 4.38 at delta 1e-5, of two 6.59."""
    asks = [release(first(1, 1), flat(dense(i)), noise=2.0) for i in range(3)]
    assert guards(releases=9, epsilon=4.3).admit(asks[0]).tolist() == [Reason.EPSILON]
    assert guards(releases=9, epsilon=4.4).admit(asks[0]).tolist() == [0]
    assert guards(releases=9, epsilon=6.5).admit(asks[1]).tolist() == [Reason.EPSILON]
    assert guards(releases=9, epsilon=6.6).admit(asks[1]).tolist() == [0]
    assert guards(releases=9, epsilon=1e6).admit(release(first(1, 1), flat(dense(3)))).tolist() == [Reason.EPSILON]
    assert guards().accountant.most().precision == 2.0


def test_what_is_refused_is_not_charged(guards: Guards) -> None:
    ask = release(outputs(2, 5, 1, 9), owners=[0, 0, 1, 1])
    assert guards().admit(ask).tolist() == [0, Reason.EQUATIONS, 0, Reason.EQUATIONS]
    assert held(guards) == {0: (1, 2), 1 << 32 | 2: (1, 1)}
    assert guards().accountant.exposures() == 1
    assert guards().admit(release(first(4, 1), flat(dense(1)), owners=[0, 0, 1, 1])).tolist() == [3, 0, 3, 0]


def test_an_empty_chunk_and_a_refused_one_leave_the_ledger_as_it_is(guards: Guards) -> None:
    before = guards().accountant.path.read_bytes()
    assert guards().admit(release(first(0, 1))).tolist() == []
    assert guards(releases=0).admit(release(first(5, 1))).tolist() == [Reason.RELEASES] * 5
    assert guards().accountant.path.read_bytes() == before


# --- what refusals tell --------------------------------------------------------------------------------------------


def test_after_too_many_refusals_nothing_leaves(guards: Guards) -> None:
    for record in range(2):
        assert guards(refusals=2).admit(release(first(1, 9), records=[record])).tolist() == [Reason.EQUATIONS]
    assert guards(refusals=2).admit(release(outputs(9, 1), records=[2, 5])).tolist() == [Reason.CAPPED] * 2
    assert guards(refusals=2).admit(release(first(2, 1), records=[3, 4])).tolist() == [Reason.CAPPED] * 2
    assert guards().admit(release(first(1, 1), records=[3])).tolist() == [0]  # the shipped limit is 100
    assert guards(refusals=2).admit(release(first(2, 1), records=[3, 4])).tolist() == [0, Reason.CAPPED]


@pytest.mark.parametrize("telling", ["activity", "equations", "leverage"])
def test_new_runs_do_not_bring_new_refusals(telling: str, guards: Guards) -> None:
    """The server names the runs, and each refusal is a bit of what it asked about the record."""
    rows = np.eye(WIDTH, N) if telling == "leverage" else dense()
    kept, active = first(2, 9 if telling == "equations" else 1), 1.0 if telling == "activity" else 0.5
    for run in range(2):
        codes = guards(refusals=5).admit(release(kept, flat(rows * 2.0**run), active=active, run=run))
        assert set(codes.tolist()) <= {Reason.WEIGHTS, Reason.EQUATIONS, Reason.LEVERAGE} and codes.all()
    codes = guards(refusals=5).admit(release(kept, flat(rows / 2), active=active, run=77))
    assert codes.tolist() == [Reason.CAPPED] * 2


def test_refusals_that_do_not_look_at_records_do_not_count(guards: Guards) -> None:
    """Or a single message with odd weights would silence a node for good."""
    giant = dense()
    giant[0] *= 1e5
    guards().admit(release(first(4, 1), round_number=9))
    for _ in range(3):
        assert set(guards(refusals=0).admit(release(first(4, 1), flat(giant))).tolist()) == {Reason.WEIGHTS}
        assert set(guards(refusals=0).admit(release(first(4, 1), flat(dense(1)))).tolist()) == {Reason.ORDER}
        again = release(first(4, 1), flat(dense(1)), round_number=9)
        assert set(guards(refusals=0).admit(again).tolist()) == {Reason.RELEASES}
        noisy = release(first(4, 1), flat(dense(1)), records=range(4, 8), round_number=9)
        assert set(guards(refusals=0, epsilon=1.0).admit(noisy).tolist()) == {Reason.EPSILON}
    assert guards(refusals=0).admit(release(first(1, 1), records=[9], round_number=9)).tolist() == [0]


def test_the_same_refusal_again_does_not_count(guards: Guards) -> None:
    """A frozen layer asks the same in every round."""
    for _ in range(5):
        assert guards(refusals=1).admit(release(outputs(9, 1))).tolist() == [Reason.EQUATIONS, 0]
    assert guards().accountant.refused == 1
    assert (
        guards(refusals=1).admit(release(outputs(9, 1), flat(dense(1)), records=[0, 7])).tolist() == [Reason.CAPPED] * 2
    )


def test_a_record_that_has_left_answers_no_questions(guards: Guards) -> None:
    """Weights that are active where a number is above a threshold would read it, bit by bit, from the reasons."""
    assert guards().admit(release(first(2, 1), owners=[0, 1])).tolist() == [0, 0]
    for active, kept in ((0.0, 0), (1.0, 1), (1.0, WIDTH)):
        question = release(first(2, kept), flat(np.tile(np.eye(N)[3], (WIDTH, 1)), -0.5), owners=[0, 1], active=active)
        assert guards().admit(question).tolist() == [Reason.RELEASES] * 2
    assert guards().accountant.refused == 0


def test_a_record_that_has_left_does_not_answer_through_another(guards: Guards) -> None:
    """Activity is that of the records that could leave, not of those beside them on the device."""
    assert guards().admit(release(first(3, 1), records=[0, 1, 2])).tolist() == [0, 0, 0]
    ask = release(first(4, 1), flat(dense(1)), active=[1.0, 1.0, 1.0, 0.7])
    assert guards().admit(ask).tolist() == [*[Reason.RELEASES] * 3, 0]
