"""The accountant adds up what has left of each record."""

import math
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import FIELDS, Step, costs, histories, ledgers, name_of, new_ledger, play, windows

from fedsplit.guard.accountant import Cost, Spent


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_equations_are_never_fewer_than_the_rank_of_what_left(
    records: int, pieces: int, size: int, releases: int, seed: int
) -> None:
    """Of every record and of every segment, for random weights and patterns; some patterns leave twice."""
    rng, segments = np.random.default_rng(seed), windows(records, pieces)
    numbers = np.unique(segments)
    rows_sent: list[tuple[int, np.ndarray]] = []  # (record, an equation in the numbers of all segments)
    with new_ledger() as accountant:
        for number in rng.integers(0, 4, releases).tolist():
            own = np.random.default_rng([seed % 1000, number])  # the name decides weights and patterns
            weights, masks = own.normal(size=(5, pieces * size)), own.random((records, 5)) < 0.5
            rows = np.flatnonzero(rng.random(records) < 0.7)
            rows = rows[accountant.is_new(rows, name_of(number))]
            for record in rows.tolist():
                start = record * size
                for row in weights[masks[record]]:
                    equation = np.zeros(len(numbers) * size)
                    equation[start : start + pieces * size] = row
                    rows_sent.append((record, equation))
            cost = Cost.of(len(rows), equations=masks[rows].sum(axis=1))
            accountant.step(rows, segments[rows], name_of(number), cost)
        told = accountant.spent(segments).equations
        for record in range(records):
            mine = np.array([e for r, e in rows_sent if r == record]).reshape(-1, len(numbers) * size)
            assert told[record] >= np.linalg.matrix_rank(mine)
        for name, spent in accountant.rows():
            place = slice(*(np.searchsorted(numbers, name) * size + np.array([0, size])))
            covering = [e[place] for r, e in rows_sent if name in segments[r]]
            assert spent.equations >= np.linalg.matrix_rank(np.array(covering).reshape(-1, size))
            assert spent.equations == len(covering)  # each equation once for each of its segments


@settings(deadline=None, max_examples=30)
@given(histories(), st.randoms(use_true_random=False))
def test_the_order_of_releases_does_not_matter(history: tuple[np.ndarray, list[Step]], shuffle: random.Random) -> None:
    segments, steps = history
    steps = [(rows, number, cost) for number, (rows, _, cost) in enumerate(steps)]  # a name of its own for each
    shuffled = steps[:]
    shuffle.shuffle(shuffled)
    with new_ledger() as one, new_ledger() as other:
        play(one, segments, steps)
        play(other, segments, shuffled)
        assert ledgers(one) == ledgers(other)
        assert one.exposures() == other.exposures() == max([0, *np.bincount([r for s in steps for r in s[0]])])


@settings(deadline=None, max_examples=30)
@given(histories())
def test_sending_the_same_again_costs_nothing(history: tuple[np.ndarray, list[Step]]) -> None:
    segments, steps = history
    with new_ledger() as accountant:
        play(accountant, segments, steps)
        before, exposures = ledgers(accountant), accountant.exposures()
        for rows, name, _ in steps:
            assert not accountant.is_new(rows, name_of(name)).any()
        play(accountant, segments, steps)
        assert ledgers(accountant) == before and accountant.exposures() == exposures


def test_only_what_is_new_of_a_chunk_costs() -> None:
    with new_ledger() as accountant:
        accountant.step(np.array([1, 2]), np.array([[1], [2]]), name_of(7), Cost.of(2, equations=5))
        chunk = np.array([2, 3, 1, 4])
        assert accountant.is_new(chunk, name_of(7)).tolist() == [False, True, False, True]
        assert accountant.is_new(chunk, name_of(8)).all()
        assert accountant.is_new(np.zeros(0, np.int64), name_of(7)).tolist() == []


@settings(deadline=None, max_examples=30)
@given(histories(), st.integers(0, 2**32 - 1))
def test_after_is_what_a_step_then_gives(history: tuple[np.ndarray, list[Step]], seed: int) -> None:
    segments, steps = history
    rng = np.random.default_rng(seed)
    with new_ledger() as accountant:
        play(accountant, segments, steps)
        untouched = ledgers(accountant)
        rows, cost = np.arange(len(segments)), costs(rng, len(segments))
        foreseen = accountant.after(segments, cost)
        assert ledgers(accountant) == untouched  # asking charges nothing
        accountant.step(rows, segments, name_of(99), cost)
        found = dict(accountant.rows())
        for field in FIELDS:
            told = [np.fmax.reduce([getattr(found[s], field) for s in own]) for own in segments.tolist()]
            np.testing.assert_array_equal(getattr(foreseen, field), told)
            np.testing.assert_array_equal(getattr(accountant.spent(segments), field), told)


