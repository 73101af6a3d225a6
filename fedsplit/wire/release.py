"""The dropped activations of records, as sent."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray, IntArray, sum_groups
from fedsplit.common.errors import WireError
from fedsplit.release.admitted import Admitted
from fedsplit.release.codes import Code
from fedsplit.wire.coding import dequantise, pack_codes, quantise, unpack_codes
from fedsplit.wire.container import Reader, check, check_ids, check_scaled


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
        As in :class:`fedsplit.release.kept.Kept`.
    codes : float16, float32 or uint8 array (sum of counts,)
    exponents : int32 array (records,)
        One power-of-two scale per record, so that its bytes do not depend on what it is sent with.
    bits : int
        0, or of how many bits the uint8 codes are; see :class:`fedsplit.release.codes.Code`.
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
        cls, admitted: Admitted, devices: IntArray, records: IntArray, targets: NDArray[Any], dtype: str, bits: int = 0
    ) -> "Release":
        """Make a release of what may leave; nothing else can be released.

        Parameters
        ----------
        admitted : Admitted
            What the guard has let through.
        devices, records : int64 arrays (devices,)
            Device ids, ascending, and how many records each releases.
        targets : array (records,) or (records, outputs)
            The records' labels.
        dtype : str
            ``float16`` or ``float32``, of the values; for codes it does not matter.
        bits : int
            0, or the bits of each value's code.

        Raises
        ------
        TypeError
            If ``admitted`` is not an :class:`Admitted`: what no guard has seen has no way onto the wire.
        """
        if not isinstance(admitted, Admitted):
            raise TypeError(f"a release is packed from Admitted, not from {type(admitted).__name__}")
        kept = admitted.kept
        code = Code(bits)
        if code.floats:
            codes, exponents = quantise(kept.values, kept.counts, dtype)
        else:
            codes, exponents = code.levels(kept.values), np.full(len(kept.counts), code.exponent, dtype=np.int32)
        return cls(devices, records, targets, kept.counts, kept.bitmap, codes, exponents, kept.width, bits)

    def values(self) -> FloatArray:
        """Return the sent outputs as float32."""
        return dequantise(self.codes, self.counts, self.exponents)

    @property
    def owners(self) -> IntArray:
        """The device of each record."""
        return np.repeat(self.devices, self.records)

    @property
    def lengths(self) -> IntArray:
        """How many values each device has sent."""
        return sum_groups(self.counts, self.records)

    def among(self, devices: IntArray) -> "Release":
        """Return the releases of those of some devices that are here."""
        rows = np.isin(self.devices, devices)
        if rows.all():
            return self
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
        return cls.read_outputs(take, devices, records, targets, width, bits)

    @classmethod
    def read_outputs(
        cls, take: "Reader", devices: IntArray, records: IntArray, targets: NDArray[Any], width: int, bits: int
    ) -> "Release":
        """Check and read what follows the head of a release.

        Parameters
        ----------
        take : Reader
            Stands before the counts.
        devices, records : int64 arrays (devices,)
            Device ids, and how many records each releases.
        targets : array (records,) or (records, outputs)
        width : int
            The first layer's outputs.
        bits : int
            0 for floats, or the bits of each value's code.

        Raises
        ------
        WireError
            If anything is not as it must be.
        """
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
            exponents = np.full(n, Code(bits).exponent, dtype=np.int32)
        else:
            codes = take.array("values", ("f2", "f4"), 1, size=total)
            exponents = take.array("exponents", "i2", 1, size=n).astype(np.int32)
        release = cls(devices, records, targets, counts, bitmap, codes, exponents, width, bits)
        if not bits:
            check_scaled(codes, exponents)
        return release
