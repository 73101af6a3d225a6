"""What a device sends for predictions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsplit.wire.container import Reader, check, pack_arrays, stack_rows
from fedsplit.wire.release import Release

MOST_RECORDS = 4096  # of a query


EPISODE = 8
"""Consecutive records of a watched device that are judged together."""


SHORTEST, LONGEST = 0.001, 86_400.0  # seconds from one of its records to the next
_QUERY = 4  # see fedsplit.wire.exchange for the others
WATCHED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # what it may be called


@dataclass(frozen=True)
class Query:
    """What a device sends for predictions: the dropped activations of some records, and which layer made them.

    Attributes
    ----------
    layer : int
        :func:`weights_digest` of the first layer.
    release : Release
        Of one device, at most :data:`MOST_RECORDS` records; its id and the targets, which nobody knows, do not travel.
    """

    layer: int
    release: Release

    def to_bytes(self) -> bytes:
        """Pack for the wire."""
        head, _, _, _, *outputs = self.release.arrays()
        return pack_arrays(_QUERY, [np.array([self.layer], dtype=np.int64), head, *outputs])

    @staticmethod
    def join(payloads: Sequence[bytes]) -> bytes:
        """Return one query of the records of several, which must be alike but for the numbers in them.

        It is read, and refused, as a whole: in a fraction of the time that each would take.

        Raises
        ------
        WireError
            If they are not of the same layer and the same sizes, or have codes that do not end with a byte.
        """
        if len(payloads) == 1:
            return payloads[0]
        take = Reader(payloads[0], _QUERY)
        take.array("layer", "i8", 1, size=1)
        _, bits = take.array("width", "u4", 1, size=2).tolist()
        check("bits", bits < 2, "must be 0 or 1 to be joined")
        return stack_rows(payloads, _QUERY, same=2)

    @classmethod
    def from_bytes(cls, payload: bytes) -> "Query":
        """Check and read a query. Raises WireError."""
        take = Reader(payload, _QUERY)
        (layer,) = take.array("layer", "i8", 1, size=1).tolist()
        width, bits = take.array("width", "u4", 1, size=2).tolist()
        check("bits", bits <= 8, "must be in 0..8")
        n = take.rows
        check("records", n <= take.total, "must be a count of the records sent")
        none = np.zeros(1, dtype=np.int64)
        release = Release.read_outputs(take, none, np.array([n]), np.zeros(n, dtype=np.int64), width, bits)
        take.finish()
        return cls(layer, release)
