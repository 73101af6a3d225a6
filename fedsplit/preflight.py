"""Before any record leaves: whether a run can go to its end under the owner's limits, and the ways out if not."""

import math

import numpy as np

from fedsplit.config import Settings
from fedsplit.data import Source
from fedsplit.errors import ConfigError
from fedsplit.model import FirstLayer
from fedsplit.packing import IntArray
from fedsplit.privacy.limits import Limits
from fedsplit.schedule import Schedule


def check_limits(settings: Settings, source: Source, layer: FirstLayer, limits: Limits) -> None:
    """Refuse a run that the limits would stop half-way.

    Raises
    ------
    ConfigError
        In one line: each limit that the settings cannot keep, and what would keep it.
    """
    rules = (_releases, _overlap, _evaluations, _gradients, _equations, _epsilon)
    problems = [text for rule in rules if (text := rule(settings, source, layer, limits))]
    if problems:
        raise ConfigError(f"the limits do not allow this run: {'; '.join(problems)}")


def _releases(settings: Settings, source: Source, layer: FirstLayer, limits: Limits) -> str:
    releases = _passes(settings, source)
    if releases <= limits.releases:
        return ""
    return (
        f"each record would be released up to {releases} times, releases is {limits.releases} "
        "(use protocol.mode 'release-once' or 'single-pass', or fewer run.rounds)"
    )


def _overlap(settings: Settings, source: Source, layer: FirstLayer, limits: Limits) -> str:
    parts = [source.device(d).train for d in range(source.count) if d not in settings.donors]
    parts += [source.device(d).test for d in source.test_devices]
    shared = max((_sharing(r.segments) for r in parts if r.segments is not None), default=1)
    # of records that share numbers one may leave, unless what leaves are single bits
    if shared <= 1 or (settings.dropping.bits == 1 and shared <= limits.releases):
        return ""
    return f"up to {shared} records share a segment, and would not all be released (use data.overlap = false)"


def _evaluations(settings: Settings, source: Source, layer: FirstLayer, limits: Limits) -> str:
    rounds, every = settings.run.rounds, settings.run.evaluate_every
    times = 1 if every == 0 or _frozen(settings) else math.ceil(rounds / every)
    if times <= limits.releases or not source.test_devices:
        return ""
    return (
        f"each test record would be released {times} times, releases is {limits.releases} (use run.evaluate-every = 0)"
    )


def _sharing(segments: IntArray) -> int:
    """Return the most records that share a segment."""
    ordered = np.sort(segments, axis=1)
    first = np.diff(ordered, axis=1, prepend=-1) != 0  # a record may name a segment twice
    return int(np.unique(ordered[first], return_counts=True)[1].max(initial=0))


def _passes(settings: Settings, source: Source) -> int:
    """Return the most times that something new of a record would leave."""
    protocol, dropping = settings.protocol, settings.dropping
    keyed = dropping.mask == "keyed" or (dropping.policy not in ("random", "at-most") and not dropping.noise)
    if protocol.once or (_frozen(settings) and keyed):
        return 1  # the same weights and masks give the same bytes
    counts = {d: len(source.device(d).train) for d in range(source.count) if d not in settings.donors}
    if settings.devices.fraction == 1.0:  # devices of one size are asked alike
        counts = {d: n for n, d in {n: d for d, n in counts.items()}.items()}
    schedule = Schedule(
        protocol.once, protocol.chunk, settings.devices.fraction, settings.run.rounds, settings.run.seed
    )
    schedule.set_counts(counts)
    passes: dict[int, set[int]] = {}
    for round_number in range(1, settings.run.rounds + 1):
        for device, row in schedule.rows(round_number).items():
            passes.setdefault(device, set()).add(row[1])
    return max(map(len, passes.values()), default=0)


def _frozen(settings: Settings) -> bool:
    return settings.first_layer.strategy == "frozen" or settings.protocol.mode == "release-once"


def _gradients(settings: Settings, source: Source, layer: FirstLayer, limits: Limits) -> str:
    if _frozen(settings) or limits.gradients:
        return ""
    return (
        "first-layer gradients would leave, gradients is false "
        "(use protocol.mode 'release-once', or first-layer.strategy 'frozen')"
    )


def _equations(settings: Settings, source: Source, layer: FirstLayer, limits: Limits) -> str:
    dropping, numbers = settings.dropping, math.prod(layer.input_shape)
    kept = {"none": layer.width, "random": (dropping.keep or 1.0) * layer.width, "bits": layer.width}
    most = kept.get(dropping.policy, dropping.k or 0)
    if dropping.bits == 1 or most <= limits.equations * numbers:
        return ""
    if layer.positive_only and most / 2 <= limits.equations * numbers:
        return ""  # about half of relu's outputs send nothing; the guard counts those that do
    return (
        f"a record of {numbers} numbers would give {most:g} equations, equations is {limits.equations:g} "
        f"(use dropping.policy 'top-k' with k of at most {int(limits.equations * numbers)}, or 'bits' with 1 bit)"
    )


def _epsilon(settings: Settings, source: Source, layer: FirstLayer, limits: Limits) -> str:
    if limits.epsilon is None or settings.dropping.noise:
        return ""
    return f"without noise epsilon is unbounded, it must be at most {limits.epsilon:g} (set dropping.clip and noise)"
