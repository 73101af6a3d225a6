"""What crosses the network: uploads, downloads and registrations.

Releases are sparse by construction: a count per record, a bitmap of the outputs that were sent, their values.
Reading a payload checks its arrays against what the kind must hold, then the numbers against each other; a refusal
names the field. Both sides treat the other's payload as hostile.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.errors import WireError
from fedsplit.release.policies import Kept
from fedsplit.wire.container import (
    FloatArray,
    IntArray,
    Reader,
    check,
    check_ids,
    check_scaled,
    dequantise,
    pack_arrays,
    pack_codes,
    quantise,
    stack_rows,
    unpack_codes,
)

MOST_RECORDS = 4096  # of a query
EPISODE = 8
"""Consecutive records of a watched device that are judged together."""
SHORTEST, LONGEST = 0.001, 86_400.0  # seconds from one of its records to the next
WATCHED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # what it may be called
_UPLOAD, _DOWNLOAD, _REGISTRATION, _QUERY = 1, 2, 3, 4


@dataclass(frozen=True)
class Release:
    """The dropped activations of some devices' records, as sent; made by :meth:`pack` or read off the wire.

    Attributes
    ----------
    devices, records : int64 arrays (devices,)
        Device ids, ascending, and how many records each contributes.
    targets : float32 or int64 array (records,) or (records, outputs)
        The records' labels.
    counts, bitmap, width
        As in :class:`fedsplit.release.policies.Kept`.
    codes : float16, float32 or uint8 array (sum of counts,)
    exponents : int32 array (records,)
        One power-of-two scale per record, so that its bytes do not depend on what it is sent with.
    bits : int
        0, or of how many bits the uint8 codes are; see :meth:`fedsplit.release.policies.Dropping.coded`.
    """

    devices: IntArray
    records: IntArray
    targets: NDArray[Any]
    counts: IntArray
    bitmap: NDArray[np.uint8]
    codes: NDArray[Any]
    exponents: NDArray[np.int32]
    width: int
    bits: int = 0

    @classmethod
    def pack(
        cls, kept: Kept, devices: IntArray, records: IntArray, targets: NDArray[Any], dtype: str, bits: int = 0
    ) -> "Release":
        """Make a release of what dropping kept; nothing else can be released.

        With ``bits``, the values are levels of so many bits, and ``dtype`` does not matter.

        Raises
        ------
        TypeError
            If ``kept`` is not a :class:`Kept`: dense activations have no way onto the wire.
        """
        if not isinstance(kept, Kept):
            raise TypeError(f"a release is packed from Kept, not from {type(kept).__name__}")
        if bits:
            levels = np.asarray(kept.values * np.float32(2.0 ** (bits - 1)), dtype=np.uint8)
            exponents = np.full(len(kept.counts), 1 - bits, dtype=np.int32)
            return cls(devices, records, targets, kept.counts, kept.bitmap, levels, exponents, kept.width, bits)
        codes, exponents = quantise(kept.values, kept.counts, dtype)
        return cls(devices, records, targets, kept.counts, kept.bitmap, codes, exponents, kept.width)

    def values(self) -> FloatArray:
        """Return the sent outputs as float32."""
        return dequantise(self.codes, self.counts, self.exponents)

    def take(self, rows: NDArray[np.bool_]) -> "Release":
        """Return the releases of some of the devices."""
        of_records = np.repeat(rows, self.records)
        return replace(
            self,
            devices=self.devices[rows],
            records=self.records[rows],
            targets=self.targets[of_records],
            counts=self.counts[of_records],
            bitmap=self.bitmap[of_records],
            codes=self.codes[np.repeat(of_records, self.counts)],
            exponents=self.exponents[of_records],
        )

    def arrays(self) -> list[NDArray[Any]]:
        """Return the fields as arrays in wire order."""
        small = np.uint16 if self.width <= 0xFFFF else np.uint32
        kind = np.float32 if self.targets.dtype.kind == "f" else np.int32
        return [
            np.array([self.width, self.bits], dtype=np.uint32),
            self.devices.astype(np.int32),
            self.records.astype(np.int32),
            self.targets.astype(kind),
            self.counts.astype(small),
            self.bitmap,
            pack_codes(self.codes, self.bits) if self.bits else self.codes,
            self.exponents[: 0 if self.bits else None].astype(np.int16),
        ]

    @classmethod
    def read(cls, take: "Reader") -> "Release":
        """Check and read one release; raises WireError."""
        width, bits = (int(v) for v in take.array("width", "u4", 1, size=2))
        check("bits", bits <= 8, "must be in 0..8")
        devices = take.array("devices", "i4", 1).astype(np.int64)
        check_ids("devices", devices)
        records = take.array("records", "i4", 1, size=len(devices)).astype(np.int64)
        check("records", bool((records >= 0).all()), "must not be negative")
        n = int(records.sum())
        targets = take.array("targets", ("f4", "i4"), (1, 2), size=n)
        integer_targets = targets.dtype.kind == "i"
        targets = targets.astype(np.int64 if integer_targets else np.float32)
        check("targets", integer_targets or bool(np.isfinite(targets).all()), "must be finite")
        return cls._read_outputs(take, devices, records, targets, width, bits)

    @classmethod
    def _read_outputs(
        cls, take: "Reader", devices: IntArray, records: IntArray, targets: NDArray[Any], width: int, bits: int
    ) -> "Release":
        n = int(records.sum())
        counts = take.array("counts", ("u2", "u4"), 1, size=n).astype(np.int64)
        bitmap = take.array("bitmap", "u1", 2, size=n)
        if bitmap.shape[1] != -(-width // 8):
            raise WireError(f"bitmap must have {-(-width // 8)} bytes per record")
        if width % 8 and (bitmap[:, -1] >> (width % 8)).any():
            raise WireError(f"bitmap has bits beyond width {width}")
        same = np.bitwise_count(bitmap).sum(axis=1, dtype=np.int64).tobytes() == counts.tobytes()
        check("counts", same, "must equal the bitmap's set bits")
        total = sum(counts.tolist())
        if bits:
            codes: NDArray[Any] = unpack_codes(take.array("codes", "u1", 1), total, bits)
            take.array("exponents", "i2", 1, size=0)
            exponents = np.full(n, 1 - bits, dtype=np.int32)
        else:
            codes = take.array("values", ("f2", "f4"), 1, size=total)
            exponents = take.array("exponents", "i2", 1, size=n).astype(np.int32)
        release = cls(devices, records, targets, counts, bitmap, codes, exponents, width, bits)
        if not bits:
            check_scaled(codes, exponents)
        return release


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
        """Quantise float32 ``values`` per device."""
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
        release = Release._read_outputs(take, none, np.array([n]), np.zeros(n, dtype=np.int64), width, bits)
        take.finish()
        return cls(layer, release)


def weights_digest(weights: FloatArray) -> int:
    """Return a 62-bit name of some weights, by which node and server agree which ones a chunk was made with."""
    return int.from_bytes(sha256(weights.tobytes()).digest()[:8], "little") >> 2
