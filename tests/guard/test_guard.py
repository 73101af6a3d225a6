"""The guard: each rule by itself, then through the real ClientApp, with a server that sends what it likes."""

import json
import logging
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONFIGS, simulated_json, small_settings
from flwr.app import Context, Message, MessageType, RecordDict
from torch import nn

from fedsplit import DeviceData, SplitModel, simulate
from fedsplit.cli import main as cli
from fedsplit.common.errors import ConfigError, StateError
from fedsplit.data import Records
from fedsplit.device.home import Home
from fedsplit.device.link import HOME
from fedsplit.device.nodes import real_node
from fedsplit.flower.grid import InProcessGrid
from fedsplit.flower.record import TERMS, from_record, to_record
from fedsplit.guard.accountant import Cost, ExposureAccountant
from fedsplit.guard.gaussian import gaussian_precision
from fedsplit.guard.guard import Guard
from fedsplit.guard.limits import Limits
from fedsplit.guard.proposal import Proposal, Summed, release_name
from fedsplit.model.layer import FirstLayer
from fedsplit.model.tasks.targets import Classes
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.preflight import check_limits
from fedsplit.plan.settings import Settings, load_settings
from fedsplit.runs.client_app import client_app
from fedsplit.server.answers import PendingBlock, check_upload
from fedsplit.wire.exchange import CutGradients, Download, Upload, weights_digest
from fedsplit.wire.ledger import Reason

N, WIDTH = 16, 10
OWNER = b"o" * 32
NOTHING_LEAVES = "StateError: the node's own state is missing or damaged: nothing leaves"
LAYER = FirstLayer(nn.Linear(N, WIDTH), nn.ReLU(), (N,))
Guards = Callable[..., Guard]


def flat(rows: np.ndarray, bias: float = 0.0) -> np.ndarray:
    """The parameters of a layer with such rows."""
    return np.concatenate([rows.ravel(), np.full(len(rows), bias)]).astype(np.float32)


def dense(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(WIDTH, N)) / 4


def first(count: int, kept: int, width: int = WIDTH) -> np.ndarray:
    """The first outputs of some records."""
    return np.tile(np.arange(width) < kept, (count, 1))


def outputs(*counts: int) -> np.ndarray:
    """The first so many outputs of each record."""
    return np.concatenate([first(1, count) for count in counts])


def release(
    kept: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    records: Any = None,
    segments: Any = None,
    owners: Any = None,
    active: Any = 0.5,
    round_number: int = 1,
    run: int = 1,
    noise: float = 0.0,
    one_bit: bool = False,
    mask_round: int = 0,
) -> Proposal:
    """Some records of device 0 (unless ``owners`` says otherwise), of which these outputs would leave."""
    count = len(kept)
    weights = flat(dense()) if weights is None else weights
    owners = np.zeros(count, np.int64) if owners is None else np.asarray(owners)
    records = owners << 32 | (np.arange(count) if records is None else np.asarray(records))
    equations = 0 if one_bit else kept.sum(axis=1)
    return Proposal(
        run=run,
        round_number=round_number,
        weights=weights,
        name=release_name(LAYER, weights, "policy", mask_round),
        owners=owners,
        records=records,
        segments=records[:, None] if segments is None else np.asarray(segments),
        bitmap=np.packbits(kept, axis=1, bitorder="little"),
        active=np.broadcast_to(np.asarray(active, float), (count,)),
        cost=Cost.of(count, equations=equations, precision=gaussian_precision(noise), leverage=np.nan),
        exact=not one_bit,
    )


@pytest.fixture
def guards(tmp_path: Path) -> Guards:
    """Return a function that opens a guard over one and the same ledger, as every exchange does."""
    path = tmp_path / "ledger.npz"
    ExposureAccountant.create(path, OWNER)

    def opened(*, enforce: bool = True, layer: FirstLayer = LAYER, **changes: Any) -> Guard:
        chosen = Limits(**{name.replace("_", "-"): value for name, value in changes.items()})
        return Guard(chosen, ExposureAccountant(path, OWNER), layer, enforce=enforce)

    return opened


