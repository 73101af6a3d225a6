"""The guard of sums of gradients."""

from typing import Any

import numpy as np
import pytest
from proposals import Guards, N, deltas, first, release
from torch import nn

from fedsplit.common.errors import StateError
from fedsplit.guard.proposal import Summed
from fedsplit.model.layer import FirstLayer
from fedsplit.wire.ledger import Reason

FEW = FirstLayer(nn.Linear(N, 2), nn.ReLU(), (N,))  # few outputs: sums over few records are no equations of theirs
SOME = {"gradients": True, "layer": FEW}


def summed(
    guards: Guards, delta: np.ndarray, records: Any = None, *, width: int = 2, kept: int = 0, **changes: Any
) -> bool:
    """Ask for a sum of gradients over some records."""
    segments = np.arange(len(delta)) if records is None else np.asarray(records)
    segments = segments[:, None] if segments.ndim == 1 else segments
    pattern = np.tile(np.arange(width) < kept, (len(delta), 1))
    weights = np.random.default_rng(0).normal(size=(N + 1) * width).astype(np.float32)
    guard = guards(**{**SOME, **changes})
    return guard.admit_gradient(summed_of(weights, np.asarray(delta), pattern, segments))


class Dense(Summed):
    """Gradients at all outputs, sent or not: cases that are easy to follow."""

    def delta(self, width: int) -> np.ndarray:
        return self.values.reshape(-1, width)


def summed_of(weights: np.ndarray, delta: np.ndarray, pattern: np.ndarray, segments: np.ndarray) -> Summed:
    """Records that are named by their first segment."""
    bitmap = np.packbits(pattern, axis=1, bitorder="little")
    return Dense(weights, segments[:, 0], segments, bitmap, delta.astype(np.float32).ravel())


def test_gradients_leave_only_where_the_owner_allows_it(guards: Guards) -> None:
    assert not summed(guards, deltas(60), gradients=False)
    assert guards().accountant.sums == ()
    assert summed(guards, deltas(60))
    spent = guards().accountant.spent(np.arange(60)[:, None])
    assert spent.gradient.sum() == pytest.approx(2) and spent.gradient.max() < 0.25  # leverages sum to the rank
    assert np.isinf(spent.precision).all() and not spent.releases.any()


def test_sums_over_too_few_records_are_refused(guards: Guards) -> None:
    loose = {"gradient_leverage": 1.0, "gradient_share": 1.0}
    assert not summed(guards, deltas(15), **loose)
    assert summed(guards, deltas(16), **loose)
    assert not summed(guards, np.zeros((0, 2)), **loose)


def test_a_large_share_is_refused(guards: Guards) -> None:
    """Two equations per number over 20 records are a tenth of the unknowns, a kept output of each a sixteenth."""
    loose = {"gradient_leverage": 1.0}
    assert not summed(guards, deltas(20), gradient_share=0.0999, **loose)
    assert not summed(guards, deltas(20), kept=1, gradient_share=0.162, **loose)
    assert summed(guards, deltas(20), kept=1, gradient_share=0.163, **loose)


def test_the_share_counts_equations_of_other_releases(guards: Guards) -> None:
    loose = {"gradient_leverage": 1.0, "gradient_share": 0.2}
    pattern = np.ones((20, 2), bool)
    few = np.random.default_rng(0).normal(size=(N + 1) * 2).astype(np.float32)
    guard = guards(layer=FEW, releases=9, equations=1.0)
    for mask_round in range(2):
        ask = release(pattern, few, mask_round=mask_round)
        assert not guard.admit(ask).any()
    assert not summed(guards, deltas(20), kept=1, **loose)  # 0.1 + 4/16
    assert summed(guards, deltas(20), kept=1, records=range(100, 120), **loose)


@pytest.mark.parametrize("known_by", ["pattern", "ledger"])
def test_the_share_is_that_of_all_sums_of_the_records(known_by: str, guards: Guards) -> None:
    """Two sums over 40 records are a tenth of the unknowns, a kept output of each record a sixteenth."""
    if known_by == "ledger":
        few = np.random.default_rng(0).normal(size=(N + 1) * 2).astype(np.float32)
        assert not guards(layer=FEW).admit(release(first(40, 1, 2), few)).any()
    kept = 1 if known_by == "pattern" else 0
    assert summed(guards, deltas(40), kept=kept, gradient_leverage=1.0)
    for seed, share, allowed in ((1, 0.162, False), (1, 0.163, True), (2, 0.163, False)):
        loose = {"gradient_leverage": 1.0, "gradient_share": share}
        assert summed(guards, deltas(40, seed=seed), kept=kept, **loose) == allowed


def test_a_one_hot_cut_gradient_is_refused(guards: Guards) -> None:
    one_hot = np.zeros((60, 2), np.float32)
    one_hot[7, 1] = 1
    assert not summed(guards, one_hot)
    assert not summed(guards, one_hot + 1e-6 * deltas(60))
    assert not summed(guards, np.concatenate([deltas(59), 1e4 * np.ones((1, 2), np.float32)]))  # hardly any others
    assert guards().accountant.sums == ()
    assert summed(guards, deltas(60))


