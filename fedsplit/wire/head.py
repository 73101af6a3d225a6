"""What crosses the network where labels stay at home, besides releases: features down, gradients and sums up.

Both sides treat the other's payload as hostile; see :mod:`fedsplit.wire.exchange`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray, IntArray
from fedsplit.common.errors import WireError
from fedsplit.model.head import Head
from fedsplit.wire.coding import dequantise, quantise
from fedsplit.wire.container import LARGEST, Reader, check, check_ids, check_scaled, pack_arrays

_DOWNLOAD, _UPLOAD = 5, 6  # 1 to 4 are in fedsplit.wire.exchange
_KIND_AT = 3  # of a payload's bytes
_SPARE = 4096  # bytes of an upload besides its records and the head's gradient
_ROUNDING = 1.01
FEWEST = 2
"""Records of a device, of which alone it answers: of one the gradient of the head's bias is that at its outputs, which
is the label. A device of its own and one among others on a node are alike."""


@dataclass(frozen=True)
class Rows:
    """Some numbers of each record, coded for the wire.

    Attributes
    ----------
    codes : float16 or float32 array (records, columns)
    exponents : int32 array (records,)
        One power-of-two scale per record, as in :class:`fedsplit.wire.release.Release`.
    """

    codes: NDArray[Any]
    exponents: NDArray[np.int32]

    @classmethod
    def pack(cls, values: FloatArray, dtype: str) -> "Rows":
        """Code float32 ``values`` (records, columns)."""
        codes, exponents = quantise(values.ravel(), np.full(len(values), values.shape[1]), dtype)
        return cls(codes.reshape(values.shape), exponents)

    def values(self) -> FloatArray:
        """Return the numbers as float32 ``(records, columns)``."""
        lengths = np.full(len(self.codes), self.codes.shape[1])
        return dequantise(self.codes.ravel(), lengths, self.exponents).reshape(self.codes.shape)

    def arrays(self) -> list[NDArray[Any]]:
        """Return the fields as arrays in wire order."""
        return [self.codes, self.exponents.astype(np.int16)]

    @classmethod
    def read(cls, take: Reader, field: str, records: int, columns: int) -> "Rows":
        """Check and read the rows of some records.

        Parameters
        ----------
        take : Reader
            Stands before the rows.
        field : str
            What they are called in an error.
        records, columns : int
            The shape that they must have.

        Raises
        ------
        WireError
            If anything is not as it must be.
        """
        codes = take.array(field, ("f2", "f4"), 2, size=records)
        check(field, codes.shape[1] == columns, f"must have {columns} columns")
        exponents = take.array(f"{field} exponents", "i2", 1, size=records).astype(np.int32)
        check_scaled(codes, exponents)
        return cls(codes, exponents)


@dataclass(frozen=True)
class HeadDownload:
    """Everything that goes to a node whose labels are asked: the features of what it released, and the head.

    Attributes
    ----------
    run, round_number : int
        Those of the release.
    nonce : int
        A number that no other download has; its answer repeats it.
    digest : int
        Of the weights that released the records; see :func:`fedsplit.wire.exchange.weights_digest`.
    devices, records : int64 arrays (devices,)
        Device ids, ascending, and how many records each released.
    head : float32 array (parameters,)
    features : Rows
        In the order of the release.
    """

    run: int
    round_number: int
    nonce: int
    digest: int
    devices: IntArray
    records: IntArray
    head: FloatArray
    features: Rows

    def to_bytes(self) -> bytes:
        """Pack for the wire."""
        numbers = np.array([self.run, self.round_number, self.nonce, self.digest], dtype=np.int64)
        ids, records = self.devices.astype(np.int32), self.records.astype(np.int64)
        return pack_arrays(_DOWNLOAD, [numbers, ids, records, self.head, *self.features.arrays()])

    @classmethod
    def from_bytes(cls, payload: bytes, head: Head) -> "HeadDownload":
        """Check and read a download for a head of this shape; raises WireError."""
        take = Reader(payload, _DOWNLOAD)
        run, round_number, nonce, digest = (int(v) for v in take.array("numbers", "i8", 1, size=4))
        check("run", run >= 0, "must not be negative")
        check("round", 0 < round_number < 2**32, "must be in 1..2^32-1")
        devices = take.array("devices", "i4", 1).astype(np.int64)
        check_ids("devices", devices)
        records = take.array("records", "i8", 1, size=len(devices)).astype(np.int64)
        # each, since a sum could overflow
        check("records", bool(((records >= 0) & (records <= take.total)).all()), "must be counts of the records sent")
        weights = take.array("head", "f4", 1, size=head.size).astype(np.float32)
        check("head", bool(np.isfinite(weights).all()), "must be finite")
        features = Rows.read(take, "features", int(records.sum()), head.features)
        take.finish()
        return cls(run, round_number, nonce, digest, devices, records, weights, features)

    @staticmethod
    def is_in(payload: bytes) -> bool:
        """Whether a payload says that it is one of these."""
        return payload[_KIND_AT : _KIND_AT + 1] == bytes([_DOWNLOAD])


@dataclass(frozen=True)
class HeadUpload:
    """Everything that leaves a node when its labels are asked: no label, no output of the head, no gradient at one.

    Attributes
    ----------
    nonce : int
        That of the download which it answers.
    records : int
        Of how many it speaks: all that it was asked about, or none, if these are missing or of another release.
    loss : float
        Summed over them.
    correct : int
        How many of them are classified right; 0 if the task has no classes.
    head : float64 array (parameters,)
        Gradient of the summed loss; empty where only test records were scored.
    features : Rows
        Gradients of the summed loss at the features; empty likewise.
    """

    nonce: int
    records: int
    loss: float
    correct: int
    head: NDArray[np.float64]
    features: Rows

    def to_bytes(self) -> bytes:
        """Pack for the wire."""
        counts = np.array([self.nonce, self.records, self.correct], dtype=np.int64)
        return pack_arrays(_UPLOAD, [counts, np.array([self.loss]), self.head, *self.features.arrays()])

    @classmethod
    def from_bytes(cls, payload: bytes, head: Head, asked: HeadDownload, *, test: bool) -> "HeadUpload":
        """Check and read the answer to a download.

        Parameters
        ----------
        payload : bytes
        head : Head
            The trunk's last layer.
        asked : HeadDownload
            What was asked: the answer repeats its nonce.
        test : bool
            Whether the records are test records, which give no gradients.

        Raises
        ------
        WireError
            If anything is not as it must be, or the numbers are none that any labels would give.
        """
        most = asked.features.codes.size * 4 + 2 * len(asked.features.codes) + 8 * head.size + _SPARE
        check("size", len(payload) <= most, f"must be at most {most} bytes, got {len(payload)}")
        take = Reader(payload, _UPLOAD)
        nonce, records, right = (int(v) for v in take.array("counts", "i8", 1, size=3))
        if nonce != asked.nonce:
            raise WireError("nonce must be that of the message: this upload answers another one")
        number = len(asked.features.codes)
        check("records", records in (0, number), f"must be {number}, those that were asked about, or 0")
        check("correct", 0 <= right <= records, f"must be in 0..{records}")
        loss = float(take.array("loss", "f8", 1, size=1)[0])
        check("loss", 0 <= loss <= LARGEST, f"must be in 0..{LARGEST:g}")
        given = 0 if test else records
        at_head = take.array("head", "f8", 1, size=head.size if given else 0).astype(np.float64)
        features = Rows.read(take, "features", given, head.features)
        take.finish()
        upload = cls(nonce, records, loss, right, at_head, features)
        if given:
            _check_possible(upload, head, asked)
        return upload


def _check_possible(upload: HeadUpload, head: Head, asked: HeadDownload) -> None:
    """Refuse gradients that no labels give: a node's say must not be larger than labels of its choice would make it.

    How much larger than what labels give it can be, follows from :meth:`fedsplit.model.tasks.base.Task.steepest`.
    """
    at_features, at_head = upload.features.values(), upload.head
    check("head", bool(np.isfinite(at_head).all()), "must be finite")
    columns = most = np.full(head.features, LARGEST)
    each = LARGEST
    if bounds := head.task.steepest(head.outputs):
        at_one, at_all = bounds
        columns = at_one * np.abs(asked.features.values()).sum(axis=0, dtype=np.float64) * _ROUNDING
        most = at_all * np.abs(head.weight(asked.head)).max(axis=0).astype(np.float64) * _ROUNDING
        each = at_one * len(at_features) * _ROUNDING
    check("features", bool((np.abs(at_features) <= most).all()), "must be gradients that labels can give")
    weight, bias = head.weight(at_head), at_head[head.outputs * head.features :]
    inside = bool((np.abs(weight) <= columns).all() and (np.abs(bias) <= each).all())
    check("head", inside, "must be a gradient that labels can give")
