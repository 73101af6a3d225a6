"""One node's devices: the forward half of a chunk, the backward half of a pending one, prediction.

All devices share the first layer, so a node computes the records of all of them in one product. What depends on the
device (secret, masks, order) is taken per device: how devices are packed into nodes changes no release.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import IntArray
from fedsplit.data import DeviceData
from fedsplit.device.backward import Backward, Refusals
from fedsplit.device.own_records import OwnRecords
from fedsplit.device.pending import NodeState, Pending
from fedsplit.guard.guard import Guard
from fedsplit.guard.releaser import Leaving, Releaser
from fedsplit.model.layer import FirstLayer
from fedsplit.release.making import Chunk
from fedsplit.release.policy import Policy
from fedsplit.release.streams import KEYED_ROUND
from fedsplit.wire.exchange import Download, Gradients, Registration, Upload
from fedsplit.wire.ledger import Ledger

_NONE = np.zeros(0, dtype=np.int64)


class Node:
    """The devices of one node.

    Parameters
    ----------
    first_layer : FirstLayer
        Its initial weights are not used: they come with each download.
    dropping : Policy
    device_ids : sequence of int, ascending
    data : callable
        Returns a device's records by its id; an exception makes that device sit out, no other.
    secret : callable
        Returns a device's 32-byte secret by its id.
    state : callable
        Returns the node's state folder for a run by the run's number.
    guard : callable
        Opens the guard of a run's ledger ``train`` or ``test``.
    dtype : str
        Of activations on the wire: ``float16`` or ``float32``.
    keyed : bool
        Whether a record keeps the same outputs in all rounds.
    record : callable, optional
        Is shown every exchange (download, upload, indices of the records released), for an audit.
    """

    def __init__(
        self,
        first_layer: FirstLayer,
        dropping: Policy,
        device_ids: Sequence[int],
        data: Callable[[int], DeviceData],
        secret: Callable[[int], bytes],
        state: Callable[[int], NodeState],
        guard: Callable[[int, str], Guard],
        *,
        dtype: str,
        keyed: bool,
        record: Callable[[Download, Upload, IntArray], None] | None = None,
    ) -> None:
        self.first_layer = first_layer
        self.device_ids = np.asarray(device_ids, dtype=np.int64)
        self.dtype = dtype
        self.keyed = keyed
        self.records = OwnRecords(self.device_ids, data, secret, first_layer.input_shape)
        self._releaser = Releaser(first_layer, dropping, dtype, secret)
        self._backward = Backward(first_layer, self.records)
        self._state = state
        self._guard = guard
        self._record = record

    def register(self) -> Registration:
        """Return the node's devices and how many records each holds."""
        sizes = self.records.sizes()
        return Registration(self.device_ids, sizes[:, 0], sizes[:, 1])

    def exchange(self, download: Download) -> Upload:
        """Run the backward half of the pending chunks, then release the records that the schedule names.

        Raises
        ------
        StateError
            If the ledger of exposures is missing, damaged or another node's.
        """
        guard, state = self._guard(download.run, "train"), self._state(download.run)
        state.forget_before(download.keep_from)
        gradients, lost, refused = self._backward.answer(download, state, guard)
        leaving, failed, more = self._release(guard, download, test=False)
        if len(leaving.chunk.devices):
            state.save_pending(download.round_number, pending_of(download, leaving))
        upload = self._upload(guard, leaving, gradients, lost, failed, [*refused, *more], download.nonce)
        if self._record is not None:
            self._record(download, upload, leaving.chunk.index)
        return upload

    def evaluate(self, download: Download) -> Upload:
        """Release the test records that the schedule names, with the masks of prediction (always keyed)."""
        return self._release_tests(download)[0]

    def answer(self, kind: str, payload: bytes) -> bytes:
        """Answer the payload of a ``train`` or ``evaluate`` message; raises FedsplitError."""
        download = Download.from_bytes(payload, parameters=self.first_layer.size)
        return (self.exchange(download) if kind == "train" else self.evaluate(download)).to_bytes()

    def _release_tests(self, download: Download) -> tuple[Upload, Leaving]:
        guard = self._guard(download.run, "test")
        leaving, failed, refused = self._release(guard, download, test=True)
        return self._upload(guard, leaving, self._backward.nothing(), _NONE, failed, refused, download.nonce), leaving

    def _release(self, guard: Guard, download: Download, *, test: bool) -> tuple[Leaving, IntArray, Refusals]:
        """Make what the schedule names and ask the guard.

        Returns
        -------
        tuple
            What leaves; the devices that sat out; (device, reason, records) of what was refused.
        """
        chunk, failed = self.records.select(download.schedule, test=test)
        mask_round = KEYED_ROUND if test or self.keyed else download.round_number
        purpose = "test" if test else "train"
        made = self._releaser.make(chunk, download.weights, mask_round, purpose, want_slopes=not test)
        leaving = self._releaser.admit(guard, made, download.run, download.round_number)
        return leaving, failed, _counted(chunk.owners, leaving.codes)

    def _upload(
        self,
        guard: Guard,
        leaving: Leaving,
        gradients: Gradients,
        lost: IntArray,
        failed: IntArray,
        refused: Refusals,
        nonce: int,
    ) -> Upload:
        release = self._releaser.pack(leaving, self._labels(leaving.chunk))
        rows = np.array(refused, dtype=np.int64).reshape(-1, 3)
        ledger = Ledger(guard.accountant.exposures(), **vars(guard.accountant.most()))
        return Upload(release, gradients, lost, failed, rows, ledger, nonce)

    def _labels(self, chunk: Chunk) -> NDArray[Any]:
        """Return the labels that travel with a release."""
        return chunk.y


def pending_of(download: Download, leaving: Leaving) -> Pending:
    """Return what a later exchange needs of a release."""
    chunk, outputs = leaving.chunk, leaving.outputs
    kept = outputs.kept
    return Pending(
        download.weights, chunk.devices, chunk.records, chunk.index, kept.counts, kept.bitmap, outputs.slopes
    )


def _counted(owners: IntArray, codes: IntArray) -> Refusals:
    """Return (device, reason, records) of what was refused."""
    rows, counts = np.unique(np.stack([owners, codes])[:, codes != 0], axis=1, return_counts=True)
    return [(int(d), int(c), int(n)) for (d, c), n in zip(rows.T, counts, strict=True)]
