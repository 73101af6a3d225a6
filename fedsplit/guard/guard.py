"""The guard: what may leave a device, by its owner's limits; it asks the exposure accountant before every release.

On real nodes it enforces. In simulation it observes by default: everything leaves, and what would have been refused
is counted, but for what takes long to compute (leverages) and for what only refusals lead to (the cap on them).

A refusal is a coarse reason and a count, never a number of a record. That it is refused may still tell of a record:
the rules that do not look at records come first, and how often the others may refuse is bounded, over all runs.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedsplit.common.arrays import FloatArray, IntArray, unpack_bitmap
from fedsplit.guard.accountant import Cost, ExposureAccountant
from fedsplit.guard.criterion import LayerMap, coordinates
from fedsplit.guard.gaussian import largest_precision
from fedsplit.guard.gradient import Joint, joint
from fedsplit.guard.history import History, Sum
from fedsplit.guard.limits import Limits
from fedsplit.guard.proposal import Float64, Mask, Proposal, Summed
from fedsplit.model.layer import FirstLayer
from fedsplit.release.admitted import Admitted
from fedsplit.release.kept import Kept
from fedsplit.release.seal import SEAL
from fedsplit.wire.ledger import Reason

_TELLING = (Reason.WEIGHTS, Reason.EQUATIONS, Reason.LEVERAGE)  # as far as they look at the records


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
        self._history = History(accountant, layer)
        self._most_precision = largest_precision(limits.epsilon, limits.delta)

    def admit(self, proposal: Proposal) -> IntArray:
        """Judge the records of a proposal and write down those that leave.

        Returns
        -------
        int64 array (records,)
            0 for what the limits allow, else a :class:`Reason`. When enforcing, only the former may leave. What was
            sent under this name before is always allowed: it is nothing new.
        """
        accountant = self.accountant
        codes = np.zeros(len(proposal.records), dtype=np.int64)
        new = np.flatnonzero(accountant.is_new(proposal.records, proposal.name))
        codes[new] = self._by_terms(proposal.take(new))
        looked_at = new[(codes[new] == 0) | (codes[new] == Reason.EQUATIONS)]
        rows = new[codes[new] == 0]
        codes[rows] = self._by_activity(proposal.take(rows))
        rows = rows[codes[rows] == 0]
        if self.enforce:
            leverage = np.full(len(codes), np.nan)
            codes[rows], leverage[rows] = self._by_leverage(proposal.take(rows))
            proposal = replace(proposal, cost=replace(proposal.cost, leverage=leverage))
            rows = rows[codes[rows] == 0]
        codes[rows] = self._in_turn(proposal.take(rows))
        leaving = rows[codes[rows] == 0] if self.enforce else new
        telling = looked_at[np.isin(codes[looked_at], _TELLING)] if self.enforce else new[:0]
        # which records are judged together decides activity: there the same question has other answers
        again = accountant.was_refused(proposal.records[telling], proposal.name) & (codes[telling] != Reason.WEIGHTS)
        telling = telling[~again]
        if accountant.refused + len(telling) > self.limits.refusals and len(telling):
            codes[new], leaving = Reason.CAPPED, new[:0]  # one answer, and the last
            accountant.refused = self.limits.refusals
            telling = telling[:1]
        if len(leaving) or len(telling):
            lasting = telling[codes[telling] != Reason.WEIGHTS]
            accountant.refuse(proposal.records[lasting], proposal.name)
            accountant.refused += len(telling) - len(lasting)
            self._write(proposal.take(leaving))
        return codes

    def release(self, proposal: Proposal, kept: Kept) -> tuple[IntArray, Admitted]:
        """Judge what was kept of some records, and return what of it may leave.

        A record that stands there twice leaves twice and has told the same: it is judged once.

        Returns
        -------
        tuple
            Codes as of :meth:`admit`, and the outputs that may leave: all where the guard only observes.

        Raises
        ------
        ValueError
            If the proposal is of other outputs.
        """
        if not np.array_equal(proposal.bitmap, kept.bitmap):
            raise ValueError("a proposal must be of the outputs that are to leave")
        _, first, place = np.unique(proposal.records, return_index=True, return_inverse=True)
        once = len(first) == len(place)
        codes = self.admit(proposal) if once else self.admit(proposal.take(first))[place]
        leaving = kept.take(codes == 0) if self.enforce and codes.any() else kept
        return codes, Admitted(leaving, "guard", SEAL)

    def admit_gradient(self, summed: Summed) -> bool:
        """Judge a sum of first-layer gradients over some records, and write it down if it leaves.

        Returns
        -------
        bool
            Whether the limits allow it. When enforcing, only then may it leave.
        """
        limits, records, segments = self.limits, summed.records, summed.segments
        bounded = np.isfinite(self._most_precision)  # which a sum without noise never is
        allowed = limits.gradients and len(records) >= limits.gradient_records and not bounded
        if self.enforce and (not allowed or self._capped):
            return False
        if (name := summed.name) in self.accountant.sums:
            return allowed
        leverage = np.ones(len(records))
        if self.enforce:
            delta, pattern = summed.delta(self.layer.width), summed.pattern(self.layer.width)
            found, count = joint(self._map(summed.weights), [delta], [pattern]), len(records)
            leverage, equations = found.leverage, int(np.sum(self.accountant.spent(segments).equations))
            if related := self._history.related_sums(records):
                found, count, equations = self._together(summed, delta, pattern, related)
            missing = max(0, equations - int(np.count_nonzero(pattern)))  # those of other releases
            share = found.share + missing / (count * np.prod(self.layer.input_shape))
            added = self.accountant.after(segments, Cost.of(len(segments), gradient=leverage)).gradient
            largest = max(np.max(added), np.max(found.leverage))
            determined = found.largest >= limits.leverage  # by both together, as a convolution's equations can
            if share > limits.gradient_share or largest > limits.gradient_leverage or determined:
                return False
            self._history.keep_sum(name, records, segments, delta)
        self.accountant.add_gradient(name, segments, leverage)
        self.accountant.save()
        return allowed

    # ------------------------------------------------------------------ judging releases

    @property
    def _capped(self) -> bool:
        return self.accountant.refused > self.limits.refusals

    def _by_terms(self, proposal: Proposal) -> IntArray:
        """Return reasons by the rules that do not look at the records, and by each record's ledgers."""
        if self._capped:
            return np.full(len(proposal.records), Reason.CAPPED)
        if self._made_to_read(proposal):
            return np.full(len(proposal.records), Reason.WEIGHTS)
        if proposal.round_number < self.accountant.last_round(proposal.run):
            return np.full(len(proposal.records), Reason.ORDER)
        before, cost = self.accountant.spent(proposal.segments), proposal.cost
        after = [before.releases + 1, before.precision + cost.precision, before.equations + cost.equations]
        return self._within(np.array(after, dtype=np.float64))

    def _within(self, after: Float64) -> IntArray:
        """Return reasons by what will have left of records, ``(3, records)``: releases, precision and equations."""
        limits = self.limits
        most = limits.releases, self._most_precision, limits.equations * np.prod(self.layer.input_shape)
        broken = after > np.array(most)[:, None]
        reasons = np.array([Reason.RELEASES, Reason.EPSILON, Reason.EQUATIONS])
        return np.where(broken.any(axis=0), reasons[broken.argmax(axis=0)], 0)

    def _made_to_read(self, proposal: Proposal) -> bool:
        """Whether weights look made to read records: one giant row (relu), or bits that tell of single numbers."""
        if not self.layer.positive_only:
            return False
        squares = np.square(self._map(proposal.weights).kernels)
        norms = np.sqrt(squares.sum(axis=1))
        # rows that are next to nothing are dead, but not where nearly all were: then it is the others that are giants
        alive = norms[norms > 1e-6 * np.quantile(norms, 0.9, method="lower")]
        if len(alive) and norms.max() > self.limits.row_norms * np.median(alive):
            return True
        single = squares.max(axis=1) >= self.limits.leverage * np.square(norms)
        return not proposal.exact and bool((single & (norms > 0)).any())

    def _by_activity(self, proposal: Proposal) -> IntArray:
        """Return reasons by the share of relu outputs that weights make active on each device's records."""
        if not self.layer.positive_only:
            return np.zeros(len(proposal.owners), dtype=np.int64)
        owners, place = np.unique(proposal.owners, return_inverse=True)
        share = np.bincount(place, proposal.active, len(owners)) / np.bincount(place, minlength=len(owners))
        return np.where(share > self.limits.active, Reason.WEIGHTS, 0)[place]

    def _by_leverage(self, proposal: Proposal) -> tuple[IntArray, Float64]:
        """Return reasons by, and the largest leverage of each record's numbers in this release and all earlier ones.

        Where it cannot be known the record has had its releases: where earlier patterns were not kept, where sums of
        gradients have left, and where another record with the same segment has, since segments do not say which
        numbers they share.
        """
        if not (proposal.exact and len(proposal.records)):
            return np.zeros(len(proposal.records), dtype=np.int64), np.zeros(len(proposal.records))
        earlier, count, complete = self._history.releases(proposal.records)
        own = self._map(proposal.weights), unpack_bitmap(proposal.bitmap, self.layer.width)
        found = coordinates([own, *earlier])
        broken = (found.largest >= self.limits.leverage) | (found.determined > 0)
        spent = self.accountant.spent(proposal.segments)
        unknown = ~complete | (spent.releases > count) | (np.asarray(spent.gradient) > 0)
        return np.where(unknown, Reason.RELEASES, np.where(broken, Reason.LEVERAGE, 0)), found.largest

    def _in_turn(self, proposal: Proposal) -> IntArray:
        """Return reasons by the ledgers of records that leave one after another, where they share segments."""
        codes = np.zeros(len(proposal.records), dtype=np.int64)
        names, place = np.unique(proposal.segments, return_inverse=True)
        if len(names) == place.size:
            return codes
        before, cost = self.accountant.spent(names[:, None]), proposal.cost
        spent = np.array([before.releases, before.precision, before.equations], dtype=np.float64)
        costs = np.array([np.ones(len(codes)), cost.precision, cost.equations])
        shared = np.zeros(len(names), dtype=bool)
        for i, own in enumerate(map(np.unique, place.reshape(proposal.segments.shape))):
            codes[i] = self._within((spent[:, own].max(axis=1) + costs[:, i])[:, None])[0]
            if self.enforce and proposal.exact and shared[own].any():
                codes[i] = codes[i] or Reason.RELEASES  # see _by_leverage
            if not codes[i]:
                spent[:, own] += costs[:, i : i + 1]
                shared[own] = True
        return codes

    def _write(self, proposal: Proposal) -> None:
        """Write down what leaves."""
        accountant = self.accountant
        if len(proposal.records):
            if self.enforce and self.limits.releases > 1:  # else there is nothing that it would be judged with
                bitmap = proposal.bitmap if proposal.exact else np.zeros_like(proposal.bitmap)
                self._history.keep_release(proposal.name, proposal.weights, proposal.records, bitmap)
            accountant.step(proposal.records, proposal.segments, proposal.name, proposal.cost)
            accountant.note(proposal.run, proposal.round_number)
        accountant.save()

    def _together(
        self, summed: Summed, delta: FloatArray, pattern: Mask, related: Sequence[Sum]
    ) -> tuple[Joint, int, int]:
        """Return what sums of gradients tell together, of how many records, and how many equations have left of these.

        Sums that differ in little give that little away: together they tell more than what each does adds up to.
        """
        sums = [Sum(summed.records, summed.segments, delta), *related]
        records = np.unique(np.concatenate([s.records for s in sums]))
        deltas = np.zeros((len(sums), len(records), self.layer.width), dtype=np.float32)
        equations = np.zeros(len(records), dtype=np.int64)
        for i, each in enumerate(sums):
            rows = np.searchsorted(records, each.records)
            deltas[i, rows] = each.delta
            equations[rows] = self.accountant.spent(each.segments).equations
        kept = np.zeros(deltas.shape[1:], dtype=bool)
        kept[np.searchsorted(records, summed.records)] = pattern
        return joint(self._map(summed.weights), list(deltas), [kept]), len(records), int(equations.sum())

    def _map(self, weights: FloatArray) -> LayerMap:
        return LayerMap(self.layer, self.layer.unflatten(weights))
