"""What a guard says of what left, and why something did not."""

from enum import IntEnum
from typing import NamedTuple


class Reason(IntEnum):
    """Why something did not leave; the codes are what the wire carries."""

    WEIGHTS = 1
    ORDER = 2
    RELEASES = 3
    EQUATIONS = 4
    LEVERAGE = 5
    EPSILON = 6
    GRADIENTS = 7
    CAPPED = 8


class Ledger(NamedTuple):
    """The most that has left of any record of a node, over all its runs.

    ``exposures`` counts a record's releases; the other fields are those of
    :class:`fedsplit.guard.accountant.Spent`, and count a segment that several records share with each of them.
    """

    exposures: float
    releases: float
    equations: float
    bits: float
    gradient: float
    precision: float
    fisher: float
    leverage: float
