"""What crosses the network: uploads, downloads and registrations.

Releases are sparse by construction: a count per record, a bitmap of the outputs that were sent, their values.
Reading a payload checks its arrays against what the kind must hold, then the numbers against each other; a refusal
names the field. Both sides treat the other's payload as hostile.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray, IntArray
from fedsplit.wire.coding import dequantise, quantise
from fedsplit.wire.container import Reader, check, check_ids, check_scaled, pack_arrays
from fedsplit.wire.ledger import Ledger
from fedsplit.wire.release import Release

_UPLOAD, _DOWNLOAD, _REGISTRATION = 1, 2, 3


@dataclass(frozen=True)
class Gradients:
    """Sums of first-layer gradients.

    Attributes
    ----------
    devices : int64 array (groups,)
        One id per sum, or -1 for the sum over all of the node's devices.
    records : int64 array (groups,)
        How many records each sum is over.
    sums : float64 array (groups, parameters)
        dW of the summed loss. Not float32: its last bit would tell how devices are packed into nodes, and adaptive
        steps magnify that into other weights.
    """

    devices: IntArray
    records: IntArray
    sums: NDArray[np.float64]

    def among(self, devices: IntArray) -> "Gradients":
        """Return the sums of some devices, where there is one of each."""
        rows = np.isin(self.devices, devices)
        return Gradients(self.devices[rows], self.records[rows], self.sums[rows])


@dataclass(frozen=True)
class Upload:
    """Everything that leaves a node in one exchange. Nothing else may.

    Attributes
    ----------
    release : Release
        Of the chunk that was asked for; holds no devices when none was.
    gradients : Gradients
        Of the pending chunks whose cut gradients came with the download.
    lost : int64 array
        Rounds whose pending chunk is missing or belongs to other weights ("pending lost").
    failed : int64 array
        Devices that could not take part.
    refused : int64 array (rows, 3)
        Device id, reason (:class:`Reason`), how many records: what the guard refused, or in simulation
        would have.
    ledger : Ledger
        The most that has left of any of the node's records.
    nonce : int
        That of the download which it answers.
    """

    release: Release
    gradients: Gradients
    lost: IntArray
    failed: IntArray
    refused: IntArray
    ledger: "Ledger"
    nonce: int = 0

    def to_bytes(self) -> bytes:
        """Pack for the wire."""
        return pack_arrays(
            _UPLOAD,
            [
                np.array([self.nonce], dtype=np.int64),
                np.array(self.ledger, dtype=np.float64),
                self.lost.astype(np.int64),
                self.failed.astype(np.int32),
                self.refused.astype(np.int32),
                *self.release.arrays(),
                self.gradients.devices.astype(np.int32),
                self.gradients.records.astype(np.int64),
                self.gradients.sums,
            ],
        )

    @classmethod
    def from_bytes(cls, payload: bytes, *, parameters: int) -> "Upload":
        """Check and read an upload; ``parameters`` is the first layer's size. Raises WireError."""
        take = Reader(payload, _UPLOAD)
        (nonce,) = (int(v) for v in take.array("nonce", "i8", 1, size=1))
        ledger = take.array("ledger", "f8", 1, size=len(Ledger._fields))
        check("ledger", bool((np.nan_to_num(ledger, posinf=0.0) >= 0).all()), "must not be negative")
        check("ledger", bool(np.isfinite(ledger[:5]).all()), "must have finite counts")  # up to the field gradient
        lost = take.array("lost", "i8", 1).astype(np.int64)
        failed = take.array("failed", "i4", 1).astype(np.int64)
        refused = take.array("refused", "i4", 2).astype(np.int64)
        check("refused", refused.shape[1] == 3, "must have 3 columns")
        check("refused", bool((refused >= 0).all()), "must not be negative")
        release = Release.read(take)
        devices = take.array("gradient devices", "i4", 1).astype(np.int64)
        records = take.array("gradient records", "i8", 1, size=len(devices)).astype(np.int64)
        check("gradient devices", bool((np.diff(devices) > 0).all()), "must be ascending")
        check("gradient records", bool((records > 0).all()), "must be positive")
        sums = take.array("gradients", "f8", 2, size=len(devices)).astype(np.float64)
        check("gradients", sums.shape[1] == parameters, f"must have {parameters} parameters")
        check("gradients", bool(np.isfinite(sums).all()), "must be finite")
        take.finish()
        return cls(release, Gradients(devices, records, sums), lost, failed, refused, Ledger(*ledger.tolist()), nonce)


