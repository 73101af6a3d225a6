"""Before any record leaves: whether a run can go to its end under the owner's limits, and the ways out if not."""

import math

from fedsplit.config import Settings
from fedsplit.data import Source
from fedsplit.errors import ConfigError
from fedsplit.model import FirstLayer
from fedsplit.privacy.limits import Limits


def check_limits(settings: Settings, source: Source, layer: FirstLayer, limits: Limits) -> None:
    """Refuse a run that the limits would stop half-way.

    Raises
    ------
    ConfigError
        In one line: each limit that the settings cannot keep, and what would keep it.
    """
    rules = (_releases, _gradients, _equations, _epsilon)
    problems = [text for rule in rules if (text := rule(settings, source, layer, limits))]
    if problems:
        raise ConfigError(f"the limits do not allow this run: {'; '.join(problems)}")


def _releases(settings: Settings, source: Source, layer: FirstLayer, limits: Limits) -> str:
    protocol, rounds = settings.protocol, settings.run.rounds
    if protocol.once:
        releases = 1
    else:
        smallest = min((n for d in range(source.count) if (n := len(source.device(d).train))), default=1)
        chunk = smallest if isinstance(protocol.chunk, str) else min(protocol.chunk, smallest)
        releases = math.ceil(rounds * settings.devices.fraction * chunk / smallest)
    if releases <= limits.releases:
        return ""
    return (
        f"each record would be released up to {releases} times, releases is {limits.releases} "
        "(use protocol.mode 'release-once' or 'single-pass', or fewer run.rounds)"
    )


def _gradients(settings: Settings, source: Source, layer: FirstLayer, limits: Limits) -> str:
    frozen = settings.first_layer.strategy == "frozen" or settings.protocol.mode == "release-once"
    if frozen or limits.gradients:
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
