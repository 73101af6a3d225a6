"""What changes between rounds, and what a node's folder remembers of earlier ones."""

import os
import stat
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.common.files import replacing
from fedsplit.common.seeds import scheduled, seed_of
from fedsplit.device.pending import NodeState, Pending
from fedsplit.plan.schedule import Schedule

COUNTS = {4: 7, 0: 10, 9: 1, 2: 0}


def schedule(once: bool, chunk: int | str, *, fraction: float = 1.0, rounds: int = 12, seed: int = 5) -> Schedule:
    made = Schedule(once, chunk, fraction, rounds, seed)
    made.set_counts(COUNTS)
    return made


# --- learning rates --------------------------------------------------------------------------------------------


def test_constant() -> None:
    assert [scheduled(0.3, "constant", n, 4) for n in (1, 2, 4)] == [0.3] * 3


def test_cosine_starts_at_the_rate_and_would_be_zero_after_the_last_round() -> None:
    found = [scheduled(2.0, "cosine", n, 4) for n in range(1, 6)]
    np.testing.assert_allclose(found, [2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5, 0.0], atol=1e-12)


@pytest.mark.parametrize("rounds", [3, 6, 9, 30, 99, 300])
def test_step_divides_by_ten_after_each_third(rounds: int) -> None:
    found = [scheduled(1.0, "step", n, rounds) for n in range(1, rounds + 1)]
    np.testing.assert_allclose(found, np.repeat([1.0, 0.1, 0.01], rounds // 3))


# --- seeds -----------------------------------------------------------------------------------------------------


def test_seeds_are_named_by_all_of_their_parts() -> None:
    seeds = [seed_of(1, "order", 2), seed_of(1, "order", 3), seed_of(2, "order", 2), seed_of(1, "trunk", 2), seed_of(1)]
    assert len(set(seeds)) == 5
    assert all(0 <= s < 2**63 for s in seeds)
    assert seed_of(1, "order", 2) == seeds[0]


# --- rows ------------------------------------------------------------------------------------------------------


def pieces(made: Schedule, rounds: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """What is asked for, by device and pass."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number in range(1, rounds + 1):
        for device, row in made.rows(number).items():
            assert row[0] == device
            assert 0 <= row[2] < row[3] <= COUNTS[device]
            found.setdefault(row[:2], []).append(row[2:])
    return found


def positions(parts: list[tuple[int, int]]) -> list[int]:
    return [i for start, stop in parts for i in range(start, stop)]


@pytest.mark.parametrize("chunk", [1, 3, 5, 100, "epoch"])
def test_every_pass_covers_every_record_once(chunk: int | str) -> None:
    found = pieces(schedule(False, chunk), 25)
    assert {device for device, _ in found} == {0, 4, 9}  # device 2 has no records
    for device, count in COUNTS.items():
        passes = sorted(p for d, p in found if d == device)
        assert passes == list(range(len(passes)))
        for number in passes[:-1]:
            assert positions(found[device, number]) == list(range(count))
        if passes:
            assert (
                positions(found[device, passes[-1]]) == list(range(count))[: len(positions(found[device, passes[-1]]))]
            )
    size = 7 if chunk == "epoch" else min(int(chunk), 7)
    assert found[4, 0][0] == (0, size)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100, "epoch", "spread"])
def test_once_asks_for_every_record_once_in_the_whole_run(chunk: int | str) -> None:
    found = pieces(schedule(True, chunk), 12)
    assert set(found) == {(0, 0), (4, 0), (9, 0)}
    for (device, _), parts in found.items():
        assert positions(parts) == list(range(COUNTS[device]))[: 12 * chunk if isinstance(chunk, int) else None]


def test_once_is_over_when_the_records_are() -> None:
    made = schedule(True, 4)
    assert [sorted(made.rows(n)) for n in range(1, 5)] == [[0, 4, 9], [0, 4], [0], []]


def test_once_with_epochs_is_over_after_the_first_round() -> None:
    made = schedule(True, "epoch")
    assert made.rows(1) == {0: (0, 0, 0, 10), 4: (4, 0, 0, 7), 9: (9, 0, 0, 1)}
    assert [made.rows(n) for n in range(2, 9)] == [{}] * 7


@pytest.mark.parametrize("chunk", [4, "epoch", "spread"])
def test_once_a_device_that_joins_late_is_asked_for_all_it_has_and_no_other_again(chunk: int | str) -> None:
    made = Schedule(True, chunk, 1.0, 12, 0)
    made.set_counts({0: 10})
    early = [made.rows(n) for n in range(1, 7)]
    made.set_counts({0: 10, 3: 8})
    late = [made.rows(n) for n in range(7, 13)]
    assert positions([r[3][2:] for r in late if 3 in r]) == list(range(8))
    assert 3 in late[0]
    assert positions([r[0][2:] for r in early + late if 0 in r]) == list(range(10))


def test_once_a_device_that_goes_and_comes_back_is_asked_for_the_rest() -> None:
    made = Schedule(True, 4, 1.0, 12, 0)
    asked = []
    for number, counts in enumerate([{0: 10, 1: 3}, {1: 3}, {0: 10}, {0: 10}, {0: 10}], start=1):
        made.set_counts(counts)
        asked.append(made.rows(number).get(0))
    assert asked == [(0, 0, 0, 4), None, (0, 0, 4, 8), (0, 0, 8, 10), None]


@pytest.mark.parametrize("once", [True, False])
def test_what_could_not_be_released_is_asked_for_again_only_once(once: bool) -> None:
    """Where records come round again, the device's turn is over; where they do not, they would be lost."""
    made = schedule(once, 4)
    rows = [made.rows(1)[4]]
    made.not_released(4, rows[0][2])
    rows += [r[4] for n in range(2, 6) if 4 in (r := made.rows(n))]
    again = [(0, 0), (0, 0), (0, 4)] if once else [(0, 0), (0, 4), (1, 0), (1, 4), (2, 0)]
    assert [row[1:3] for row in rows] == again


def test_spread_asks_for_an_even_share_in_each_round() -> None:
    made = Schedule(True, "spread", 1.0, 4, 0)
    made.set_counts({0: 10, 1: 2})
    rows = [made.rows(n) for n in range(1, 5)]
    assert [r[0][2:] for r in rows] == [(0, 2), (2, 5), (5, 7), (7, 10)]
    assert [r[1][2:] if 1 in r else None for r in rows] == [None, (0, 1), None, (1, 2)]


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(0, 50), st.integers(0, 12), max_size=6),
    st.sampled_from([1, 2, 5, "epoch", "spread"]),
    st.floats(0.01, 1.0),
    st.integers(1, 15),
    st.integers(0, 99),
)
def test_once_repeats_no_record_whoever_takes_part(
    counts: dict[int, int], chunk: int | str, fraction: float, rounds: int, seed: int
) -> None:
    made = Schedule(True, chunk, fraction, rounds, seed)
    made.set_counts(counts)
    asked: Counter[tuple[int, int]] = Counter()
    for number in range(1, rounds + 1):
        for device, pass_number, start, stop in made.rows(number).values():
            assert pass_number == 0
            asked.update((device, i) for i in range(start, stop))
    assert max(asked.values(), default=0) <= 1
    assert all(i < counts[device] for device, i in asked)


@pytest.mark.parametrize("once", [True, False])
def test_positions_are_all_that_a_resumed_schedule_needs(once: bool) -> None:
    whole, first = schedule(once, 3, fraction=0.5), schedule(once, 3, fraction=0.5)
    expected = [whole.rows(n) for n in range(1, 11)]
    found = [first.rows(n) for n in range(1, 5)]
    resumed = schedule(once, 3, fraction=0.5)
    resumed.position.update(first.position)
    assert found + [resumed.rows(n) for n in range(5, 11)] == expected


def sampled(sampling: str, rounds: int, counts: dict[int, int], fraction: float = 0.5) -> list[list[int]]:
    made = Schedule(False, 1, fraction, rounds, 5, sampling)
    made.set_counts(counts)
    return [sorted(made.rows(n)) for n in range(1, rounds + 1)]


def test_by_size_a_device_is_as_likely_as_it_has_records() -> None:
    """One of four: the share of the rounds is within 4 standard errors of the share of the records."""
    counts, rounds = {3: 10, 1: 40, 8: 1, 6: 149}, 4000
    found = Counter(device for (device,) in sampled("size", rounds, counts, fraction=0.25))
    for device, count in counts.items():
        share = count / 200
        assert abs(found[device] / rounds - share) < 4 * (share * (1 - share) / rounds) ** 0.5
    evenly = Counter(device for (device,) in sampled("uniform", rounds, counts, fraction=0.25))
    assert max(evenly.values()) < 1.2 * min(evenly.values())


def test_by_size_devices_are_drawn_without_replacement_anew_and_by_the_seed() -> None:
    counts = {d: 1 + d for d in range(10)} | {77: 0}
    found = sampled("size", 50, counts)
    assert all(len(set(cohort)) == 5 and 77 not in cohort for cohort in found)
    assert len({tuple(cohort) for cohort in found}) > 10
    assert found == sampled("size", 50, counts)
    assert sampled("size", 3, counts, fraction=1.0) == [list(range(10))] * 3


# --- cohorts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "size"), [(1.0, 20), (0.5, 10), (0.26, 5), (0.01, 1)])
def test_a_fraction_of_the_devices_with_records_takes_part(fraction: float, size: int) -> None:
    def cohorts(seed: int) -> list[list[int]]:
        made = Schedule(False, "epoch", fraction, 30, seed)
        made.set_counts({d: 0 if d % 3 == 0 else 5 for d in range(1, 31)})
        return [list(made.rows(n)) for n in range(1, 31)]

    found = cohorts(0)
    assert {len(c) for c in found} == {size}
    assert all(c == sorted(set(c)) for c in found)
    assert all(d % 3 for c in found for d in c)
    assert cohorts(0) == found
    if size < 20:
        assert cohorts(1) != found
        assert len({tuple(c) for c in found}) > 5


def test_devices_take_part_equally_often() -> None:
    made = Schedule(False, "epoch", 0.25, 2000, 3)
    made.set_counts(dict.fromkeys(range(8), 5))
    turns = Counter(d for n in range(1, 2001) for d in made.rows(n))
    assert all(abs(turns[d] - 500) < 4 * (2000 * 0.25 * 0.75) ** 0.5 for d in range(8))


def test_no_devices_give_no_rows() -> None:
    made = Schedule(False, "epoch", 0.5, 3, 0)
    assert made.rows(1) == {}
    made.set_counts({3: 0})
    assert made.rows(2) == {}


# --- a node's folder -------------------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path: Path) -> NodeState:
    return NodeState(tmp_path / "run" / "0")


def some_pending(first: float = 0.5) -> Pending:
    """A chunk whose weights begin with ``first``."""
    return Pending(
        weights=np.array([first, -2.0, 1e-30], dtype=np.float32),
        devices=np.array([3, 8]),
        records=np.array([2, 1]),
        index=np.array([0, 5, 2]),
        counts=np.array([1, 0, 2]),
        bitmap=np.array([[1], [0], [6]], dtype=np.uint8),
        slopes=np.array([0.5, 1.0, -0.25], dtype=np.float32),
    )


def test_a_nodes_folder_is_its_owners_alone(state: NodeState) -> None:
    assert stat.S_IMODE(os.stat(state.folder).st_mode) == 0o700
    NodeState(state.folder)  # may be there already


def test_pending_chunks_come_back(state: NodeState) -> None:
    sent = some_pending()
    state.save_pending(3, sent)
    found = NodeState(state.folder).load_pending(3)
    assert found is not None
    for field in fields(Pending):
        a, b = getattr(found, field.name), getattr(sent, field.name)
        assert isinstance(a, np.ndarray)
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


def test_a_later_chunk_of_the_same_round_takes_the_place_of_the_earlier(state: NodeState) -> None:
    state.save_pending(3, some_pending(1))
    state.save_pending(3, some_pending(2))
    found = state.load_pending(3)
    assert found is not None
    assert found.weights[0] == 2
    assert [p.name for p in state.folder.iterdir()] == ["pending-3.npz"]


def test_a_missing_chunk_is_none(state: NodeState) -> None:
    state.save_pending(3, some_pending())
    assert state.load_pending(4) is None


@pytest.mark.parametrize("damage", [b"", b"not an npz file", b"\x93NUMPY", b"\x80\x04N."])
def test_a_file_that_is_no_chunk_is_none(state: NodeState, damage: bytes) -> None:
    (state.folder / "pending-3.npz").write_bytes(damage)
    assert state.load_pending(3) is None


def test_a_chunk_without_a_field_or_with_another_one_is_none(state: NodeState) -> None:
    values = vars(some_pending())
    np.savez(state.folder / "pending-3.npz", **{k: v for k, v in values.items() if k != "bitmap"})
    np.savez(state.folder / "pending-4.npz", **values, extra=np.zeros(1))
    np.savez(state.folder / "pending-5.npz", **{k: v for k, v in values.items() if k != "weights"})
    assert [state.load_pending(n) for n in (3, 4, 5)] == [None] * 3


def test_a_pickle_is_not_loaded(state: NodeState) -> None:
    values = vars(some_pending()) | {"slopes": np.array([{}], dtype=object)}
    np.savez(state.folder / "pending-3.npz", **values)
    assert state.load_pending(3) is None


def test_chunks_of_earlier_rounds_are_forgotten(state: NodeState) -> None:
    for number in (2, 9, 10, 11):
        state.save_pending(number, some_pending(number))
    ledger = state.folder / "ledger-train.npz"
    ledger.write_bytes(b"what left before")
    state.forget_before(10)
    assert [n for n in range(1, 20) if state.load_pending(n)] == [10, 11]
    assert ledger.read_bytes() == b"what left before"  # the ledger is not forgotten


def test_a_process_killed_while_writing_leaves_the_old_file(state: NodeState) -> None:
    state.save_pending(3, some_pending(1))
    with pytest.raises(KeyboardInterrupt), replacing(state.folder / "pending-3.npz") as new:
        new.write_bytes(b"half of it")
        raise KeyboardInterrupt
    found = state.load_pending(3)
    assert found is not None
    assert found.weights[0] == 1
