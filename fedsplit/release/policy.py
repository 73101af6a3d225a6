"""What a dropping policy is: an object that knows all facts about itself.

Guard, preflight, audit, tuning, wire and export ask these facts and know no policy by name. Facts that a policy could
state wrongly at the expense of a record are derived from what it really sends, where they can be: equations from its
code, noise from :class:`fedsplit.release.noise.Noisy`.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray
from fedsplit.model.layer import FirstLayer
from fedsplit.release.codes import Code

if TYPE_CHECKING:
    from fedsplit.release.noise import Noisy

Mask = NDArray[np.bool_]


class Silence(Protocol):
    """What outputs tell by not being sent."""

    def limit(self, pattern: Mask, values: FloatArray) -> NDArray[np.float64]:
        """Return the largest magnitude that each output can have had, if not sent; infinite where nothing is known.

        Parameters
        ----------
        pattern : bool array (width,)
            Which outputs of a record were sent.
        values : float32 array (width,)
            Zero where nothing was sent.
        """


@dataclass(frozen=True)
class Unknown:
    """Outputs are left out without a look at them."""

    def limit(self, pattern: Mask, values: FloatArray) -> NDArray[np.float64]:
        """Return infinity for all."""
        return np.full(pattern.shape, np.inf)


@dataclass(frozen=True)
class Zero:
    """Only outputs of zero are left out."""

    def limit(self, pattern: Mask, values: FloatArray) -> NDArray[np.float64]:
        """Return 0 for all."""
        return np.zeros(pattern.shape)


@dataclass(frozen=True)
class BelowLeast:
    """Outputs are left out that are not among the ``k`` largest magnitudes, or zero."""

    k: int

    def limit(self, pattern: Mask, values: FloatArray) -> NDArray[np.float64]:
        """Return the least magnitude that was sent; 0 where fewer than ``k`` were, since all others are zero."""
        sent = np.abs(values[pattern].astype(np.float64))
        return np.full(pattern.shape, sent.min() if len(sent) == self.k else 0.0)


@runtime_checkable
class Policy(Protocol):
    """Which outputs of a record leave its device, and as what.

    A policy is a frozen dataclass that derives from this class; its fields are the keys of ``[dropping]``. Everything
    that decides what is sent is a field, since the fields name a release in the device's ledger (:func:`name_of`).
    """

    @abstractmethod
    def fits(self, layer: FirstLayer) -> None:
        """Raise ConfigError if the policy is not for this first layer."""

    @abstractmethod
    def coded(self, outputs: FloatArray) -> FloatArray:
        """Return the outputs ``(records, width)`` as they would be sent: on the levels of :attr:`code`.

        A policy that changes nothing returns its argument.
        """

    @abstractmethod
    def mask(self, outputs: FloatArray, secret: bytes, round_number: int, records: NDArray[np.int64]) -> Mask:
        """Return which of the coded ``outputs`` ``(records, width)`` of one device are kept.

        Parameters
        ----------
        secret : bytes
            32 bytes that the server does not have, to draw from with :func:`fedsplit.release.streams.keystream`.
        records : int array (records,)
            The records' indices on their device; with ``secret`` and ``round_number`` they name the streams.
        """

    @property
    @abstractmethod
    def code(self) -> Code:
        """How a value stands on the wire."""

    @property
    @abstractmethod
    def deterministic(self) -> bool:
        """Whether the outputs alone decide what is sent, without any random stream."""

    @property
    @abstractmethod
    def blind(self) -> bool:
        """Whether the choice of outputs tells nothing of the record: only then can noise hide what is sent."""

    @property
    @abstractmethod
    def zeros_count(self) -> bool:
        """Whether a kept output of zero is sent even where its derivative is zero, as for relu."""

    @abstractmethod
    def information(self, width: int, dtype: str) -> float:
        """Return how many bits one release can tell of a record at most, under any weights and to any attacker.

        That is log2 of how many messages it can be; :func:`told` adds up choice and values.
        """

    @abstractmethod
    def most_equations(self, width: int) -> float:
        """Return how many equations hardly any record exceeds in one release, for the check before a run."""

    @abstractmethod
    def silence(self, layer: FirstLayer) -> Silence:
        """Return what an output that was not sent tells an attacker who knows the policy."""

    @abstractmethod
    def search(self, layer: FirstLayer) -> Mapping[str, Any]:
        """Return what ``fedsplit tune`` tries by default: a value or range by field; empty: it is not searched."""

    @property
    def noisy(self) -> "Noisy | None":
        """The noise on what is sent; none but by :class:`fedsplit.release.noise.Noisy`."""
        return None


FACTS = frozenset(Policy.__abstractmethods__)
"""The names of what a policy must say of itself."""


def told(width: int, sent: float, code: Code, dtype: str, chosen: float = 0.0) -> float:
    """Return the bits that a release tells of a record, at most those of all its outputs.

    Parameters
    ----------
    width : int
        Outputs of the first layer.
    sent : float
        Values that are sent.
    code : Code
        How a value is sent.
    dtype : str
        The wire's type of a value.
    chosen : float
        log2 of the number of possible choices of outputs. It is 0 for a choice that does not depend on the record.
    """
    each = code.any_bits(dtype)
    return min(chosen + each * sent, each * width) + code.record_bits(dtype)


def choices(width: int, k: int) -> float:
    """Return log2 of how many choices of ``k`` among ``width`` outputs there are.

    >>> choices(4, 2) == math.log2(6)
    True
    """
    return float(math.log2(math.comb(width, k)))


def name_of(policy: Policy) -> str:
    """Return a text that is equal only for policies that send the same: the class, from outside by its module, too.

    >>> from fedsplit.release.noise import Noisy
    >>> from fedsplit.release.policies import All, TopK
    >>> name_of(TopK(6)), name_of(Noisy(All(), 4.0, 0.1))
    ('TopK(k=6)', 'Noisy(policy=All(), clip=4.0, noise=0.1)')
    """
    kind = type(policy)
    module = "" if kind.__module__.startswith("fedsplit.") else f"{kind.__module__}:"
    values = {f.name: getattr(policy, f.name) for f in fields(policy)}  # type: ignore[arg-type]
    told = (f"{name}={name_of(v) if isinstance(v, Policy) else repr(v)}" for name, v in values.items())
    return f"{module}{kind.__qualname__}({', '.join(told)})"
