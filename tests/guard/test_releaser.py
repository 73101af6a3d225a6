"""The one way onto the wire: what no guard has admitted, and nobody has named as public, cannot be packed."""

import numpy as np
import pytest
from own import linear, linear_model
from payloads import ints

from fedsplit.guard.accountant import ExposureAccountant
from fedsplit.guard.guard import Guard
from fedsplit.guard.limits import Limits
from fedsplit.guard.releaser import Releaser
from fedsplit.release.admitted import Admitted, unguarded
from fedsplit.release.kept import Kept
from fedsplit.release.making import Chunk
from fedsplit.release.noise import Noisy
from fedsplit.release.policies import All, AtMost
from fedsplit.wire.release import Release

LAYER = linear_model().first_layer
WEIGHTS = LAYER.flatten(LAYER.initial_weights())
SECRET = bytes(range(32))
KEPT = Kept.of(np.ones((2, 3), np.float32), np.ones((2, 3), bool), zeros_count=True)


def releaser(policy: object = AtMost(1)) -> Releaser:
    return Releaser(LAYER, policy, "float32", lambda _: SECRET)  # type: ignore[arg-type]


def guard(tmp_path, **limits) -> Guard:
    ExposureAccountant.create(tmp_path / "ledger.npz", b"o" * 32)
    return Guard(Limits(**limits), ExposureAccountant(tmp_path / "ledger.npz", b"o" * 32), LAYER, enforce=True)


def chunk() -> Chunk:
    return Chunk.of(4, linear(4, 5).train)


def test_nobody_but_a_guard_makes_an_admitted() -> None:
    with pytest.raises(TypeError, match="only a guard admits"):
        Admitted(KEPT, "guard", object())


def test_dense_outputs_cannot_be_admitted() -> None:
    with pytest.raises(TypeError, match="packed from Kept, not from ndarray"):
        unguarded(np.ones((2, 3), np.float32), "public")  # type: ignore[arg-type]


def test_what_was_kept_cannot_be_packed_before_a_guard_has_seen_it() -> None:
    with pytest.raises(TypeError, match="packed from Admitted, not from Kept"):
        Release.pack(KEPT, ints(0), ints(2), ints(0, 1), "float32")  # type: ignore[arg-type]


def test_of_what_a_guard_refuses_nothing_is_in_the_release(tmp_path) -> None:
    """The second release of a record under other weights is one too many."""
    own, judge = releaser(), guard(tmp_path, releases=1)
    first = own.admit(judge, own.make(chunk(), WEIGHTS, 1, "train"))
    assert not first.codes.any() and first.admitted.by == "guard"
    more = own.admit(judge, own.make(chunk(), WEIGHTS + 1e-3, 1, "train"), round_number=1)
    assert more.codes.all()
    release = own.pack(more, np.zeros(0, np.int64))
    assert len(release.counts) == len(release.codes) == len(release.devices) == 0


def test_a_guard_looks_at_the_outputs_that_leave(tmp_path) -> None:
    """A proposal of some outputs does not let others leave."""
    own, judge = releaser(), guard(tmp_path)
    made = own.make(chunk(), WEIGHTS, 1, "train")
    other = Kept.of(*(np.ones((len(made.chunk.x), LAYER.width), t) for t in (np.float32, bool)), zeros_count=True)
    proposed: list[object] = []
    judge.admit = lambda proposal: proposed.append(proposal)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="of the outputs that are to leave"):
        judge.release(_proposal(own, made), other)
    assert not proposed


def _proposal(own: Releaser, made):
    caught = []

    class Catching:
        enforce = True

        def release(self, proposal, kept):
            caught.append(proposal)
            return np.zeros(len(kept.counts), np.int64), unguarded(kept, "test")

    own.admit(Catching(), made)  # type: ignore[arg-type]
    return caught[0]


def test_a_record_that_is_asked_about_twice_is_judged_once(tmp_path) -> None:
    x = np.repeat(linear(4, 5).train.x[:1], 2, axis=0)
    same = ints(7, 7)
    twice = Chunk(ints(0), ints(2), ints(3, 3), same[:, None], x, np.zeros(2), same)
    own, judge = releaser(), guard(tmp_path, releases=1)
    leaving = own.admit(judge, own.make(twice, WEIGHTS, 0, "predict"))
    assert not leaving.codes.any() and len(leaving.admitted.kept.counts) == 2
    assert judge.accountant.most().releases == 1


def test_purposes_share_no_noise_and_no_name() -> None:
    own = releaser(Noisy(All(), 1.0, 0.5))
    one, other = (own.make(chunk(), WEIGHTS, 0, purpose) for purpose in ("predict [1.0]", "predict [2.0]"))
    assert one.name != other.name
    assert not np.isclose(one.outputs.kept.values, other.outputs.kept.values).any()
    again = own.make(chunk(), WEIGHTS, 0, "predict [1.0]")
    assert again.name == one.name and np.array_equal(again.outputs.kept.values, one.outputs.kept.values)


def test_noise_hides_outputs_that_are_infinite_too() -> None:
    own = releaser(Noisy(All(), 1.0, 0.5))
    kept = own.make(chunk(), np.full_like(WEIGHTS, np.float32(3e38)), 1, "train").outputs.kept
    assert np.isfinite(kept.values).all() and len(kept.values) == LAYER.width * len(kept.counts)