def test_of_what_never_left_nothing_is_spent() -> None:
    with new_ledger() as accountant:
        accountant.step(np.array([5]), np.array([[5]]), name_of(0), Cost.of(1, equations=3, leverage=0.5))
        spent = accountant.spent(np.array([[4], [5], [6], [(9_999_999 << 32) | (2**31 - 1)]]))
        assert spent.equations.tolist() == [0, 3, 0, 0] and spent.releases.tolist() == [0, 1, 0, 0]
        np.testing.assert_array_equal(spent.leverage, [np.nan, 0.5, np.nan, np.nan])


def test_records_of_a_chunk_that_share_a_segment_add_up_on_it() -> None:
    segments = np.array([[1, 2], [2, 3], [3, 4]])
    with new_ledger() as accountant:
        cost = Cost.of(3, equations=np.array([10, 20, 40]), precision=4.0)
        assert accountant.after(segments, cost).equations.tolist() == [30, 60, 60]
        accountant.step(np.arange(3), segments, name_of(0), cost)
        assert {n: s.equations for n, s in accountant.rows()} == {1: 10, 2: 30, 3: 60, 4: 40}
        assert {n: s.releases for n, s in accountant.rows()} == {1: 1, 2: 2, 3: 2, 4: 1}
        assert accountant.exposures() == 1


def test_a_segment_that_a_record_lists_twice_counts_once() -> None:
    """Records of fewer pieces than others can only be told so."""
    segments = np.array([[7, 7, 7], [7, 8, 7]])
    with new_ledger() as accountant:
        assert accountant.after(segments[:1], Cost.of(1, equations=3)).equations.tolist() == [3]
        accountant.step(np.arange(2), segments, name_of(0), Cost.of(2, equations=3))
        assert {n: (s.releases, s.equations) for n, s in accountant.rows()} == {7: (2, 6), 8: (1, 3)}


def test_devices_and_records_of_any_number_have_their_own_ledgers() -> None:
    """The largest device and record that the wire lets through; 2^24 devices of 2^31 records fit 64 bits."""
    device, record = np.array([9_999_999, 9_999_999, 0, 1]), np.array([2**31 - 1, 0, 2**31 - 1, 0])
    numbers = device << 32 | record
    assert len(set(numbers.tolist())) == 4 and (numbers >= 0).all()
    with new_ledger() as accountant:
        accountant.step(numbers, numbers[:, None], name_of(0), Cost.of(4, equations=np.arange(4)))
        assert {n: s.equations for n, s in accountant.rows()} == dict(zip(numbers.tolist(), range(4), strict=True))


def test_leverage_is_the_largest_that_was_computed() -> None:
    with new_ledger() as accountant:
        assert math.isnan(accountant.most().leverage)
        for number, told in enumerate([np.nan, 0.5, np.nan, 0.25]):
            cost = Cost.of(1, leverage=told)
            expected = [np.nan, 0.5, 0.5, 0.5][number]
            np.testing.assert_equal(accountant.after(np.array([[1]]), cost).leverage, [expected])
            accountant.step(np.array([1]), np.array([[1]]), name_of(number), cost)
            np.testing.assert_equal(accountant.most().leverage, expected)
        accountant.step(np.array([2]), np.array([[2]]), name_of(9), Cost.of(1, leverage=np.nan))
        assert math.isnan(dict(accountant.rows())[2].leverage) and accountant.most().leverage == 0.5


def test_the_most_is_taken_ledger_by_ledger() -> None:
    with new_ledger() as accountant:
        nothing = vars(accountant.most())
        assert math.isnan(nothing.pop("leverage")) and set(nothing.values()) == {0}
        cost = Cost.of(2, equations=np.array([3, 1]), bits=np.array([1, 9]), precision=np.array([4.0, math.inf]))
        accountant.step(np.array([1, 2]), np.array([[1], [2]]), name_of(0), cost)
        assert accountant.most() == Spent(1, 3, 9, 0.0, math.inf, 0.0, 0.0)


def test_an_empty_release_leaves_no_trace() -> None:
    """A server could fill the disk with names of what was refused."""
    none = np.zeros(0, np.int64)
    with new_ledger() as accountant:
        size = accountant.path.stat().st_size
        for number in range(50):
            assert accountant.after(none.reshape(0, 2), Cost.of(0)).equations.shape == (0,)
            accountant.step(none, none.reshape(0, 2), name_of(number), Cost.of(0))
        accountant.save()
        assert accountant.path.stat().st_size == size


def test_a_sum_of_gradients_is_no_release_but_has_no_noise() -> None:
    with new_ledger() as accountant:
        accountant.step(np.array([1]), np.array([[1]]), name_of(0), Cost.of(1, equations=2, precision=4.0, fisher=1.0))
        for number, leverage in enumerate([0.125, 0.25]):
            accountant.add_gradient(name_of(number), np.array([[1], [2]]), np.array([leverage, 0.5]))
        found = dict(accountant.rows())
        assert (found[1].gradient, found[2].gradient) == (0.375, 1.0)
        assert (found[1].releases, found[2].releases, found[1].equations) == (1, 0, 2)
        assert found[1].precision == found[1].fisher == math.inf  # or epsilon would be a false promise
        assert accountant.sums == (name_of(0), name_of(1))
