"""The exposure accountant: it never counts too little, whatever the order, the overlap, the damage or the moment."""

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.common.errors import StateError
from fedsplit.guard.accountant import Cost, ExposureAccountant, Spent
from fedsplit.guard.gaussian import epsilon, gaussian_precision, largest_precision
from fedsplit.guard.sealed import load_sealed, save_sealed

OWNER = b"o" * 32
FIELDS = ("releases", "equations", "bits", "gradient", "precision", "fisher", "leverage")


@contextmanager
def new_ledger() -> Iterator[ExposureAccountant]:
    with TemporaryDirectory() as folder:
        yield ExposureAccountant.create(Path(folder) / "ledger.npz", OWNER)


def name_of(number: int) -> bytes:
    return number.to_bytes(32, "little")


def windows(records: int, pieces: int) -> np.ndarray:
    """Records that are made of consecutive pieces, each shared with its neighbours; device 3."""
    return (3 << 32) | (np.arange(records)[:, None] + np.arange(pieces))


def costs(rng: np.random.Generator, count: int) -> Cost:
    """Whole numbers, also in the floats, so that sums do not depend on their order."""
    return Cost(
        equations=rng.integers(0, 9, count),
        bits=rng.integers(0, 99, count),
        gradient=rng.integers(0, 5, count).astype(float),
        precision=rng.choice([0.0, 4.0, 16.0, math.inf], count),
        fisher=rng.choice([0.0, 2.0, math.inf], count),
        leverage=rng.choice([np.nan, 0.25, 0.5, 1.0], count),
    )


def take(cost: Cost, rows: np.ndarray) -> Cost:
    return Cost(**{name: values[rows] for name, values in vars(cost).items()})


Step = tuple[np.ndarray, int, Cost]


@st.composite
def histories(draw: st.DrawFn) -> tuple[np.ndarray, list[Step]]:
    """Segments of some records, and releases of some of them under some names."""
    records, pieces = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps = []
    for _ in range(draw(st.integers(0, 6))):
        rows = np.flatnonzero(rng.random(records) < 0.6)
        steps.append((rows, int(rng.integers(0, 4)), costs(rng, len(rows))))
    return windows(records, pieces), steps


def play(accountant: ExposureAccountant, segments: np.ndarray, steps: list[Step]) -> None:
    for rows, name, cost in steps:
        fresh = accountant.is_new(rows, name_of(name))
        accountant.step(rows[fresh], segments[rows[fresh]], name_of(name), take(cost, fresh))


def ledgers(accountant: ExposureAccountant) -> dict[int, list[Any]]:
    """All ledgers; NaN, which equals nothing, as text."""
    return {
        name: [repr(v) if v != v else v for v in (getattr(spent, field) for field in FIELDS)]
        for name, spent in accountant.rows()
    }


# --- what is counted -----------------------------------------------------------------------------------------------


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


# --- epsilon -------------------------------------------------------------------------------------------------------


def test_without_noise_there_is_no_epsilon() -> None:
    assert gaussian_precision(0.0) == math.inf == epsilon(math.inf, 1e-5)
    assert epsilon(gaussian_precision(1.0) + gaussian_precision(0.0), 1e-5) == math.inf
    assert epsilon(0.0, 1e-5) == 0


@pytest.mark.parametrize("noises", [(8.0,), (4.0, 6.0), (20.0, 5.0, 7.0), (10.0,) * 6])
def test_epsilon_composes_as_dp_accounting_does(noises: tuple[float, ...]) -> None:
    """Each release is a Gaussian of noise multiplier noise/2: replacing a record moves it by twice the clip."""
    from dp_accounting import GaussianDpEvent
    from dp_accounting.pld import PLDAccountant

    composed = PLDAccountant()
    for noise in noises:
        composed.compose(GaussianDpEvent(noise / 2))
    expected = composed.get_epsilon(1e-5)  # an upper bound, by rounding
    found = epsilon(sum(gaussian_precision(noise) for noise in noises), 1e-5)
    assert expected * 0.998 <= found <= expected * (1 + 1e-9)


