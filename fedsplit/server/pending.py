"""Cut gradients that wait for their devices' answers: a list of blocks, one for each release."""

from collections.abc import Iterable, Sequence

import numpy as np

from fedsplit.common.arrays import FloatArray, IntArray
from fedsplit.server.answers import PendingBlock
from fedsplit.wire.exchange import CutGradients
from fedsplit.wire.release import Release

Pending = list[PendingBlock]


def packed(releases: Sequence[Release], values: FloatArray, round_number: int, digest: int, dtype: str) -> Pending:
    """Sort cut gradients back to the nodes that wait for them.

    Parameters
    ----------
    releases : sequence of Release
        Of one round, one of each node.
    values : float32 array (sent outputs,)
        Gradients at all that these sent, in canonical order (device, record).
    digest : int
        Of the weights that made the releases.
    dtype : str
        Of the wire.
    """
    devices = np.concatenate([r.devices for r in releases])
    lengths = np.concatenate([r.lengths for r in releases])
    order = np.argsort(devices)
    stops = np.cumsum(lengths[order])
    where = {d: slice(stop - n, stop) for d, n, stop in zip(devices[order], lengths[order], stops, strict=True)}
    blocks = []
    for release in releases:
        mine = np.concatenate([values[where[d]] for d in release.devices])
        cut = CutGradients.pack(round_number, digest, release.devices, release.lengths, mine, dtype)
        blocks.append(PendingBlock(cut, release.records))
    return blocks


def among(pending: Iterable[PendingBlock], devices: IntArray) -> Pending:
    """Return the parts of some devices."""
    return [part for block in pending if len((part := block.among(devices)).records)]


def without(pending: Iterable[PendingBlock], devices: IntArray) -> Pending:
    """Return the parts of all other devices."""
    return [part for block in pending if len((part := block.without(devices)).records)]


def settled(pending: Pending, answered: Iterable[CutGradients]) -> Pending:
    """Return what is left once some blocks were answered: none may be applied twice."""
    by_round: dict[int, list[IntArray]] = {}
    for cut in answered:
        by_round.setdefault(cut.round_number, []).append(cut.devices)
    for number, devices in by_round.items():
        gone = np.concatenate(devices)
        left = [b.without(gone) if b.cut.round_number == number else b for b in pending]
        pending = [block for block in left if len(block.records)]
    return pending


def weighed(pending: Pending, due: int, exponent: float, dtype: str) -> Pending:
    """Weigh down cut gradients that are sent once more, for a round: their sums of dW come back smaller by as much.

    A step that is (1 + s)^-a as long is FedAsync's polynomial weighting (Xie, Koyejo and Gupta, arXiv 1903.03934).
    The sum of a node's blocks is weighed block by block so, since dW is linear in them; counts stay what they are.
    To a device's guard a sum that is asked for again, and is smaller, is another sum, and it may refuse that.

    Parameters
    ----------
    due : int
        The round whose releases are answered now if nothing is late.
    exponent : float
        The a above; 0 weighs nothing.
    """
    if not exponent:
        return pending
    late = ((block, due - block.cut.round_number) for block in pending)  # s - 1 was weighed in the round before
    return [block.scaled((s / (1 + s)) ** exponent, dtype) if s > 0 else block for block, s in late]
