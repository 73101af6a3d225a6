"""Which choices exclude each other, and why: the one table that settings are checked by and the documentation shows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsplit.plan.settings import Settings


@dataclass(frozen=True)
class Refusal:
    """A combination of settings that cannot be.

    Attributes
    ----------
    says : str
        What is told whoever asks for it; ``{mode}`` stands for the mode's name.
    why : str
        The reason, for the documentation.
    applies : callable
        Whether some settings are such a combination.
    """

    says: str
    why: str
    applies: Callable[["Settings"], bool]


REFUSALS = (
    Refusal(
        "protocol.labels 'at-home' is not for mode {mode}, which replays: every label would be asked for again in each "
        "round (use 'synchronous' with first-layer.strategy 'frozen' and dropping.mask 'keyed')",
        "A replayed record has no label at the server. Its device would have to answer for it again in every round, "
        "which these modes promise not to ask. In synchronous mode a frozen first layer with keyed masks releases the "
        "same bytes again, which tell nothing new, and the trunk learns from them as from a replay.",
        lambda s: s.protocol.at_home and s.protocol.facts.replays,
    ),
    Refusal(
        "protocol.chunk 'spread' is for mode 'single-pass', not {mode}",
        "A share of the records in each round is for modes that ask for each record once and step the first layer "
        "meanwhile; where it stays as it is there is nothing to wait for.",
        lambda s: s.protocol.chunk == "spread" and not (s.protocol.facts.once and s.protocol.facts.teaches),
    ),
    Refusal(
        "run.evaluate-every must be 0 in mode {mode}: test records are exposed once too",
        "What is promised of a training record holds for a test record.",
        lambda s: bool(s.run.evaluate_every) and s.protocol.facts.once,
    ),
    Refusal(
        "protocol.mode {mode} needs a [public] section with epochs of at least 1",
        "No gradient of a device ever teaches the first layer: public records must.",
        lambda s: not s.protocol.facts.teaches and not (s.public and s.public.epochs),
    ),
    Refusal(
        "trunk.replay-mb: mode {mode} keeps nothing for replay",
        "There is nothing that it could limit.",
        lambda s: s.trunk.replay_mb is not None and not s.protocol.facts.replays,
    ),
    Refusal(
        "protocol.pace cannot be with a devices.profile, which is a pace of its own",
        "Of a virtual clock and another pace only one can say who takes part.",
        lambda s: bool(s.protocol.pace and s.devices.profile),
    ),
)


def refusal(settings: "Settings") -> str | None:
    """Return why settings cannot be, in one line, or None."""
    said = (each.says.format(mode=repr(settings.protocol.mode)) for each in REFUSALS if each.applies(settings))
    return next(said, None)
