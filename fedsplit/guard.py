"""The guard: what may leave a device, by its owner's limits; it asks the exposure accountant before every release.

On real nodes it enforces. In simulation it observes by default: everything leaves, and what would have been refused
is counted. A refusal is a coarse reason and a count, never a number of a record.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.dropping import unpack_bitmap
from fedsplit.model import FirstLayer
from fedsplit.packing import FloatArray, IntArray
from fedsplit.privacy.accountant import Cost, ExposureAccountant, epsilon
from fedsplit.privacy.criterion import LayerMap, coordinates, joint
from fedsplit.privacy.limits import Limits
from fedsplit.state import replacing
from fedsplit.wire import Reason


@dataclass(frozen=True)
class Proposal:
    """Releases that are about to leave, all of one exchange.

    Attributes
    ----------
    run, round_number : int
    weights : float32 array (parameters,)
    name : bytes
        Digest of all that decides the bytes besides the record; see :func:`release_name`.
    owners, records : int64 arrays (records,)
        Each record's device, and its number in the ledgers.
    segments : int64 array (records, segments of each)
        The numbers that it is counted under.
    bitmap : uint8 array (records, ceil(width / 8))
        The outputs that would be sent, as in :class:`fedsplit.dropping.Kept`.
    active : float64 array (records,)
        Share of the outputs that are above zero.
    cost : Cost
        Without leverage.
    exact : bool
        Whether a value sent is an equation in the record's numbers, as opposed to one bit.
    """

    run: int
    round_number: int
    weights: FloatArray
    name: bytes
    owners: IntArray
    records: IntArray
    segments: IntArray
    bitmap: NDArray[np.uint8]
    active: NDArray[np.float64]
    cost: Cost
    exact: bool


def release_name(weights: FloatArray, policy: str, mask_round: int) -> bytes:
    """Return a 32-byte name under which equal records give equal bytes."""
    return sha256(b"%s|%s|%d" % (sha256(weights.tobytes()).digest(), policy.encode(), mask_round)).digest()


class Guard:
    """Decides what leaves, and has it written down first.

    Parameters
    ----------
    limits : Limits
    accountant : ExposureAccountant
        Opened for this exchange: other processes may have written to it before.
    layer : FirstLayer
    enforce : bool
        Whether refusals hold, or are only counted.
    """

    def __init__(self, limits: Limits, accountant: ExposureAccountant, layer: FirstLayer, *, enforce: bool) -> None:
        self.limits = limits
        self.accountant = accountant
        self.layer = layer
        self.enforce = enforce

    def admit(self, proposal: Proposal) -> IntArray:
        """Judge the records of a proposal and write down those that leave.

        Returns
        -------
        int64 array (records,)
            0 for what the limits allow, else a :class:`Reason`. When enforcing, only the former may leave.
        """
        new = self.accountant.is_new(proposal.records, proposal.name)
        cost = _only(proposal.cost, new)
        if self.enforce:
            leverage = np.full(len(new), np.nan)
            leverage[new] = self._leverage(proposal, new)
            cost = Cost(**{**vars(cost), "leverage": leverage})
        codes = self._codes(proposal, new, cost)
        leaves = (codes == 0) | (not self.enforce)
        fresh = leaves & new
        self._remember(proposal, fresh)
        self.accountant.step(proposal.records[fresh], proposal.segments[fresh], proposal.name, _rows(cost, fresh))
        refused = int((codes != 0).sum()) if self.enforce else 0
        self.accountant.note(proposal.run, proposal.round_number if fresh.any() else 0, refused)
        self.accountant.save()
        return codes

    def admit_gradient(
        self, run: int, weights: FloatArray, delta: FloatArray, pattern: NDArray[np.bool_], segments: IntArray
    ) -> bool:
        """Judge a sum of first-layer gradients over some records, and write it down if it leaves.

        Parameters
        ----------
        weights : float32 array (parameters,)
            Those that released the records.
        delta : float32 array (records, width)
            Gradients at the pre-activations.
        pattern : bool array (records, width)
            The outputs that were sent of the records.
        segments : int64 array (records, segments of each)
        """
        if not self.enforce or not self.limits.gradients:
            return not self.enforce
        if self.accountant.refused(run) > self.limits.refusals or len(delta) < self.limits.gradient_records:
            return False
        found = joint(self._map(weights), [delta], [pattern])
        before = self.accountant.after(segments, Cost.of(len(segments), gradient=found.leverage)).gradient
        if found.share > self.limits.gradient_share or np.max(before) > self.limits.gradient_leverage:
            return False
        self.accountant.add_gradient(segments, found.leverage)
        self.accountant.save()
        return True

    def _codes(self, proposal: Proposal, new: NDArray[np.bool_], cost: Cost) -> IntArray:
        """Return each record's first reason; a record that was sent under this name before has none."""
        limits, accountant = self.limits, self.accountant
        after = accountant.after(proposal.segments, cost)
        numbers = np.prod(self.layer.input_shape)
        stale = proposal.round_number < accountant.last_round(proposal.run)
        rules: list[tuple[Reason, Any]] = [
            (Reason.CAPPED, self.enforce and accountant.refused(proposal.run) > limits.refusals),
            (Reason.WEIGHTS, self._fishing(proposal)),
            (Reason.ORDER, stale),
            (Reason.RELEASES, after.releases > limits.releases),
            (Reason.EQUATIONS, after.equations > limits.equations * numbers),
            (Reason.LEVERAGE, after.leverage >= limits.leverage),
            (Reason.EPSILON, self._beyond_epsilon(np.asarray(after.precision))),
        ]
        codes = np.zeros(len(new), dtype=np.int64)
        for reason, broken in reversed(rules):
            codes[np.broadcast_to(broken, codes.shape) & new] = reason
        return codes

    def _fishing(self, proposal: Proposal) -> NDArray[np.bool_] | bool:
        """Whether weights look made to read records: for relu, active on nearly all, or with a giant row."""
        if not self.layer.positive_only:
            return False
        rows = self.layer.unflatten(proposal.weights)["weight"]
        norms = np.linalg.norm(rows.reshape(len(rows), -1).astype(np.float64), axis=1)
        alive = norms[norms > 1e-6 * norms.max(initial=0.0)]
        if len(alive) and norms.max() > self.limits.row_norms * np.median(alive):
            return True
        owners, place = np.unique(proposal.owners, return_inverse=True)
        share = np.bincount(place, proposal.active, len(owners)) / np.bincount(place, minlength=len(owners))
        return np.asarray(share > self.limits.active)[place]

    def _beyond_epsilon(self, precision: NDArray[np.float64]) -> NDArray[np.bool_] | bool:
        if self.limits.epsilon is None:
            return False
        values, place = np.unique(precision, return_inverse=True)
        beyond = [epsilon(v, self.limits.delta) > self.limits.epsilon for v in values.tolist()]
        return np.array(beyond, dtype=bool)[place]

    def _leverage(self, proposal: Proposal, new: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the largest leverage of each new record in this release and all earlier ones together."""
        if not proposal.exact:
            return np.zeros(int(new.sum()))
        records = proposal.records[new]
        releases = [(self._map(proposal.weights), unpack_bitmap(proposal.bitmap[new], self.layer.width))]
        for path in self._history():
            with np.load(path, allow_pickle=False) as file:
                earlier = np.zeros((len(records), self.layer.width), dtype=bool)
                place = {record: i for i, record in enumerate(file["records"].tolist())}
                rows = [(i, place[r]) for i, r in enumerate(records.tolist()) if r in place]
                if rows:
                    own, theirs = np.array(rows).T
                    earlier[own] = unpack_bitmap(file["bitmap"][theirs], self.layer.width)
                    releases.append((self._map(file["weights"]), earlier))
        return np.asarray(coordinates(releases).largest)

    def _remember(self, proposal: Proposal, fresh: NDArray[np.bool_]) -> None:
        """Keep patterns and weights for the leverage of later releases, where there can be such."""
        if not (self.enforce and self.limits.releases > 1 and proposal.exact and fresh.any()):
            return
        folder = self.accountant.path.with_suffix(".history")
        folder.mkdir(exist_ok=True, mode=0o700)
        with replacing(folder / f"{len(self._history()):06d}.npz") as path, path.open("wb") as file:
            bitmap = proposal.bitmap[fresh]
            np.savez(file, weights=proposal.weights, records=proposal.records[fresh], bitmap=bitmap)

    def _history(self) -> Sequence[Path]:
        return sorted(self.accountant.path.with_suffix(".history").glob("*.npz"))

    def _map(self, weights: FloatArray) -> LayerMap:
        return LayerMap(self.layer, self.layer.unflatten(weights))


def _rows(cost: Cost, rows: NDArray[np.bool_]) -> Cost:
    return Cost(**{name: values[rows] for name, values in vars(cost).items()})


def _only(cost: Cost, new: NDArray[np.bool_]) -> Cost:
    """Return the cost with what has left before made free."""
    return Cost(**{name: np.where(new, values, 0) for name, values in vars(cost).items()})