@pytest.mark.parametrize("noise", [0.3, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("clip", [0.5, 3.0])
def test_epsilon_is_that_of_two_opposite_records(noise: float, clip: float) -> None:
    """By the definition: the outputs +clip and -clip, each with noise of deviation ``noise * clip``."""
    away, deviation = 2 * clip, noise * clip
    found = epsilon(gaussian_precision(noise), 1e-5)

    def normal(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    def delta(epsilon: float) -> float:
        middle = epsilon * deviation / away
        return normal(away / deviation / 2 - middle) - math.exp(epsilon) * normal(-away / deviation / 2 - middle)

    assert delta(found * 1.001) < 1e-5 < delta(found * 0.999)


def test_little_noise_has_a_large_epsilon_at_once() -> None:
    """Not after minutes and gigabytes, as by adding up distributions."""
    assert 2e4 < epsilon(gaussian_precision(0.01), 1e-5) < 2.2e4
    assert 0 <= epsilon(gaussian_precision(1e6), 1e-5) < 1e-3


@pytest.mark.parametrize("most", [0.1, 1.0, 8.0, 300.0])
def test_the_largest_precision_has_just_the_epsilon(most: float) -> None:
    assert epsilon(largest_precision(most, 1e-5), 1e-5) == pytest.approx(most, rel=1e-6)
    assert largest_precision(most, 1e-5) < largest_precision(most + 0.01, 1e-5)


def test_without_a_limit_any_precision_will_do() -> None:
    assert largest_precision(None, 1e-5) == math.inf == largest_precision(math.inf, 1e-5)


# --- the file ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(histories(), st.integers(0, 2**62), st.integers(0, 2**32 - 1))
def test_the_file_brings_everything_back(history: tuple[np.ndarray, list[Step]], run: int, round_number: int) -> None:
    segments, steps = history
    with new_ledger() as accountant:
        play(accountant, segments, steps)
        accountant.note(run, round_number)
        accountant.note(run, 0)  # never back
        accountant.refused += 17
        accountant.add_gradient(name_of(5), segments, np.full(len(segments), 0.1))
        accountant.save()
        again = ExposureAccountant(accountant.path, OWNER)
        assert ledgers(again) == ledgers(accountant)
        assert (again.refused, again.sums, again.last_round(run)) == (17, (name_of(5),), round_number)
        assert again.last_round(run + 1) == 0
        for rows, name, _ in steps:
            assert not again.is_new(rows, name_of(name)).any()
        records = np.arange(len(segments))
        for one, other in zip(again.earlier(records), accountant.earlier(records), strict=True):
            assert one[0] == other[0] and (one[1] == other[1]).all()
        again.save()
        assert again.path.read_bytes() == accountant.path.read_bytes()


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """A ledger of eight records of which something has left."""
    accountant = ExposureAccountant.create(tmp_path / "ledger.npz", OWNER)
    segments = windows(8, 2)
    accountant.step(np.arange(8), segments, name_of(1), costs(np.random.default_rng(0), 8))
    accountant.note(3, 4)
    accountant.save()
    return accountant.path


def refuses(path: Path, said: str, owner: bytes = OWNER) -> None:
    """Opening and beginning anew are both refused, in one line, and what is there is left as it is."""
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StateError, match=said) as caught:
        ExposureAccountant(path, owner)
    assert "\n" not in str(caught.value)
    if path.exists():
        with pytest.raises(StateError, match="exists already"):
            ExposureAccountant.create(path, owner)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_missing_ledger_is_refused(tmp_path: Path) -> None:
    refuses(tmp_path / "ledger.npz", "is missing: what has left cannot be known")
    assert not list(tmp_path.iterdir())


def test_another_owners_ledger_is_refused(ledger: Path) -> None:
    refuses(ledger, "belongs to other devices", b"p" * 32)


def test_a_truncated_ledger_is_refused(ledger: Path) -> None:
    content = ledger.read_bytes()
    for length in [*range(0, len(content), 61), 31, 32, 33, len(content) - 32, len(content) - 1]:
        ledger.write_bytes(content[:length])
        refuses(ledger, "is damaged: what has left cannot be known")
    ledger.write_bytes(content + b"\0")
    refuses(ledger, "is damaged")
    ledger.write_bytes(content)
    assert ExposureAccountant(ledger, OWNER).most().releases == 2


def test_a_single_flipped_bit_is_refused(ledger: Path) -> None:
    """Also in numpy's headers, where a shape of (100,) can become (000,) with the zip's checksum never looked at."""
    content = ledger.read_bytes()
    headers = [i for i in range(len(content)) if content[i : i + 6] == b"\x93NUMPY"]
    assert len(headers) >= 10
    rng = np.random.default_rng(0)
    places = {
        *rng.integers(0, 8 * len(content), 100).tolist(),
        *(8 * (h + i) + b for h in headers for i in range(60, 76) for b in (0, 4)),
    }
    for place in sorted(places):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        ledger.write_bytes(damaged)
        with pytest.raises(StateError, match="is damaged"):
            ExposureAccountant(ledger, OWNER)


@pytest.mark.parametrize("content", ["folder", "text", "array", "other arrays"])
def test_what_is_no_ledger_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.npz"
    if content == "folder":
        path.mkdir()
    elif content == "text":
        path.write_text("nothing has left")
    elif content == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        save_sealed(path, owner=np.frombuffer(OWNER, np.uint8), names=np.zeros(0, np.int64))
    refuses(path, "is damaged")


def test_beginning_never_replaces(ledger: Path) -> None:
    before = ledger.read_bytes()
    for owner in (OWNER, b"p" * 32):
        with pytest.raises(StateError, match="exists already"):
            ExposureAccountant.create(ledger, owner)
    assert ledger.read_bytes() == before


def test_only_the_owner_can_read_it(ledger: Path) -> None:
    assert ledger.stat().st_mode & 0o777 == 0o600


def test_of_two_processes_the_second_to_write_is_refused(ledger: Path) -> None:
    """Or what the first let out would be forgotten."""
    one, other = (ExposureAccountant(ledger, OWNER) for _ in range(2))
    one.step(np.array([50]), np.array([[50]]), name_of(2), Cost.of(1, equations=5))
    other.step(np.array([60]), np.array([[60]]), name_of(3), Cost.of(1, equations=6))
    one.save()
    with pytest.raises(StateError, match="changed by another process"):
        other.save()
    kept = dict(ExposureAccountant(ledger, OWNER).rows())
    assert 50 in kept and 60 not in kept
    one.save()  # its own writing is no other's


def test_a_ledger_that_was_taken_away_is_not_written_anew(ledger: Path) -> None:
    accountant = ExposureAccountant(ledger, OWNER)
    ledger.unlink()
    with pytest.raises(StateError, match="changed by another process"):
        accountant.save()
    assert not ledger.exists()


def test_a_ledger_that_was_put_back_is_not_written_over(ledger: Path) -> None:
    old = ledger.read_bytes()
    accountant = ExposureAccountant(ledger, OWNER)
    accountant.save()
    accountant.note(3, 9)
    accountant.save()
    ledger.write_bytes(old)
    with pytest.raises(StateError, match="changed by another process"):
        accountant.save()


def test_a_failed_write_leaves_the_old_file(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ledger.read_bytes()
    accountant = ExposureAccountant(ledger, OWNER)
    accountant.step(np.array([50]), np.array([[50]]), name_of(2), Cost.of(1))

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            accountant.save()
    assert ledger.read_bytes() == before
    accountant.save()
    assert 50 in dict(ExposureAccountant(ledger, OWNER).rows())


def test_sealed_files_bring_arrays_back(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros((0, 4), np.float32), "c": np.int64(7)}
    digest = save_sealed(tmp_path / "x", **arrays)
    found, stored = load_sealed(tmp_path / "x")
    assert digest == stored == (tmp_path / "x").read_bytes()[-32:]
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    with pytest.raises(FileNotFoundError):
        load_sealed(tmp_path / "y")


# --- kill -9 -------------------------------------------------------------------------------------------------------

# Forks children that let records leave one by one and report each on a pipe, and kills them at random moments. Says
# what was reported and what the ledger then holds, by child; each child goes on with the same ledger. Nothing is
# computed before the forks, or the libraries' threads would be missing after them.
KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import numpy as np
from torch import nn
from fedsplit.guard.guard import Guard, Proposal, release_name
from fedsplit.model.layer import FirstLayer
from fedsplit.guard.accountant import Cost, ExposureAccountant
from fedsplit.guard.limits import Limits

path, owner = Path(sys.argv[1]), b"o" * 32
layer = FirstLayer(nn.Linear(16, 8), nn.ReLU(), (16,))
weights = np.random.default_rng(0).normal(size=layer.size).astype(np.float32)

def release(record, path=path):
    guard = Guard(Limits(), ExposureAccountant(path, owner), layer, enforce=True)
    records = np.array([record])
    proposal = Proposal(1, record + 1, weights, release_name(layer, weights, "p", 0), np.zeros(1, np.int64), records,
                        records[:, None], np.array([[3]], np.uint8), np.array([0.5]), Cost.of(1, equations=2), True)
    return guard.admit(proposal)[0] == 0

def live(record, writer):
    trial = path.with_name(f"trial-{os.getpid()}.npz")
    ExposureAccountant.create(trial, owner)
    release(0, trial)
    os.write(writer, b"\\xff" * 4)  # ready
    while True:
        if release(record):
            os.write(writer, record.to_bytes(4, "little"))
        record += 1

ExposureAccountant.create(path, owner)
record, children = 0, []
for trial in range(12):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        live(record, writer)
    os.close(writer)
    told = b""
    for _ in range(1 + trial % 4):
        told += os.read(reader, 4)
    time.sleep(random.random() * 0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while part := os.read(reader, 65536):
        told += part
    os.close(reader)
    reported = [int.from_bytes(told[i:i + 4], "little") for i in range(4, len(told), 4)]
    held = {name: spent.equations for name, spent in ExposureAccountant(path, owner).rows()}
    children.append({"reported": reported, "held": sorted(held), "equations": sorted(set(held.values()))})
    record = max(held, default=-1) + 1
print(json.dumps(children))
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_never_counts_too_little(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "ledger.npz")]
    children = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    reported: set[int] = set()
    for child in children:
        reported.update(child["reported"])
        assert reported <= set(child["held"])
        assert child["equations"] in ([], [2])  # and none was counted twice
    assert len(reported) >= 18
    assert len(set(children[-1]["held"]) - reported) <= len(children)  # killed before they could report