@dataclass(frozen=True)
class CutGradients:
    """Gradients of the summed loss at the outputs that one node sent in one round.

    Attributes
    ----------
    round_number : int
        The round in which the chunk was released.
    digest : int
        Of the weights that released it; see :func:`weights_digest`.
    devices, lengths : int64 arrays (devices,)
        Device ids, and how many values each has.
    codes, exponents
        As in :class:`Release`: one value per output that was sent, in the same order, no bitmap.
    """

    round_number: int
    digest: int
    devices: IntArray
    lengths: IntArray
    codes: NDArray[Any]
    exponents: NDArray[np.int32]

    @classmethod
    def pack(
        cls,
        round_number: int,
        digest: int,
        devices: IntArray,
        lengths: IntArray,
        values: FloatArray,
        dtype: str,
    ) -> "CutGradients":
        """Quantise gradients, with one scale per device.

        Parameters
        ----------
        round_number : int
            The round in which the chunk was released.
        digest : int
            Of the weights that released it; see :func:`weights_digest`.
        devices, lengths : int64 arrays (devices,)
            Device ids, and how many values each has.
        values : float32 array (values,)
            One per output that was sent, in the order of the release.
        dtype : str
            ``float16`` or ``float32``.
        """
        return cls(round_number, digest, devices, lengths, *quantise(values, lengths, dtype))

    def take(self, rows: NDArray[np.bool_]) -> "CutGradients":
        """Return the gradients of some of the devices."""
        return replace(
            self,
            devices=self.devices[rows],
            lengths=self.lengths[rows],
            codes=self.codes[np.repeat(rows, self.lengths)],
            exponents=self.exponents[rows],
        )

    def values(self) -> FloatArray:
        """Return the gradients as float32."""
        return dequantise(self.codes, self.lengths, self.exponents)

    def arrays(self) -> list[NDArray[Any]]:
        """Return the fields as arrays in wire order."""
        return [
            np.array([self.round_number, self.digest], dtype=np.int64),
            self.devices.astype(np.int32),
            self.lengths.astype(np.int64),
            self.codes,
            self.exponents.astype(np.int32),
        ]

    @classmethod
    def read(cls, take: "Reader") -> "CutGradients":
        """Check and read one block; raises WireError."""
        round_number, digest = (int(v) for v in take.array("pending round", "i8", 1, size=2))
        check("pending round", round_number > 0, "must be positive")
        devices = take.array("pending devices", "i4", 1).astype(np.int64)
        check_ids("pending devices", devices)
        lengths = take.array("pending lengths", "i8", 1, size=len(devices)).astype(np.int64)
        valid = bool(((lengths >= 0) & (lengths <= take.total)).all())  # each, since a sum could overflow
        check("pending lengths", valid, "must be counts of the values sent")
        codes = take.array("cut gradients", ("f2", "f4"), 1, size=int(lengths.sum()))
        exponents = take.array("exponents", "i4", 1, size=len(devices)).astype(np.int32)
        check_scaled(codes, exponents)
        return cls(round_number, digest, devices, lengths, codes, exponents)


