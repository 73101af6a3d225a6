"""One node's devices: the forward half of a chunk, the backward half of a pending one, prediction.

All devices share the first layer, so a node computes the records of all of them in one product. What depends on the
device (secret, masks, order, gradients) is taken per device, and devices are added in float64: how devices are packed
into nodes changes no release, and a sum of gradients by far less than a float32 can show.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray, IntArray, sum_groups, unpack_bitmap
from fedsplit.common.errors import StateError
from fedsplit.data import DeviceData, Records
from fedsplit.device.pending import NodeState, Pending
from fedsplit.guard.guard import Guard, Proposal, Summed, release_cost, release_name
from fedsplit.model.layer import FirstLayer
from fedsplit.release.kept import Kept
from fedsplit.release.making import BLOCK, Chunk, Outputs, forward
from fedsplit.release.policy import Policy, name_of
from fedsplit.release.streams import KEYED_ROUND, record_order
from fedsplit.wire.exchange import CutGradients, Download, Gradients, Registration, Upload, weights_digest
from fedsplit.wire.ledger import Ledger, Reason
from fedsplit.wire.release import Release

log = logging.getLogger(__name__)
_WHOLE_NODE = -1
_FEW_RECORDS = 32  # of a device, below which it takes no product of its own
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
        self.dropping = dropping
        self.device_ids = np.asarray(device_ids, dtype=np.int64)
        self.dtype = dtype
        self.keyed = keyed
        self._data = data
        self._secret = secret
        self._state = state
        self._guard = guard
        self._record = record
        # everything besides weights, masks and record that decides what is sent
        self._policy = f"{name_of(dropping)} {dtype if dropping.code.floats else ''}"

    def register(self) -> Registration:
        """Return the node's devices and how many records each holds."""
        sizes = np.array([self._size(d) for d in self.device_ids.tolist()], dtype=np.int64).reshape(-1, 2)
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
        gradients, lost, refused = self._backward(download, state, guard)
        chunk, failed = self._select(download.schedule, test=False)
        mask_round = KEYED_ROUND if self.keyed or self.dropping.deterministic else download.round_number
        outputs = self._forward(chunk, download.weights, mask_round, want_slopes=True)
        chunk, outputs, more = self._admit(guard, download, chunk, outputs, mask_round)
        if len(chunk.devices):
            state.save_pending(download.round_number, pending_of(download, chunk, outputs))
        upload = self._upload(chunk, outputs.kept, gradients, lost, failed, [*refused, *more], guard, download.nonce)
        if self._record is not None:
            self._record(download, upload, chunk.index)
        return upload

    def evaluate(self, download: Download) -> Upload:
        """Release the test records that the schedule names, with the masks of prediction (always keyed)."""
        return self._release_tests(download)[0]

    def answer(self, kind: str, payload: bytes) -> bytes:
        """Answer the payload of a ``train`` or ``evaluate`` message; raises FedsplitError."""
        download = Download.from_bytes(payload, parameters=self.first_layer.size)
        return (self.exchange(download) if kind == "train" else self.evaluate(download)).to_bytes()

    def _release_tests(self, download: Download) -> tuple[Upload, Chunk, Outputs]:
        guard = self._guard(download.run, "test")
        chunk, failed = self._select(download.schedule, test=True)
        outputs = self._forward(chunk, download.weights, KEYED_ROUND, want_slopes=False)
        chunk, outputs, refused = self._admit(guard, download, chunk, outputs, KEYED_ROUND)
        nothing = self._gradients([], [])
        upload = self._upload(chunk, outputs.kept, nothing, _NONE, failed, refused, guard, download.nonce)
        return upload, chunk, outputs

    def _upload(
        self,
        chunk: Chunk,
        kept: Kept,
        gradients: Gradients,
        lost: IntArray,
        failed: IntArray,
        refused: list[tuple[int, int, int]],
        guard: Guard,
        nonce: int,
    ) -> Upload:
        labels = self._labels(chunk)
        release = Release.pack(kept, chunk.devices, chunk.records, labels, self.dtype, self.dropping.code.bits)
        rows = np.array(refused, dtype=np.int64).reshape(-1, 3)
        ledger = Ledger(guard.accountant.exposures(), **vars(guard.accountant.most()))
        return Upload(release, gradients, lost, failed, rows, ledger, nonce)

    def _labels(self, chunk: Chunk) -> NDArray[Any]:
        """Return the labels that travel with a release."""
        return chunk.y

    def _size(self, device: int) -> tuple[int, int]:
        try:
            data = self._data(device)
        except Exception as error:  # a device's own code may raise anything
            log.warning("device %d cannot take part (%s)", device, _why(error))
            return 0, 0
        return len(data.train), len(data.test)

    def _select(self, schedule: IntArray, *, test: bool) -> tuple[Chunk, IntArray]:
        """Gather the scheduled records of all devices, each device's in ascending order of their index."""
        parts: list[tuple[int, IntArray, Records]] = []
        failed: list[int] = []
        for device, pass_number, start, stop in schedule.tolist():
            try:
                records = self._records(device, test=test)
                if stop > len(records):
                    raise ValueError("schedule goes beyond the device's records")
                if test or stop - start == len(records):
                    index = np.arange(start, stop)
                else:
                    order = record_order(self._secret(device), pass_number, len(records))
                    index = np.sort(order[start:stop])
                parts.append((device, index, _taken(records, index)))
            except Exception as error:  # see _size
                log.warning("device %d sits out a round (%s)", device, _why(error))
                failed.append(device)
        return self._join(parts), np.array(failed, dtype=np.int64)

    def _records(self, device: int, *, test: bool) -> Records:
        if device not in self.device_ids:
            raise ValueError("device of another node")
        data = self._data(device)
        return data.test if test else data.train

    def _join(self, parts: list[tuple[int, IntArray, Records]]) -> Chunk:
        shape = self.first_layer.input_shape
        return Chunk(
            devices=np.array([device for device, _, _ in parts], dtype=np.int64),
            records=np.array([len(index) for _, index, _ in parts], dtype=np.int64),
            index=np.concatenate([index for _, index, _ in parts] or [_NONE]),
            segments=_same_width([_segments(index, r) for _, index, r in parts]),
            x=np.concatenate([r.x for _, _, r in parts] or [np.zeros((0, *shape), np.float32)]),
            y=np.concatenate([r.y for _, _, r in parts] or [_NONE]),
        )

    def _forward(self, chunk: Chunk, weights: FloatArray, mask_round: int, *, want_slopes: bool) -> Outputs:
        # train and test records share their indices: equal noise on both could be subtracted
        noise_name = release_name(
            self.first_layer, weights, f"{self._policy} {'train' if want_slopes else 'test'}", mask_round
        )
        return forward(
            self.first_layer,
            self.dropping,
            self._secret,
            chunk,
            weights,
            mask_round,
            noise_name,
            want_slopes=want_slopes,
        )

    def _admit(
        self, guard: Guard, download: Download, chunk: Chunk, outputs: Outputs, mask_round: int
    ) -> tuple[Chunk, Outputs, list[tuple[int, int, int]]]:
        """Ask the guard; return what may leave, and (device, reason, records) of what was refused."""
        kept, first = outputs.kept, chunk.owners << 32
        proposal = Proposal(
            run=download.run,
            round_number=download.round_number,
            weights=download.weights,
            name=release_name(self.first_layer, download.weights, self._policy, mask_round),
            owners=chunk.owners,
            records=first | chunk.index,
            segments=first[:, None] | chunk.segments,
            bitmap=kept.bitmap,
            active=outputs.active,
            cost=release_cost(kept, self.first_layer, self.dropping, self.dtype, download.weights),
            exact=self.dropping.code.exact,
        )
        codes = guard.admit(proposal)
        counted = np.unique(np.stack([chunk.owners, codes])[:, codes != 0], axis=1, return_counts=True)
        refused = [(int(d), int(c), int(n)) for (d, c), n in zip(counted[0].T, counted[1], strict=True)]
        if guard.enforce and refused:
            chunk, outputs = chunk.take(codes == 0), outputs.take(codes == 0)
        return chunk, outputs, refused

    def _backward(
        self, download: Download, state: NodeState, guard: Guard
    ) -> tuple[Gradients, IntArray, list[tuple[int, int, int]]]:
        """Sum the first-layer gradients of all pending chunks, per device or over the node."""
        sums: dict[int, NDArray[np.float64]] = {}
        counts: dict[int, int] = {}
        lost: list[int] = []
        refused: list[tuple[int, int, int]] = []
        for block in download.pending:
            pending = state.load_pending(block.round_number)
            pending = pending and pending.among(block.devices)
            if pending is None or not _fits(pending, block):
                lost.append(block.round_number)
                continue
            shares = self._shares(pending, block)
            allowed = self._admit_gradient(guard, pending, shares, per_device=download.per_device)
            if not allowed:
                refused += [(s.device, Reason.GRADIENTS, len(s.index)) for s in shares]
            if not shares or (guard.enforce and not allowed):
                lost.append(block.round_number)
                continue
            for group, records, total in self._sums(shares, per_device=download.per_device):
                sums[group] = sums.get(group, 0) + total
                counts[group] = counts.get(group, 0) + records
        groups = sorted(sums)
        gradients = self._gradients([sums[g] for g in groups], [counts[g] for g in groups], groups)
        return gradients, np.array(lost, dtype=np.int64), refused

    def _shares(self, pending: Pending, block: CutGradients) -> list["_Share"]:
        """Return the devices' parts of a pending chunk; none if a device raises: the server expects all or nothing."""
        delta = block.values() * (pending.slopes if len(pending.slopes) else 1)
        rows = np.concatenate([[0], np.cumsum(pending.records)]).tolist()
        values = np.concatenate([[0], np.cumsum(pending.counts)])
        shares = []
        for device, start, stop in zip(pending.devices.tolist(), rows[:-1], rows[1:], strict=True):
            try:
                index = pending.index[start:stop]
                records = _taken(self._records(device, test=False), index)
                shares.append(
                    _Share(
                        device,
                        index,
                        records,
                        pending.counts[start:stop],
                        pending.bitmap[start:stop],
                        delta[values[start] : values[stop]],
                    )
                )
            except Exception as error:  # see _size
                log.warning("device %d fails in a backward half (%s)", device, _why(error))
                return []
        return shares

    def _admit_gradient(self, guard: Guard, pending: Pending, shares: Sequence["_Share"], *, per_device: bool) -> bool:
        """Ask the guard for a block's gradient: summed over the node, or by device."""
        groups = [[share] for share in shares] if per_device else [shares] if shares else []
        allowed = []
        for group in groups:
            owners = np.concatenate([np.repeat(np.int64(s.device) << 32, len(s.index)) for s in group])
            summed = Summed(
                pending.weights,
                owners | np.concatenate([s.index for s in group]),
                owners[:, None] | _same_width([_segments(s.index, s.records) for s in group]),
                np.concatenate([s.bitmap for s in group]),
                np.concatenate([s.delta for s in group]),
            )
            allowed.append(guard.admit_gradient(summed))
        return all(allowed)  # of a list: when observing, all of them leave and are counted

    def _gradients(self, sums: list[NDArray[np.float64]], counts: list[int], groups: Sequence[int] = ()) -> Gradients:
        return Gradients(
            np.array(groups, dtype=np.int64),
            np.array(counts, dtype=np.int64),
            np.stack(sums) if sums else np.zeros((0, self.first_layer.size)),
        )

    def _sums(self, shares: Sequence["_Share"], *, per_device: bool) -> Iterator[tuple[int, int, NDArray[np.float64]]]:
        """Yield sums of dW of the summed loss: the group that each belongs to, how many records it is over, the sum.

        A device with many records takes float32 products of its own. Of those with few one product takes many, but in
        float64: which other devices a node happens to have must not show.
        """
        few = [] if per_device else [s for s in shares if len(s.index) < _FEW_RECORDS]
        for share in shares if per_device else [s for s in shares if len(s.index) >= _FEW_RECORDS]:
            group = share.device if per_device else _WHOLE_NODE
            yield group, len(share.index), self._gradient([share], np.float32)
        for start in range(0, len(few), _FEW_RECORDS):
            several = few[start : start + _FEW_RECORDS]
            yield _WHOLE_NODE, sum(len(s.index) for s in several), self._gradient(several, np.float64)

    def _gradient(self, shares: Sequence["_Share"], dtype: type[np.floating[Any]]) -> NDArray[np.float64]:
        """Return dW of the loss summed over all records of some shares, a block at a time."""
        layer, used = self.first_layer, 0
        total = np.zeros(layer.size)
        x, counts = _joined([s.records.x for s in shares]), _joined([s.counts for s in shares])
        bitmap, delta = _joined([s.bitmap for s in shares]), _joined([s.delta for s in shares])
        for start in range(0, len(x), BLOCK):
            rows = slice(start, start + BLOCK)
            cells = np.flatnonzero(unpack_bitmap(bitmap[rows], layer.width))
            dense = np.zeros(len(bitmap[rows]) * layer.width, dtype=dtype)
            count = int(counts[rows].sum())
            dense[cells] = delta[used : used + count]
            used += count
            total += layer.gradient(x[rows].astype(dtype, copy=False), dense.reshape(-1, *layer.cut_shape))
        return total


