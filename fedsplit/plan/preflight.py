"""Before any record leaves: whether a run can go to its end under the owner's limits, and the ways out if not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedsplit.common.arrays import IntArray
from fedsplit.common.errors import ConfigError
from fedsplit.data import Records, Source
from fedsplit.guard.gaussian import epsilon, gaussian_precision, largest_precision
from fedsplit.guard.limits import Limits
from fedsplit.model.layer import FirstLayer
from fedsplit.plan.schedule import Schedule
from fedsplit.release.policy import Policy
from fedsplit.wire.terms import Terms


@dataclass(frozen=True)
class _Plan:
    """A run, the records of the devices that are asked, and the limits."""

    terms: Terms
    layer: FirstLayer
    policy: Policy
    limits: Limits
    train: dict[int, Records]
    test: list[Records]

    @cached_property
    def passes(self) -> int:
        """The most times that something new of a training record would leave."""
        asked, keyed = self.terms.asked, self.terms.keyed or self.policy.deterministic
        if asked.once or (keyed and not asked.teaches):
            return 1  # the same weights and masks give the same bytes
        counts = {d: len(records) for d, records in self.train.items()}
        if asked.fraction == 1.0:  # devices of one size are asked alike
            counts = {d: n for n, d in {n: d for d, n in counts.items()}.items()}
        schedule = Schedule(asked.once, asked.chunk, asked.fraction, asked.rounds, self.terms.seed, asked.sampling)
        schedule.set_counts(counts)
        seen: dict[int, set[int]] = {}
        for round_number in range(1, asked.rounds + 1):
            for device, row in schedule.rows(round_number).items():
                seen.setdefault(device, set()).add(row[1])
        return max(map(len, seen.values()), default=0)

    @property
    def most_asked(self) -> int:
        """The most records that a device is asked for in a round."""
        chunk, most = self.terms.asked.chunk, max(map(len, self.train.values()), default=0)
        if chunk == "spread":
            return math.ceil(most / self.terms.asked.rounds)
        return most if isinstance(chunk, str) else min(chunk, most)

    @property
    def evaluations(self) -> int:
        """How often something new of a test record would leave."""
        asked = self.terms.asked
        if not self.test:
            return 0
        return 1 if asked.evaluate_every == 0 or not asked.teaches else math.ceil(asked.rounds / asked.evaluate_every)


def check_limits(
    terms: Terms,
    source: Source,
    layer: FirstLayer,
    policy: Policy,
    limits: Limits,
    devices: Sequence[int] | None = None,
) -> None:
    """Refuse a run that the limits would stop half-way.

    Parameters
    ----------
    devices : sequence of int, optional
        Whose records are looked at; default: all. One whose records cannot be read sits out the run.

    Raises
    ------
    ConfigError
        In one line: each limit that the run cannot keep, and what would keep it.
    """
    train, test = {}, []
    for device in range(source.count) if devices is None else devices:
        try:
            data = source.device(device)
        except Exception:  # a device's own code may raise anything
            continue
        if device not in terms.asked.donors:
            train[device] = data.train
        if len(data.test) and (source.chosen is None or device in source.chosen):
            test.append(data.test)
    plan = _Plan(terms, layer, policy, limits, train, test)
    rules = (_labels, _releases, _overlap, _evaluations, _gradients, _equations, _epsilon)
    problems = [text for rule in rules if (text := rule(plan))]
    if problems:
        raise ConfigError(f"the limits do not allow this run: {'; '.join(problems)}")


def _labels(plan: _Plan) -> str:
    if plan.limits.labels or plan.terms.head is not None:
        return ""
    return "labels would leave, labels is false (use protocol.labels 'at-home')"


def _releases(plan: _Plan) -> str:
    if plan.passes <= plan.limits.releases:
        return ""
    return (
        f"each record would be released up to {plan.passes} times, releases is {plan.limits.releases} "
        "(use protocol.mode 'release-once' or 'single-pass', or fewer run.rounds)"
    )


def _overlap(plan: _Plan) -> str:
    for parts, times in ((plan.train.values(), plan.passes), (plan.test, plan.evaluations)):
        shared = max((_sharing(r.segments) for r in parts if r.segments is not None), default=1)
        # of records that share numbers one may leave, unless what leaves are single bits
        if shared > 1 and (plan.policy.code.exact or shared * times > plan.limits.releases):
            return f"up to {shared} records share a segment, and would not all be released (use data.overlap = false)"
    return ""


def _evaluations(plan: _Plan) -> str:
    if plan.evaluations <= plan.limits.releases:
        return ""
    return (
        f"each test record would be released {plan.evaluations} times, releases is {plan.limits.releases} "
        "(use run.evaluate-every = 0)"
    )


def _gradients(plan: _Plan) -> str:
    if not plan.terms.asked.teaches:
        return ""
    alone, least, asked = plan.terms.asked.alone, plan.limits.gradient_records, plan.most_asked
    way = "(use protocol.mode 'release-once', or first-layer.strategy 'frozen')"
    why = f"; {alone} needs each device's alone, which tell more than a sum over a node's" if alone else ""
    if not plan.limits.gradients:
        return f"first-layer gradients would leave, gradients is false {way}{why}"
    if plan.limits.epsilon is not None:
        return f"first-layer gradients would leave without noise, epsilon is {plan.limits.epsilon:g} {way}{why}"
    if alone and asked < least:
        return (
            f"{alone} needs the first-layer gradients of each device alone, of {asked} records at most, "
            f"gradient-records is {least} (use a larger protocol.chunk, or a first-layer.strategy that takes a mean)"
        )
    return ""


def _equations(plan: _Plan) -> str:
    limit, numbers = plan.limits.equations, math.prod(plan.layer.input_shape)
    most = plan.policy.most_equations(plan.layer.width) * max(plan.passes, plan.evaluations)
    if most <= limit * numbers:
        return ""
    return (
        f"a record of {numbers} numbers could give {most:.0f} equations, equations is {limit:g} "
        f"(use dropping.policy 'top-k' with k of at most {int(limit * numbers)}, or 'bits' with 1 bit)"
    )


def _epsilon(plan: _Plan) -> str:
    limits, noisy = plan.limits, plan.policy.noisy
    if limits.epsilon is None:
        return ""
    if noisy is None:
        return (
            f"without noise epsilon is unbounded, it must be at most {limits.epsilon:g} (set dropping.clip and noise)"
        )
    precision = max(plan.passes, plan.evaluations) * gaussian_precision(noisy.noise)
    if precision <= largest_precision(limits.epsilon, limits.delta):
        return ""
    reached = epsilon(precision, limits.delta)
    return f"epsilon would be {reached:.3g}, it must be at most {limits.epsilon:g} (raise dropping.noise)"


def _sharing(segments: IntArray) -> int:
    """Return the most records that share a segment."""
    ordered = np.sort(segments, axis=1)
    first = np.diff(ordered, axis=1, prepend=-1) != 0  # a record may name a segment twice
    return int(np.unique(ordered[first], return_counts=True)[1].max(initial=0))
