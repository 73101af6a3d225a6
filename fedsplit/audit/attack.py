"""What an attack is: an object that makes guesses of records from what an attacker has.

The attacks that come with fedsplit are in :mod:`fedsplit.audit.standard`; ``audit.attacks`` names others.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fedsplit.audit.evidence import Array, Equations, Evidence, equations, released
from fedsplit.audit.prior import Labels, Prior
from fedsplit.common.arrays import IntArray
from fedsplit.common.errors import ConfigError, FedsplitError
from fedsplit.common.plugins import resolve_function
from fedsplit.data import Records


@dataclass(frozen=True)
class Problem:
    """What an attacker has: all that left, public records, labels. The originals are not in it.

    Attributes
    ----------
    evidence : Evidence
        The first layer, the policy, every release and every sum of gradients; its originals and candidates are blank.
    prior : Prior
        What public records tell before any release: means and covariances, by class.
    targets : int64 array (targets,)
        Which of the evidence's subjects are attacked: 0, 1, ...
    labels : int array (targets,) or None
        None where targets are no classes.
    seed : int
        Of whatever the attack draws.
    """

    evidence: Evidence
    prior: Prior
    targets: IntArray
    labels: Labels
    seed: int

    @classmethod
    def of(cls, evidence: Evidence, prior: Prior, targets: IntArray, labels: Labels, seed: int) -> "Problem":
        """Return what an attacker has, without the originals that the evidence holds for scoring.

        Parameters
        ----------
        evidence, prior, targets, labels, seed
            Those of the problem; the originals and candidates may be in the evidence.
        """
        subjects = evidence.subjects
        blank = np.full_like(subjects.x, np.nan)
        hidden = replace(subjects, x=blank, candidates=np.full_like(subjects.candidates, np.nan))
        return cls(replace(evidence, subjects=hidden), prior, targets, labels, seed)

    @property
    def public(self) -> Records:
        """Records of the same kind that the attacker has."""
        return self.evidence.subjects.public

    @property
    def numbers(self) -> int:
        """How many numbers a record has."""
        return int(np.prod(self.evidence.layer.input_shape))

    @cached_property
    def equations(self) -> Equations:
        """What each target is known to satisfy, over all its releases."""
        return equations(self.evidence, self.targets)

    @cached_property
    def features(self) -> tuple[Array, Array] | None:
        """Releases ``(public records, width)`` and ``(targets, width)`` under the weights of the last release.

        Zero where nothing was sent; None if nothing was released at all. The public ones are made as a device would.
        """
        evidence = self.evidence
        last = [seen for seen in evidence.seen if len(seen.targets)]
        if not last:
            return None
        own = np.zeros((len(self.targets), evidence.layer.width))
        for seen in last:
            mine = seen.targets < len(self.targets)
            own[seen.targets[mine]] = seen.values[mine]
        x, weights = self.public.x, last[-1].weights
        _, values = released(evidence.layer, evidence.dropping, evidence.dtype, weights, x, self.seed)
        return values.astype(np.float64), own


class Attack(ABC):
    """One way to guess records.

    Attributes
    ----------
    name : str
        In reports; no other attack's.
    slow : bool
        Whether a quick audit leaves it out.
    """

    name: str
    slow: bool = False

    @abstractmethod
    def reconstruct(self, problem: Problem) -> Array | str:
        """Return guesses ``(targets, numbers)`` of the targets in float64, or why there is nothing to go by."""


def attacks_named(references: Sequence[str], taken: Sequence[str] = ()) -> list[Attack]:
    """Return somebody's own attacks.

    Parameters
    ----------
    references : sequence of str
        ``module:Name`` of subclasses of :class:`Attack` that are made without arguments.
    taken : sequence of str
        Names that they may not have.

    Raises
    ------
    ConfigError
        If there is no such class, it is not a whole attack, or its name is missing or taken.
    """
    found: list[Attack] = []
    for reference in references:
        kind = resolve_function(reference, "audit.attacks", "class")
        if not (isinstance(kind, type) and issubclass(kind, Attack)):
            raise ConfigError(f"audit.attacks {reference!r} must be a subclass of fedsplit.audit.attack.Attack")
        if kind.__abstractmethods__:
            raise ConfigError(f"audit.attacks {reference!r} lacks {', '.join(sorted(kind.__abstractmethods__))}")
        name = getattr(kind, "name", None)
        if not isinstance(name, str) or not name or name in {*taken, *(attack.name for attack in found)}:
            raise ConfigError(f"audit.attacks {reference!r} needs a name that no other attack has, got {name!r}")
        found.append(kind())
    return found


def guesses_of(attack: Attack, problem: Problem) -> Array | str:
    """Run an attack and look at what it returns.

    Raises
    ------
    ConfigError
        If it raises, or returns anything but finite guesses of all targets.
    """
    try:
        found = attack.reconstruct(problem)
    except FedsplitError:
        raise
    except Exception as error:  # somebody's own code
        raise ConfigError(f"attack {attack.name!r} raised {type(error).__name__}: {error}") from None
    if isinstance(found, str):
        return found
    guesses = np.asarray(found, dtype=np.float64)
    shape = (len(problem.targets), problem.numbers)
    if guesses.shape != shape or not np.isfinite(guesses).all():
        raise ConfigError(f"attack {attack.name!r} must return finite guesses of shape {shape}, got {guesses.shape}")
    return problem.prior.clip(guesses)