@dataclass(frozen=True)
class _Share:
    """A device's part of a pending chunk; ``delta`` are the gradients at the pre-activations that were sent."""

    device: int
    index: IntArray
    records: Records
    counts: IntArray
    bitmap: NDArray[np.uint8]
    delta: FloatArray


def pending_of(download: Download, chunk: Chunk, outputs: Outputs) -> Pending:
    """Return what a later exchange needs of a release."""
    kept = outputs.kept
    return Pending(
        download.weights, chunk.devices, chunk.records, chunk.index, kept.counts, kept.bitmap, outputs.slopes
    )


def _why(error: Exception) -> str:
    """Return what may be said of an error: the text of others than ours could hold records."""
    return str(error) if isinstance(error, StateError) else type(error).__name__


def _fits(pending: Pending, block: CutGradients) -> bool:
    """Whether cut gradients belong to this chunk: same weights, devices and number of values."""
    return (
        weights_digest(pending.weights) == block.digest
        and np.array_equal(pending.devices, block.devices)
        and np.array_equal(sum_groups(pending.counts, pending.records), block.lengths)
    )


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Put arrays behind one another, without a copy if there is one."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _taken(records: Records, index: IntArray) -> Records:
    """Return the records at ascending places, without a copy if they are all."""
    whole = len(index) == len(records) and (not len(index) or index[-1] == len(records) - 1)
    return records if whole else records.take(index)


def _segments(index: IntArray, records: Records) -> IntArray:
    """Return the segments of records; one that overlaps none is its own."""
    return index[:, None] if records.segments is None else records.segments


def _same_width(segments: Sequence[IntArray]) -> IntArray:
    """Join segments; where devices have records of fewer one is named again, and counts once."""
    most = max((s.shape[1] for s in segments), default=1)
    wide = [np.concatenate([s, np.repeat(s[:, :1], most - s.shape[1], axis=1)], axis=1) for s in segments]
    return np.concatenate(wide or [np.zeros((0, 1), np.int64)])
