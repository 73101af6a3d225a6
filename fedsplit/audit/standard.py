"""The attacks of every audit."""

import numpy as np

from fedsplit.audit.attack import Attack, Problem
from fedsplit.audit.attacks import Public, decoder, lmmse, map_qp, wiener
from fedsplit.audit.evidence import Array, GradientGroup
from fedsplit.audit.gradient_attacks import gradient_conv, gradient_dense
from fedsplit.model.kinds.base import double

_LARGEST_GRADIENT = 4e8  # elements of the equations that the gradient attack may hold
_NOTHING = "nothing was released"


class Wiener(Attack):
    """The most likely records under the class's Gaussian that satisfy the equations."""

    name = "Wiener"

    def reconstruct(self, problem: Problem) -> Array | str:
        """Solve the equations."""
        known = problem.equations
        if not any(len(r) for r in known.rhs):
            return "no equations were released"
        return wiener(problem.prior, problem.labels, known.rows, known.rhs, known.noise)


class Constrained(Attack):
    """The same within the box of possible numbers and the inequalities of what was not sent."""

    name = "constrained"
    slow = True

    def reconstruct(self, problem: Problem) -> Array | str:
        """Search."""
        known = problem.equations
        if not known.any:
            return "neither equations nor inequalities were released"
        return map_qp(problem.prior, problem.labels, known.rows, known.rhs, known.noise, known.inequalities)


class Linear(Attack):
    """A ridge regression from public records' own releases."""

    name = "linear, with label"

    def reconstruct(self, problem: Problem) -> Array | str:
        """Learn and apply it."""
        if problem.features is None:
            return _NOTHING
        return lmmse(problem.prior, _public(problem), problem.features[1], problem.labels)


class Decoder(Attack):
    """A small network that learns from public records' own releases."""

    name = "decoder, with label"

    def reconstruct(self, problem: Problem) -> Array | str:
        """Train and apply it."""
        if problem.features is None:
            return _NOTHING
        return decoder(problem.prior, _public(problem), problem.features[1], problem.labels, seed=problem.seed)


class Gradient(Attack):
    """Sums of first-layer gradients, solved for all their records together."""

    name = "gradient"

    def reconstruct(self, problem: Problem) -> Array | str:
        """Solve each group of sums."""
        if not problem.evidence.groups:
            return "no first-layer gradients were released"
        guess = np.broadcast_to(problem.prior.mean, (len(problem.targets), problem.numbers)).copy()
        reached = 0
        for group in problem.evidence.groups:
            places = np.flatnonzero((group.places >= 0) & (group.places < len(problem.targets)))
            found = _solved(problem, group)
            if found is not None and len(places):
                guess[group.places[places]] = found[places]
                reached += len(places)
        return guess if reached else "the sums are over more records than this attack can hold"


STANDARD: tuple[Attack, ...] = (Wiener(), Constrained(), Linear(), Decoder(), Gradient())


def _public(problem: Problem) -> Public:
    assert problem.features is not None
    public = problem.public
    known = public.y if problem.labels is not None else None
    return problem.features[0], public.x.reshape(len(public.x), -1), known


def _solved(problem: Problem, group: GradientGroup) -> Array | None:
    """Solve one group's sums for all its records; None if they are too many."""
    layer, prior, records = problem.evidence.layer, problem.prior, len(group.places)
    kind, shape = layer.kind, layer.cut_shape
    labels = None if problem.labels is None else group.labels
    deltas = [double(d).reshape(records, *shape) for d in group.deltas]
    pairs = zip(group.sums, deltas, strict=True)
    sums = [kind.of_records(double(total), delta).numpy() for total, delta in pairs]
    if kind.dense and len(shape) == 1:
        return gradient_dense(prior, labels, group.deltas, [total.reshape(shape[0], -1) for total in sums])
    if records * problem.numbers * sum(map(len, sums)) > _LARGEST_GRADIENT:
        return None

    def operator(i: int) -> Array:
        return np.concatenate([kind.operator(d[i]).numpy() for d in deltas], axis=1)

    return gradient_conv(prior, labels, operator, np.concatenate(sums), records)