def test_leverage_adds_up_over_sums(guards: Guards) -> None:
    """Of 40 records each sum has 1/20 on average; after a few some record has had its quarter."""
    allowed = [summed(guards, deltas(40, seed=seed)) for seed in range(12)]
    assert allowed[0] and not all(allowed)
    assert guards().accountant.spent(np.arange(40)[:, None]).gradient.max() <= 0.25
    assert len(guards().accountant.sums) == sum(allowed)


def test_the_same_sum_again_is_nothing_new(guards: Guards) -> None:
    assert summed(guards, deltas(60))
    before = guards().accountant.path.read_bytes()
    assert all(summed(guards, deltas(60)) for _ in range(20))
    assert guards().accountant.path.read_bytes() == before


def test_two_sums_whose_difference_is_a_record_are_refused(guards: Guards) -> None:
    """Each by itself spreads over all records; subtracted they hand one back, X'(b - a) = x / 1024."""
    one, other = np.ones((60, 2), np.float32), np.ones((60, 2), np.float32)
    other[7] += 1 / 1024
    assert summed(guards, one)
    assert not summed(guards, other)
    assert summed(guards, other, records=range(100, 160))


def test_a_sum_that_leaves_one_record_out_is_refused(guards: Guards) -> None:
    assert summed(guards, np.ones((60, 2)))
    assert not summed(guards, np.ones((59, 2)), records=[*range(7), *range(8, 60)])
    assert summed(guards, np.ones((60, 2)), records=range(100, 160))


def test_a_record_is_known_again_however_often_its_segment_is_named(guards: Guards) -> None:
    """Beside records of more segments than it has, it names its own twice."""
    assert summed(guards, np.ones((60, 2)))
    assert summed(guards, np.ones((60, 2)), records=np.repeat(np.arange(60)[:, None], 2, axis=1))  # the same again
    assert len(guards().accountant.sums) == 1


def test_a_record_is_not_isolated_through_others(guards: Guards) -> None:
    """a(A) and a(A) + b(B) give b(B), and with b(B) + x_99 the last record: the first and last share none."""
    a, b = np.ones((30, 2)), np.arange(1, 31)[:, None] / 8 * [1, 1]
    assert summed(guards, a, records=range(30))
    assert summed(guards, np.concatenate([a, b]), records=range(60))
    last = np.concatenate([b, [[1e-3, 1e-3]]])
    assert not summed(guards, last, records=[*range(30, 60), 99])


def test_a_sum_that_was_not_kept_is_refused(guards: Guards) -> None:
    assert summed(guards, deltas(60))
    (path,) = guards().accountant.path.with_suffix(".history").iterdir()
    path.unlink()
    with pytest.raises(StateError, match="missing: what has left cannot be known"):
        summed(guards, deltas(60, seed=1))


def test_a_record_that_is_part_of_a_sum_is_released_no_more(guards: Guards) -> None:
    """Releases are judged with releases: what they would tell beside a sum is not known."""
    assert summed(guards, deltas(60))
    few = np.random.default_rng(0).normal(size=(N + 1) * 2).astype(np.float32)
    ask = release(first(2, 1, 2), few, records=[3, 99])
    assert guards(layer=FEW).admit(ask).tolist() == [Reason.RELEASES, 0]


def test_gradients_have_no_epsilon(guards: Guards) -> None:
    assert not summed(guards, deltas(60), epsilon=1e6)


def test_after_too_many_refusals_gradients_do_not_leave_either(guards: Guards) -> None:
    guards(refusals=0).admit(release(first(1, 9)))
    assert not summed(guards, deltas(60), refusals=0)
    assert summed(guards, deltas(60), refusals=1)


def test_observed_gradients_count_as_if_they_told_everything(guards: Guards) -> None:
    """Their leverage takes long; what is not computed must not pass for nothing."""
    assert not summed(guards, deltas(60), enforce=False, gradients=False)
    assert summed(guards, deltas(60, seed=1), enforce=False)
    spent = guards().accountant.most()
    assert spent.gradient == 2 and spent.precision == np.inf


def test_sums_of_a_convolution_are_judged_by_positions(guards: Guards) -> None:
    layer = FirstLayer(nn.Conv1d(2, 2, 3, padding=1), nn.ReLU(), (2, 40))
    segments, weights = np.arange(20)[:, None], np.random.default_rng(0).normal(size=layer.size).astype(np.float32)
    pattern, delta = np.zeros((20, 80), bool), deltas(20, 80)
    guard = guards(layer=layer, gradients=True)
    assert guard.admit_gradient(summed_of(weights, delta, pattern, segments))
    one_hot = delta * (np.arange(20) == 3)[:, None]
    assert not guard.admit_gradient(summed_of(weights, delta + 1e-3 * one_hot, pattern, segments))
    assert not guard.admit_gradient(summed_of(weights, one_hot, pattern, segments))