def held(guards: Guards) -> dict[int, tuple[int, int]]:
    """Releases and equations of every ledger, as the file has them."""
    return {name: (spent.releases, spent.equations) for name, spent in guards().accountant.rows()}


def kept_by(activation: nn.Module) -> FirstLayer:
    return FirstLayer(nn.Linear(N, WIDTH), activation, (N,))


# --- releases, rule by rule ----------------------------------------------------------------------------------------


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


# --- sums of gradients ---------------------------------------------------------------------------------------------

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


def deltas(count: int, width: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


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


# --- through the ClientApp: a server that sends what it likes --------------------------------------------------------


def private(device_id: int, num_devices: int) -> DeviceData:
    """Records whose numbers can be looked for in whatever a node says."""
    rng = np.random.default_rng(1000 + device_id)
    x, y = rng.normal(size=(30, N)).astype(np.float32), rng.integers(0, 3, 30)
    return DeviceData(train=(x[:20], y[:20]), test=(x[20:], y[20:]))


def model() -> SplitModel:
    net = nn.Sequential(nn.Linear(N, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))
    with torch.no_grad():
        net[0].weight[:] = torch.from_numpy(dense(42))
        net[0].bias[:] = 0
    return SplitModel.from_sequential(net, input_shape=(N,))


def tanh_model() -> SplitModel:
    return SplitModel.from_sequential(nn.Sequential(nn.Linear(N, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)), (N,))


NAMED = ["test_guard:private"]


def run_settings(folder: Path, lines: str = "", mode: str = "enforce", **changes: Any) -> Settings:
    """A run over three devices, whose guard has the limits of the given lines."""
    folder.mkdir(exist_ok=True)
    (folder / "limits.toml").write_text(lines)
    given = {
        "data": {"builder": "test_guard:private"},
        "model": {"builder": "test_guard:model"},
        "devices": {"count": 3, "test": [2], "per-node": 3},
        "dropping": {"policy": "top-k", "k": 2},
        "guard": {"mode": mode, "limits": str(folder / "limits.toml")},
    }
    return small_settings(
        **{section: {**given.get(section, {}), **changes.get(section, {})} for section in given | changes}
    )


class Server:
    """Talks to the nodes of a run, and remembers all that it hears."""

    def __init__(self, settings: Settings, folder: Path, home: Path | None = None) -> None:
        experiment = Experiment(settings)
        self.layer, self.terms = experiment.model.first_layer, experiment.terms.to_json()
        self.app = client_app(simulated_json(settings), str(folder / "nodes"))
        nodes = -(-settings.devices.count // settings.devices.per_node) if settings.devices.count else 0
        self.grid = InProcessGrid(self.app, nodes)
        self.home, self.bits = home, settings.dropping.bits
        self.states = folder / "nodes"
        self.released: dict[tuple[int, int], np.ndarray] = {}  # records of each device, by weights and round
        self.heard: list[bytes] = []
        self.errors: list[str] = []
        self.asked = 0

    def ask(
        self,
        round_number: int = 1,
        *,
        weights: np.ndarray | None = None,
        rows: Any = None,
        run: int = 1,
        pending: Any = (),
        per_device: bool = False,
    ) -> Download:
        """A download that asks for all records of all devices, unless ``rows`` says otherwise."""
        rows = [(0, 0, 0, 20), (1, 0, 0, 20), (2, 0, 0, 20)] if rows is None else rows
        weights = flat(dense(42)) if weights is None else weights
        schedule = np.array(rows, np.int64).reshape(-1, 4)
        self.asked += 1
        return Download(run, round_number, 0, per_device, weights, schedule, list(pending), nonce=self.asked)

    def send(
        self, download: Download, kind: str = MessageType.TRAIN, node: int = 2, *, honest: bool = True
    ) -> Upload | None:
        """Return what the node answers; None if that is an error. An honest server accepts the answer."""
        message = Message(to_record(download.to_bytes()), node, kind, ttl=100.0)
        if self.home is not None:
            context = Context(1, node, {HOME: str(self.home)}, RecordDict(), {TERMS: self.terms})
            try:
                reply = self.app(message, context)
            except Exception as error:  # what Flower would send
                self.errors.append(f"{type(error).__name__}: {error}")
                return None
        else:
            (reply,) = self.grid.send_and_receive([message])
        if reply.has_error():
            self.errors.append(str(reply.error.reason))
            return None
        self.heard.append(from_record(reply.content))
        upload = Upload.from_bytes(self.heard[-1], parameters=self.layer.size)
        if honest:
            blocks = [PendingBlock(cut, self.released[cut.digest, cut.round_number]) for cut in download.pending]
            check_upload(upload, download, blocks, self.layer.width, Classes(3))
        self.released[weights_digest(download.weights), download.round_number] = upload.release.records
        return upload

    def cut(self, upload: Upload, download: Download, deltas: np.ndarray) -> CutGradients:
        """Cut gradients for what was released: ``deltas`` (records, width) at what was sent."""
        released = upload.release
        pattern = np.unpackbits(released.bitmap, axis=1, count=WIDTH, bitorder="little").astype(bool)
        own = np.repeat(released.devices, released.records)
        lengths = [int(pattern[own == d].sum()) for d in released.devices]
        digest = weights_digest(download.weights)
        values = np.asarray(deltas, np.float32)[pattern]
        return CutGradients.pack(download.round_number, digest, released.devices, np.array(lengths), values, "float32")


@pytest.fixture
def server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[..., Server]]:
    """Return a function that starts a hostile server; what it and the logs have heard holds no record's number."""
    started: list[Server] = []
    caplog.set_level(logging.DEBUG)

    def start(lines: str = "", *, home: Path | None = None, **changes: Any) -> Server:
        folder = tmp_path / f"server{len(started)}"
        settings = run_settings(folder, lines, **changes)
        started.append(Server(settings, folder, home))
        return started[-1]

    yield start
    for one in started:
        said(one, *map(logging.Formatter().format, caplog.get_records("call")))


def said(server: Server, *texts: str) -> None:
    """Look for the numbers of all records: as bytes in payloads, as decimals in texts."""
    records = [private(device, 3) for device in range(3)]
    numbers = np.concatenate([part.x.ravel() for data in records for part in (data.train, data.test)])
    wanted = {struct.pack(f"{order}{kind}", v) for v in numbers.tolist() for order in "<>" for kind in "fd"}
    for payload in server.heard:
        assert not wanted & {payload[i : i + size] for size in (4, 8) for i in range(len(payload) - size + 1)}
    for text in (*server.errors, *texts):
        assert not [v for v in numbers.tolist() if f"{v:.5g}" in text or repr(v)[:7] in text]


def test_a_number_that_is_said_is_found(tmp_path: Path) -> None:
    """In all the ways in which the tests below look for it."""
    x = private(1, 3).train.x
    for told in (
        x[3].tobytes(),
        b"..." + x[3, :1].astype(">f8").tobytes(),
        str(x[5, 2]),
        f"{x[0]}",
        repr(float(x[9, 9])),
    ):
        server = Server(run_settings(tmp_path), tmp_path)
        (server.heard if isinstance(told, bytes) else server.errors).append(told)  # type: ignore[arg-type]
        with pytest.raises(AssertionError):
            said(server)
        with pytest.raises(AssertionError):
            said(Server(run_settings(tmp_path), tmp_path), f"a log says {x[7, 7]}")


def only_refusals(upload: Upload | None, expected: dict[int, tuple[Reason, int]]) -> None:
    """A node's answer holds no output, no gradient and no label: only devices, reasons and counts."""
    assert upload is not None
    release, gradients = upload.release, upload.gradients
    for part in (release.devices, release.records, release.targets, release.counts, release.bitmap, release.codes):
        assert part.size == 0
    assert release.exponents.size == gradients.devices.size == gradients.records.size == gradients.sums.size == 0
    assert upload.failed.size == 0
    assert {d: (Reason(r), n) for d, r, n in upload.refused.tolist()} == expected


def all_of(reason: Reason, records: int = 20) -> dict[int, tuple[Reason, int]]:
    return {device: (reason, records) for device in range(3)}


def state_of(server: Server, run: int = 1, node: int = 0) -> dict[str, bytes]:
    folder = server.states / f"{run:x}" / str(node)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


Start = Callable[..., Server]


def test_what_the_shipped_limits_allow_goes_through(server: Start) -> None:
    hostile = server()
    upload = hostile.send(hostile.ask())
    assert upload is not None and len(upload.release.targets) == 60 and not len(upload.refused)
    assert upload.ledger.exposures == 1 and upload.ledger.equations <= 2 and 0 < upload.ledger.leverage < 0.9


def test_one_pixel_weights_bring_refusals(server: Start) -> None:
    hostile = server("refusals = 1000")
    only_refusals(hostile.send(hostile.ask(weights=flat(np.eye(WIDTH, N), 9.0))), all_of(Reason.WEIGHTS))
    leverage = hostile.send(hostile.ask(weights=flat(np.eye(WIDTH, N))))
    sent = np.repeat(leverage.release.devices, leverage.release.records) if leverage else np.zeros(0)
    refused = {d: (Reason(r), n) for d, r, n in leverage.refused.tolist()} if leverage else {}
    assert {d: n + int((sent == d).sum()) for d, (_, n) in refused.items()} == dict.fromkeys(range(3), 20)
    assert {r for r, _ in refused.values()} == {Reason.LEVERAGE}
    assert leverage is not None and not leverage.release.counts.any()  # what has left had no active output


def test_one_pixel_bits_bring_refusals(server: Start) -> None:
    hostile = server(dropping={"policy": "bits", "k": None, "bits": 1})
    only_refusals(hostile.send(hostile.ask(weights=flat(np.eye(WIDTH, N)))), all_of(Reason.WEIGHTS))


def test_a_giant_row_brings_refusals(server: Start) -> None:
    hostile, rows = server(), dense()
    rows[4] *= 1e8
    only_refusals(hostile.send(hostile.ask(weights=flat(rows))), all_of(Reason.WEIGHTS))
    assert hostile.send(hostile.ask()) is not None


@pytest.mark.parametrize("policy", [{"policy": "none", "k": None}, {"policy": "random", "k": None, "keep": 1.0}])
def test_settings_that_keep_everything_bring_refusals(policy: dict[str, Any], server: Start) -> None:
    hostile = server(dropping=policy, model={"builder": "test_guard:tanh_model"})
    only_refusals(hostile.send(hostile.ask()), all_of(Reason.EQUATIONS))


def test_an_older_round_brings_refusals(server: Start) -> None:
    hostile = server()
    hostile.send(hostile.ask(5, rows=[(0, 0, 0, 10)]))
    old = hostile.ask(4, rows=[(0, 0, 10, 20), (1, 0, 0, 20)], weights=flat(dense(1)))
    only_refusals(hostile.send(old), {0: (Reason.ORDER, 10), 1: (Reason.ORDER, 20)})


@pytest.mark.parametrize("policy", ["top-k", "random", "at-most"])
def test_a_replay_brings_the_same_bytes_and_costs_nothing(policy: str, server: Start) -> None:
    """Also with later rounds between, also of a part of the chunk, and after the cap."""
    k = {"k": None, "keep": 0.1} if policy == "random" else {"k": 2}
    hostile = server("refusals = 0\nleverage = 1.0", dropping={"policy": policy, **k})
    old = hostile.ask(3, rows=[(0, 0, 0, 10), (1, 0, 0, 20)])
    replies = [hostile.send(old)]
    hostile.send(hostile.ask(4, rows=[(0, 0, 0, 20)], weights=flat(dense(1))))
    refusal = hostile.send(hostile.ask(4, rows=[(2, 0, 0, 1)], weights=flat(dense(1), 9.0)))
    only_refusals(refusal, {2: (Reason.CAPPED, 1)})  # one too many
    refusal = hostile.send(hostile.ask(5, rows=[(2, 0, 0, 20)], weights=flat(dense(1))))
    only_refusals(refusal, {2: (Reason.CAPPED, 20)})
    ledgers = {name: content for name, content in state_of(hostile).items() if name.startswith("ledger")}
    replies += [hostile.send(old), hostile.send(hostile.ask(3, rows=[(1, 0, 0, 20)]))]
    assert ledgers == {name: content for name, content in state_of(hostile).items() if name.startswith("ledger")}
    parts = [r.release for r in replies if r is not None]
    assert len(parts) == 3 and len(parts[0].targets) > 20
    for one, other in zip(parts[0].arrays(), parts[1].arrays(), strict=True):
        assert one.tobytes() == other.tobytes()
    tail = int(parts[2].counts.sum())
    assert parts[0].codes[-tail:].tobytes() == parts[2].codes.tobytes()
    assert parts[0].bitmap[-20:].tobytes() == parts[2].bitmap.tobytes()


def test_rounds_made_up_to_get_other_masks_bring_refusals(server: Start) -> None:
    hostile = server("leverage = 1.0", dropping={"policy": "at-most", "k": 2})
    asked = hostile.send(hostile.ask(1))
    assert asked is not None and len(asked.release.targets) == 60
    for round_number in (2, 3, 2**32 - 1):
        only_refusals(hostile.send(hostile.ask(round_number)), all_of(Reason.RELEASES))
    only_refusals(hostile.send(hostile.ask(4, weights=flat(dense(3)))), all_of(Reason.RELEASES))


def test_evaluation_has_limits_too(server: Start) -> None:
    hostile, rows = server(), [(d, 0, 0, 10) for d in range(3)]
    first_time = hostile.send(hostile.ask(rows=rows), MessageType.EVALUATE)
    assert first_time is not None and len(first_time.release.targets) == 30
    other = hostile.ask(2, rows=rows, weights=flat(dense(3)))
    only_refusals(hostile.send(other, MessageType.EVALUATE), all_of(Reason.RELEASES, 10))
    only_refusals(
        hostile.send(hostile.ask(2, rows=rows, weights=flat(dense(3), 9.0)), MessageType.EVALUATE),
        all_of(Reason.RELEASES, 10),
    )


def test_in_simulation_a_new_run_begins_new_ledgers(server: Start) -> None:
    """Simulated nodes are born with a run. Real ones are not; see below."""
    hostile = server()
    for run in (1, 2):
        upload = hostile.send(hostile.ask(run=run, weights=flat(dense(run))))
        assert upload is not None and len(upload.release.targets) == 60 and upload.ledger.exposures == 1


def test_a_real_node_counts_over_all_runs(server: Start, tmp_path: Path) -> None:
    Home.create(tmp_path / "home", [0, 1, 2], NAMED)
    settings = {"protocol": {"mode": "single-pass", "chunk": "epoch"}, "first-layer": {"strategy": "frozen"}}
    hostile = server(home=tmp_path / "home", **settings)
    upload = hostile.send(hostile.ask())
    assert upload is not None and len(upload.release.targets) == 60
    for run in (1, 2, 2**62):
        only_refusals(hostile.send(hostile.ask(2, run=run, weights=flat(dense(3)))), all_of(Reason.RELEASES))
    (tmp_path / "home" / "ledger-train.npz").unlink()
    assert hostile.send(hostile.ask(3)) is None and hostile.errors[-1] == NOTHING_LEAVES


def test_a_real_node_runs_no_code_that_its_owner_has_not_allowed(server: Start, tmp_path: Path) -> None:
    """It needs no model's: that of a run is not named."""
    Home.create(tmp_path / "home", [0, 1, 2], ["test_guard:model"])
    hostile = server(home=tmp_path / "home", protocol={"mode": "single-pass", "chunk": "epoch"})
    assert hostile.send(hostile.ask()) is None
    assert "data.builder 'test_guard:private' is not among what the node's owner allows" in hostile.errors[-1]
    assert "test_guard:model" not in hostile.terms


def test_a_real_node_opens_no_folder_that_its_owner_has_not_allowed(tmp_path: Path) -> None:
    Home.create(tmp_path / "home", [0], ["own:linear_model"])
    terms = json.loads(Experiment(small_settings()).terms.to_json())
    terms["data"] |= {"builder": None, "folder": str(tmp_path / "other")}
    with pytest.raises(ConfigError, match=r"data\.folder .* is not among what the node's owner allows"):
        real_node(json.dumps(terms), str(tmp_path / "home"))


def test_a_device_of_a_real_node_whose_records_were_changed_sits_out(server: Start, tmp_path: Path) -> None:
    home = Home.create(tmp_path / "home", [0, 1, 2], NAMED)
    home.known(1, private(2, 3))  # what device 1 held before
    settings = {"protocol": {"mode": "single-pass", "chunk": "epoch"}, "first-layer": {"strategy": "frozen"}}
    hostile = server(home=tmp_path / "home", **settings)
    upload = hostile.send(hostile.ask())
    assert upload is not None and upload.failed.tolist() == [1] and upload.release.devices.tolist() == [0, 2]


def test_a_real_node_answers_no_more_questions_in_new_runs(server: Start, tmp_path: Path) -> None:
    """Which weights are refused for being active is a threshold of the server's choice on a record."""
    Home.create(tmp_path / "home", [0, 1, 2], NAMED)
    (tmp_path / "home" / "limits.toml").write_text("refusals = 5")
    settings = {"protocol": {"mode": "single-pass", "chunk": "epoch"}, "first-layer": {"strategy": "frozen"}}
    hostile = server(home=tmp_path / "home", **settings)
    told: list[Reason] = []
    for run in range(1, 12):
        upload = hostile.send(hostile.ask(run=run, rows=[(0, 0, 0, 1)], weights=flat(dense(run), 20.0)))
        assert upload is not None
        told += [Reason(r) for _, r, _ in upload.refused.tolist()]
    assert told == [Reason.WEIGHTS] * 5 + [Reason.CAPPED] * 6


def telling(device_id: int, num_devices: int) -> DeviceData:
    """A device's own code that fails with its records in the text."""
    data = private(device_id, num_devices)
    if device_id == 1:
        raise ValueError(f"cannot use {data.train.x[0].tolist()}")
    return data


def test_a_device_that_fails_says_nothing_of_its_records(server: Start) -> None:
    hostile = server(data={"builder": "test_guard:telling"})
    upload = hostile.send(hostile.ask())
    assert upload is not None and upload.failed.tolist() == [1] and len(upload.release.targets) == 40


@pytest.mark.parametrize("place", ["fedsplit.guard.releaser.forward", "fedsplit.guard.guard.coordinates"])
def test_an_unforeseen_error_says_nothing_of_records(
    place: str, server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = server()

    def fails(*arguments: Any, **more: Any) -> None:
        raise ValueError(f"cannot use {private(0, 3).train.x[0].tolist()}")

    with monkeypatch.context() as patched:
        patched.setattr(place, fails)
        assert hostile.send(hostile.ask()) is None
    assert hostile.errors == ["RunError: ValueError in a train message"]
    assert hostile.send(hostile.ask()) is not None


# --- gradients through the ClientApp -------------------------------------------------------------------------------

LOOSE = "gradients = true\nleverage = 1.0"
FINE = {"dropping": {"policy": "top-k", "k": 2}}


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


# --- damage during a run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "cut off", "a flipped bit", "another node's"])
@pytest.mark.parametrize("mode", ["enforce", "observe"])
def test_a_node_whose_ledger_is_damaged_is_silent_and_others_go_on(damage: str, mode: str, server: Start) -> None:
    hostile = server(mode=mode, devices={"count": 3, "test": [2], "per-node": 1})
    chunk = [hostile.ask(rows=[(d, 0, 0, 10)]) for d in range(2)]
    assert all(hostile.send(chunk[d], node=2 + d) for d in range(2))
    path = hostile.states / "1" / "0" / "ledger-train.npz"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "another node's":
        path.write_bytes((hostile.states / "1" / "1" / "ledger-train.npz").read_bytes())
    else:
        content[200] ^= damage == "a flipped bit"
        path.write_bytes(content[: len(content) - 100 * (damage == "cut off")])
    left = path.read_bytes() if path.exists() else None
    for again in (chunk[0], hostile.ask(2, rows=[(0, 0, 10, 20)])):
        assert hostile.send(again, node=2) is None
        assert hostile.errors[-1] == NOTHING_LEAVES
    assert (path.read_bytes() if path.exists() else None) == left  # never begun anew
    other = hostile.send(hostile.ask(2, rows=[(1, 0, 10, 20)]), node=3)
    assert other is not None and len(other.release.targets) == 10


def test_a_run_goes_on_without_the_node_whose_ledger_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = run_settings(tmp_path / "s", mode="observe", devices={"count": 3, "test": [2], "per-node": 1})
    samples = []

    def lose(metrics: dict[str, Any]) -> None:
        samples.append(metrics["round"])
        if metrics["round"] == 2:
            (path,) = (tmp_path / "run" / "nodes").glob("*/1/ledger-train.npz")
            path.unlink()

    result = simulate(settings, out=tmp_path / "run", report=lose)
    assert result["rounds"] == 4 and result["samples"] == 2 * 60 + 2 * 40 and result["test_accuracy"] is not None
    said = " ".join(record.getMessage() for record in caplog.records if record.name == "fedsplit.server.round")
    assert "nothing leaves" in said and "ledger" not in said  # which only the node's own log tells


def test_a_run_goes_on_without_the_device_that_is_refused(tmp_path: Path) -> None:
    settings = run_settings(
        tmp_path / "s",
        "refusals = 1000",
        data={"builder": "test_guard:one_active"},
        protocol={"mode": "single-pass", "chunk": "spread"},
        first_layer={"strategy": "frozen"},
    )
    result = simulate(settings, out=tmp_path / "run")
    assert result["guard"] == {"mode": "enforce", "refused": {"weights": 20}, "test_refused": {}}
    assert result["samples"] == 40 and result["exposures_max"] == 1 and result["test_accuracy"] is not None


def one_active(device_id: int, num_devices: int) -> DeviceData:
    """The records of device 1 make all outputs of the model active."""
    data = private(device_id, num_devices)
    if device_id != 1:
        return data
    toward = np.linalg.lstsq(dense(42), np.full(WIDTH, 30.0), rcond=None)[0].astype(np.float32)
    return DeviceData(train=(data.train.x + toward, data.train.y), test=(data.test.x + toward, data.test.y))


# --- observing through the ClientApp -------------------------------------------------------------------------------


def test_observing_lets_everything_leave_and_says_the_same(server: Start) -> None:
    keep_all = {"policy": "none", "k": None}
    asks = {
        "keeps all": [(1, dense(42), 0.0)],
        "active": [(1, dense(42), 30.0)],
        "again": [(1, dense(42), -9.0), (2, dense(1), 0.0)],
    }
    for rounds in asks.values():
        seen = {}
        for mode in ("observe", "enforce"):
            hostile = server("refusals = 1000", mode=mode, dropping=keep_all)
            answers = [hostile.send(hostile.ask(r, weights=flat(w, bias))) for r, w, bias in rounds]
            assert all(answer is not None for answer in answers)
            if mode == "observe":
                assert [len(a.release.targets) for a in answers if a] == [60] * len(rounds)
            seen[mode] = [a.refused.tolist() for a in answers if a]
        assert seen["observe"] == seen["enforce"] and any(seen["observe"])


# --- before a run --------------------------------------------------------------------------------------------------


def planned(settings: Settings) -> tuple[Any, ...]:
    """Return the run as the preflight takes it, with the limits that the settings name."""
    experiment = Experiment(settings)
    return experiment.terms, experiment.source, experiment.model.first_layer, experiment.policy, experiment.limits


def test_the_private_configuration_passes_the_preflight() -> None:
    check_limits(*planned(load_settings(CONFIGS / "mnist-private.toml", ["guard.mode=enforce"])))


def test_the_published_configuration_is_refused_with_the_ways_out() -> None:
    run = planned(load_settings(CONFIGS / "mnist-paper.toml", ["guard.mode=enforce"]))
    with pytest.raises(ConfigError) as caught:
        check_limits(*run)
    text = str(caught.value)
    assert "\n" not in text
    for said in ("up to 12 times, releases is 1", "'release-once' or 'single-pass'", "gradients is false", "'frozen'"):
        assert said in text


PIPELINED = {"mode": "pipelined"}
FROZEN = {"first_layer": {"strategy": "frozen"}}


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"protocol": PIPELINED, **FROZEN}, ""),  # top-k of the same weights: the same bytes
        ({"protocol": PIPELINED, "dropping": {"policy": "random", "keep": 0.1, "k": None}, **FROZEN}, "up to 4 times"),
        ({"protocol": {**PIPELINED, "chunk": 7}, "run": {"rounds": 3, "evaluate-every": 0}}, "gradients is false"),
        ({"protocol": {**PIPELINED, "chunk": 7}, "run": {"rounds": 4, "evaluate-every": 0}}, "up to 2 times"),
        ({"protocol": {"mode": "single-pass"}, "run": {"rounds": 4, "evaluate-every": 0}, **FROZEN}, ""),
        ({"protocol": PIPELINED, "run": {"rounds": 4, "evaluate-every": 2}}, "each test record would be released 2"),
        ({"protocol": PIPELINED, **FROZEN, "data": {"builder": "test_guard:overlapping"}}, "up to 2 records share a"),
    ],
)
def test_the_preflight_counts_what_would_leave(changes: dict[str, Any], refused: str, tmp_path: Path) -> None:
    """Of 20 records, seven at a time, three rounds are one pass."""
    settings = run_settings(tmp_path / "s", "equations = 1.0", **changes)
    try:
        check_limits(*planned(settings))
    except ConfigError as error:
        assert refused and refused in str(error)
        assert ("times" in refused) == ("each record would" in str(error)) or "test" in refused
    else:
        assert not refused