@dataclass(frozen=True)
class Download:
    """Everything that goes to a node in one exchange.

    Attributes
    ----------
    run : int
        Names the run in the node's state folder.
    round_number : int
        Of the chunk to release.
    keep_from : int
        Pending chunks of earlier rounds will not be asked for again.
    per_device : bool
        Whether gradients are to be summed per device instead of over the node.
    weights : float32 array (parameters,)
        The first layer's, flat.
    schedule : int64 array (devices, 4)
        Device id, pass, start, stop: release the records ``order(pass)[start:stop]``.
    pending : sequence of CutGradients
        Chunks to run the backward half of.
    nonce : int
        A number that no other download has; its answer repeats it.
    """

    run: int
    round_number: int
    keep_from: int
    per_device: bool
    weights: FloatArray
    schedule: IntArray
    pending: Sequence[CutGradients] = ()
    nonce: int = 0

    def to_bytes(self) -> bytes:
        """Pack for the wire."""
        head = [self.run, self.round_number, self.keep_from, int(self.per_device), len(self.pending), self.nonce]
        blocks = [array for block in self.pending for array in block.arrays()]
        return pack_arrays(
            _DOWNLOAD,
            [np.array(head, dtype=np.int64), self.weights, self.schedule.astype(np.int32), *blocks],
        )

    @classmethod
    def from_bytes(cls, payload: bytes, *, parameters: int) -> "Download":
        """Check and read a download; ``parameters`` is the first layer's size. Raises WireError."""
        take = Reader(payload, _DOWNLOAD)
        run, round_number, keep_from, per_device, blocks, nonce = (int(v) for v in take.array("head", "i8", 1, size=6))
        check("run", run >= 0, "must not be negative")
        check("round", 0 < round_number < 2**32, "must be in 1..2^32-1")
        check("per device", per_device in (0, 1), "must be 0 or 1")
        weights = take.array("weights", "f4", 1, size=parameters).astype(np.float32)
        check("weights", bool(np.isfinite(weights).all()), "must be finite")
        schedule = take.array("schedule", "i4", 2).astype(np.int64)
        check("schedule", schedule.shape[1] == 4, "must have 4 columns")
        check_ids("schedule", schedule[:, 0])
        valid = (schedule[:, 1] >= 0) & (schedule[:, 2] >= 0) & (schedule[:, 2] <= schedule[:, 3])
        check("schedule", bool(valid.all()), "must have pass >= 0 and 0 <= start <= stop")
        check("pending", 0 <= blocks <= take.total, "must be a count of the blocks sent")
        pending = tuple(CutGradients.read(take) for _ in range(blocks))
        rounds = [block.round_number for block in pending]
        check("pending round", len(set(rounds)) == len(rounds), "must not come twice")
        take.finish()
        return cls(run, round_number, keep_from, bool(per_device), weights, schedule, pending, nonce)


@dataclass(frozen=True)
class Registration:
    """What a node says of itself before training: its devices and their record counts.

    Attributes
    ----------
    devices, train, test : int64 arrays (devices,)
        Device ids, ascending, and how many training and test records each holds.
    """

    devices: IntArray
    train: IntArray
    test: IntArray

    def to_bytes(self) -> bytes:
        """Pack for the wire."""
        return pack_arrays(
            _REGISTRATION,
            [self.devices.astype(np.int32), self.train.astype(np.int64), self.test.astype(np.int64)],
        )

    @classmethod
    def from_bytes(cls, payload: bytes) -> "Registration":
        """Check and read a registration. Raises WireError."""
        take = Reader(payload, _REGISTRATION)
        devices = take.array("devices", "i4", 1).astype(np.int64)
        check_ids("devices", devices)
        train = take.array("train records", "i8", 1, size=len(devices)).astype(np.int64)
        test = take.array("test records", "i8", 1, size=len(devices)).astype(np.int64)
        valid = ((train >= 0) & (train < 2**31) & (test >= 0) & (test < 2**31)).all()
        check("records", bool(valid), "must be in 0..2^31-1")
        take.finish()
        return cls(devices, train, test)


def weights_digest(weights: FloatArray) -> int:
    """Return a 62-bit name of some weights, by which node and server agree which ones a chunk was made with."""
    return int.from_bytes(sha256(weights.tobytes()).digest()[:8], "little") >> 2
