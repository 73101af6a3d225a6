"""One node's devices where labels stay at home."""

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.errors import WireError
from fedsplit.device.node import Node, pending_of
from fedsplit.device.pending import NodeState, Pending
from fedsplit.model.head import Head
from fedsplit.release.making import Chunk
from fedsplit.wire.exchange import Download, Upload, weights_digest
from fedsplit.wire.head import FEWEST, HeadDownload, HeadUpload, Rows

log = logging.getLogger(__name__)


class AtHomeNode(Node):
    """Releases records without labels, and computes the head on them where they are.

    Parameters
    ----------
    head : Head
    *args, **kwargs
        Those of :class:`fedsplit.device.node.Node`.
    """

    def __init__(self, *args: Any, head: Head, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head = head

    def answer(self, kind: str, payload: bytes) -> bytes:
        """Answer the payload of a ``train`` or ``evaluate`` message; raises FedsplitError."""
        if not HeadDownload.is_in(payload):
            return super().answer(kind, payload)
        return self.apply_head(HeadDownload.from_bytes(payload, self.head), test=kind == "evaluate").to_bytes()

    def evaluate(self, download: Download) -> Upload:
        """Release the test records that the schedule names, and remember which they are."""
        upload, leaving = self._release_tests(download)
        tests = self._tests(download.run)
        tests.forget_before(download.round_number)
        tests.save_pending(download.round_number, pending_of(download, leaving))
        return upload

    def apply_head(self, download: HeadDownload, *, test: bool) -> HeadUpload:
        """Compute loss and gradients of what was released in a round; of test records the sums alone leave.

        Nothing leaves if a device has fewer than :data:`FEWEST` records among them: what the server is told of some
        of a node's devices and of others could be subtracted, so none may be told of one record.

        Raises
        ------
        WireError
            If features and head are so large that the gradients are not finite.
        """
        state = self._tests(download.run) if test else self._state(download.run)
        pending = state.load_pending(download.round_number)
        targets = self._targets(pending, download, test=test)
        nothing = np.zeros((0, self.head.features), dtype=np.float32)
        if targets is None:
            return HeadUpload(download.nonce, 0, 0.0, 0, np.zeros(0), Rows.pack(nothing, self.dtype))
        found = self.head.sums(download.head, download.features.values(), targets)
        with np.errstate(over="ignore"):
            gradients = found.features.astype(np.float32)
        if not (np.isfinite(found.loss) and np.isfinite(gradients).all() and np.isfinite(found.head).all()):
            raise WireError("features and head must not be so large")
        rows = Rows.pack(nothing if test else gradients, self.dtype)
        at_head = np.zeros(0) if test else found.head
        return HeadUpload(download.nonce, len(targets), found.loss, found.correct, at_head, rows)

    def _labels(self, chunk: Chunk) -> NDArray[Any]:
        return np.zeros((len(chunk.y), 0), dtype=np.float32)

    def _tests(self, run: int) -> NodeState:
        return NodeState(self._state(run).folder / "tests")

    def _targets(self, pending: Pending | None, download: HeadDownload, *, test: bool) -> NDArray[Any] | None:
        """Return the labels of the records that are asked about; None if they are not those that were released."""
        pending = pending and pending.among(download.devices)  # the server may not have heard of all
        if pending is None or not (
            weights_digest(pending.weights) == download.digest
            and np.array_equal(pending.devices, download.devices)
            and np.array_equal(pending.records, download.records)
        ):
            log.warning("round %d: labels are asked of records that were not released", download.round_number)
            return None
        if not len(pending.records) or pending.records.min() < FEWEST:
            log.warning("round %d: a single record's label stays out of the sums", download.round_number)
            return None
        ends = np.cumsum(pending.records)[:-1]
        try:
            parts = zip(pending.devices.tolist(), np.split(pending.index, ends), strict=True)
            return np.concatenate([self.records.of(device, test=test).y[index] for device, index in parts])
        except Exception as error:  # a device's own code may raise anything
            log.warning("round %d: a device fails with its labels (%s)", download.round_number, type(error).__name__)
            return None
