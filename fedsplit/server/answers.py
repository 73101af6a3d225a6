"""Whether an upload answers what was asked: the server treats devices' messages as hostile."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedsplit.common.arrays import IntArray
from fedsplit.common.errors import WireError
from fedsplit.model.tasks.targets import Targets
from fedsplit.wire.container import LARGEST
from fedsplit.wire.exchange import CutGradients, Download, Upload


@dataclass(frozen=True)
class PendingBlock:
    """Cut gradients that a node has still to answer, and how many records each of its devices released."""

    cut: CutGradients
    records: IntArray

    def among(self, devices: IntArray) -> "PendingBlock":
        """Return the part of some devices."""
        rows = np.isin(self.cut.devices, devices)
        return self if rows.all() else PendingBlock(self.cut.take(rows), self.records[rows])

    def without(self, devices: IntArray) -> "PendingBlock":
        """Return the part of all other devices."""
        return self.among(np.setdiff1d(self.cut.devices, devices))

    def scaled(self, factor: float, dtype: str) -> "PendingBlock":
        """Return the same gradients times a factor, for the wire's ``dtype``."""
        cut = self.cut
        values = cut.values() * np.float32(factor)
        return replace(
            self, cut=CutGradients.pack(cut.round_number, cut.digest, cut.devices, cut.lengths, values, dtype)
        )


def check_size(size: int, asked: Download, width: int, parameters: int, targets: Targets) -> None:
    """Refuse a payload that is larger than any answer to a download.

    Parameters
    ----------
    size : int
        Bytes of the payload.
    asked : Download
    width, parameters : int
        Outputs and parameters of the first layer.
    targets : Targets
        What each record's target is.

    Raises
    ------
    WireError
        If the payload is too large.
    """
    records = int((asked.schedule[:, 3] - asked.schedule[:, 2]).sum())
    devices = len(asked.schedule) + sum(len(block.devices) for block in asked.pending)
    target = 4 * (targets.columns or 1)
    each = 4 * width + -(-width // 8) + target + 16  # values, bitmap, target, what else there is of a record
    most = records * each + devices * (8 * parameters + 256) + 8 * parameters + 4096
    if size > most:
        raise WireError(f"size must be at most {most} bytes, got {size}")


def check_upload(
    upload: Upload, asked: Download, pending: Sequence[PendingBlock], width: int, targets: Targets
) -> None:
    """Refuse an upload that does not answer a download.

    Parameters
    ----------
    upload : Upload
        Well-formed in itself.
    asked : Download
        What its node was sent.
    pending : sequence of PendingBlock
        Holds at least the blocks that went with ``asked``.
    width : int
        Outputs of the first layer.
    targets : Targets
        What the task's are, or that they stay at home.

    Raises
    ------
    WireError
        With the field and what it must be.
    """
    if upload.nonce != asked.nonce:
        raise WireError("nonce must be that of the message: this upload answers another one")
    release = upload.release
    _check_sizes(upload)
    scheduled = {row[0]: row[3] - row[2] for row in asked.schedule.tolist()}
    given = dict(zip(release.devices.tolist(), release.records.tolist(), strict=True))
    failed, refused = set(upload.failed.tolist()), set(upload.refused[:, 0].tolist())
    if set(given) & failed or not set(scheduled) - refused <= set(given) | failed <= set(scheduled):
        raise WireError("devices must be those that were asked")
    if wrong := [d for d, n in given.items() if n > scheduled[d] or (n < scheduled[d] and d not in refused)]:
        raise WireError(f"records: device {wrong[0]} released {given[wrong[0]]}, asked {scheduled[wrong[0]]}")
    if given and release.width != width:
        raise WireError(f"width must be {width}, got {release.width}")
    if len(release.targets):
        targets.check(release.targets)
    _check_gradients(upload, asked, pending)


def _check_sizes(upload: Upload) -> None:
    """Refuse numbers that are finite, and would not stay so."""
    release, sums = upload.release, upload.gradients.sums
    largest = float(np.abs(release.codes).max(initial=0)) * 2.0 ** int(release.exponents.max(initial=0))
    if largest > LARGEST or np.abs(sums).max(initial=0) > LARGEST:
        raise WireError(f"values must be at most {LARGEST:g}")


def _check_gradients(upload: Upload, asked: Download, pending: Sequence[PendingBlock]) -> None:
    lost = set(upload.lost.tolist())
    records = {id(block.cut): block.records for block in pending}
    expected: dict[int, int] = {}
    for cut in asked.pending:
        if cut.round_number in lost:
            continue
        for device, count in zip(cut.devices.tolist(), records[id(cut)].tolist(), strict=True):
            group = device if asked.per_device else -1
            expected[group] = expected.get(group, 0) + count
    found = dict(zip(upload.gradients.devices.tolist(), upload.gradients.records.tolist(), strict=True))
    if found != {group: count for group, count in expected.items() if count}:
        raise WireError("gradient records must be those of the pending chunks")