@pytest.mark.parametrize(
    ("lines", "strategy", "chunk", "said"),
    [
        ("", "FedMedian", 20, "; FedMedian needs each device's alone, which tell more than a sum over a node's"),
        ("gradients = true\nepsilon = 3.0", "Krum", 20, "; Krum needs each device's alone"),
        ("", "FedAdam", 20, ""),
        (
            "gradients = true\ngradient-records = 21",
            "Krum",
            "epoch",
            "each device alone, of 20 records at most, gradient-",
        ),
        ("gradients = true\ngradient-records = 8", "Krum", 7, "each device alone, of 7 records at most, gradient-"),
        ("gradients = true\ngradient-records = 8", "FedAdam", 7, None),
        ("gradients = true\ngradient-records = 7", "Krum", 7, None),
    ],
)
def test_the_preflight_says_what_a_robust_strategy_needs(
    lines: str, strategy: str, chunk: int | str, said: str | None, tmp_path: Path
) -> None:
    changes = {"protocol": {**PIPELINED, "chunk": chunk}, "run": {"rounds": 1}, "first_layer": {"strategy": strategy}}
    settings = run_settings(tmp_path / "s", f"equations = 1.0\n{lines}", **changes)
    if said is None:
        check_limits(*planned(settings))
        return
    with pytest.raises(ConfigError) as caught:
        check_limits(*planned(settings))
    assert said in str(caught.value) and ("alone" in str(caught.value)) == bool(said)


def overlapping(device_id: int, num_devices: int) -> DeviceData:
    """Every record shares a segment with the next."""
    train, test = (private(device_id, num_devices).train, private(device_id, num_devices).test)
    parts = [Records(r.x, r.y, np.arange(len(r))[:, None] + [0, 1]) for r in (train, test)]
    return DeviceData(*parts)


def test_the_command_line_refuses_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(CONFIGS / "mnist-paper.toml"), "--out", str(tmp_path / "run"), "--set", "guard.mode=enforce"]
    arguments += ["--engine", "inline"]  # a Ray that starts meanwhile has its say on stderr, too
    monkeypatch.setattr(sys, "argv", ["fedsplit", "simulate", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(cli, "_quiet", lambda verbose: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == "" and not (tmp_path / "run").exists()
    (line,) = said.err.splitlines()
    assert line.startswith("fedsplit: the limits do not allow this run: ")
