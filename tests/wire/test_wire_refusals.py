"""Hostile payloads are refused by the name of the field."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from some_messages import KINDS, message, read, unpack

from fedsplit.common.errors import WireError
from fedsplit.wire.container import pack_arrays
from fedsplit.wire.exchange import CutGradients, Download, Upload

UPLOAD_FIELDS = {
    "nonce": 0,
    "ledger": 1,
    "lost": 2,
    "failed": 3,
    "refused": 4,
    "width": 5,
    "devices": 6,
    "records": 7,
    "targets": 8,
    "counts": 9,
    "bitmap": 10,
    "values": 11,
    "exponents": 12,
    "gradient devices": 13,
    "gradient records": 14,
    "gradients": 15,
}


DOWNLOAD_FIELDS = {
    "head": 0,
    "weights": 1,
    "schedule": 2,
    "pending round": 3,
    "pending devices": 4,
    "pending lengths": 5,
    "cut gradients": 6,
    "exponents": 7,
}


REGISTRATION_FIELDS = {"devices": 0, "train": 1, "test": 2}
HEAD_DOWNLOAD_FIELDS = {"numbers": 0, "devices": 1, "records": 2, "head": 3, "features": 4, "exponents": 5}
HEAD_UPLOAD_FIELDS = {"counts": 0, "loss": 1, "head": 2, "features": 3, "exponents": 4}


FIELDS = {
    "upload": UPLOAD_FIELDS,
    "download": DOWNLOAD_FIELDS,
    "registration": REGISTRATION_FIELDS,
    "head download": HEAD_DOWNLOAD_FIELDS,
    "head upload": HEAD_UPLOAD_FIELDS,
}


def put(at: Any, value: Any) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[at] = value

    return change


def flip(at: Any, bit: int) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[at] ^= bit

    return change


def swap_rows(array: np.ndarray) -> None:
    array[[0, 1]] = array[[1, 0]]


REFUSALS: list[tuple[str, str, str, Callable[[np.ndarray], Any], str]] = [
    ("upload", "float16", "nonce", lambda a: a[:0], "nonce must have 1 rows, got 0"),
    ("upload", "float16", "nonce", lambda a: np.append(a, a), "nonce must have 1 rows, got 2"),
    ("upload", "float16", "nonce", lambda a: a[None], "nonce must have 1 axes, got 2"),
    ("upload", "float16", "nonce", lambda a: a.astype(np.int32), "nonce must be of dtype i8, got i4"),
    ("upload", "float16", "ledger", put(0, -1), "ledger must not be negative"),
    ("upload", "float16", "ledger", put(7, -1e-300), "ledger must not be negative"),
    ("upload", "float16", "ledger", put(3, -np.inf), "ledger must not be negative"),
    ("upload", "float16", "ledger", put(1, np.inf), "ledger must have finite counts"),
    ("upload", "float16", "ledger", put(4, np.nan), "ledger must have finite counts"),
    ("upload", "float16", "ledger", lambda a: a[:7], "ledger must have 8 rows, got 7"),
    ("upload", "float16", "ledger", lambda a: np.zeros(8, np.int64), "ledger must be of dtype f8, got i8"),
    ("upload", "float16", "lost", lambda a: a.astype(np.int32), "lost must be of dtype i8, got i4"),
    ("upload", "float16", "failed", lambda a: a[None], "failed must have 1 axes, got 2"),
    ("upload", "float16", "refused", put((1, 2), -1), "refused must not be negative"),
    ("upload", "float16", "refused", put((0, 0), -5), "refused must not be negative"),
    ("upload", "float16", "refused", lambda a: a[:, :2], "refused must have 3 columns"),
    ("upload", "float16", "refused", lambda a: a.ravel(), "refused must have 2 axes, got 1"),
    ("upload", "float16", "refused", lambda a: a.astype(np.int64), "refused must be of dtype i4, got i8"),
    ("upload", "float16", "width", put(0, 21), "bitmap must have 3 bytes per record"),
    ("upload", "float16", "width", put(0, 9), "bitmap has bits beyond width 9"),
    ("upload", "float16", "width", lambda a: a[:1], "width must have 2 rows, got 1"),
    ("upload", "float16", "width", put(1, 9), "bits must be in 0..8"),
    ("upload", "3 bits", "width", put(1, 2**32 - 1), "bits must be in 0..8"),
    ("upload", "float16", "width", put(1, 3), "codes must be of dtype u1, got f2"),
    ("upload", "3 bits", "width", put(1, 0), "values must be of dtype f2 or f4, got u1"),
    ("upload", "3 bits", "width", put(1, 4), "codes must be [0-9]+ of 4 bits"),
    ("upload", "3 bits", "width", put(1, 1), "codes must be [0-9]+ of 1 bits"),
    ("upload", "float16", "devices", swap_rows, "devices must be ascending device ids"),
    ("upload", "float16", "devices", put(0, -1), "devices must be ascending device ids"),
    ("upload", "float16", "devices", put(2, 10_000_000), "devices must be ascending device ids"),
    ("upload", "float16", "devices", lambda a: a[:2], "records must have 2 rows, got 3"),
    ("upload", "float16", "records", put(0, -1), "records must not be negative"),
    ("upload", "float16", "records", put(0, 3), "targets must have 6 rows, got 5"),
    ("upload", "float16", "targets", lambda a: a.astype(np.int64), "targets must be of dtype f4 or i4, got i8"),
    ("upload", "float32", "targets", put((1, 1), np.nan), "targets must be finite"),
    ("upload", "float16", "counts", lambda a: a[:4], "counts must have 5 rows, got 4"),
    ("upload", "float16", "counts", lambda a: a.astype(np.int32), "counts must be of dtype u2 or u4, got i4"),
    ("upload", "float16", "counts", lambda a: a[::-1], "counts must equal the bitmap's set bits"),
    ("upload", "float16", "bitmap", flip((0, 0), 1), "counts must equal the bitmap's set bits"),
    ("upload", "float16", "bitmap", flip((4, 1), 0x20), "bitmap has bits beyond width 13"),
    ("upload", "float16", "bitmap", lambda a: a[:, :1], "bitmap must have 2 bytes per record"),
    ("upload", "float16", "values", lambda a: a[1:], "values must have"),
    ("upload", "float16", "values", put(0, np.nan), "values must be finite"),
    ("upload", "float32", "values", put(-1, np.inf), "values must be finite"),
    ("upload", "float16", "exponents", put(0, 112), "exponents must be in -200..111"),
    ("upload", "float32", "exponents", put(2, 1), "exponents must be in 0..0"),
    ("upload", "float16", "exponents", put(-1, -201), "exponents must be in -200..111"),
    ("upload", "float16", "exponents", lambda a: a[1:], "exponents must have 5 rows, got 4"),
    ("upload", "float16", "exponents", lambda a: a.astype(np.int32), "exponents must be of dtype i2, got i4"),
    ("upload", "1 bits", "values", lambda a: np.zeros(1, np.uint8), "codes must be [0-9]+ of 1 bits"),
    ("upload", "3 bits", "values", lambda a: a[1:], "codes must be [0-9]+ of 3 bits"),
    ("upload", "8 bits", "values", lambda a: np.append(a, a[:1]), "codes must be [0-9]+ of 8 bits"),
    ("upload", "3 bits", "values", put(0, 0x07), "codes must be below 7"),
    ("upload", "8 bits", "values", put(-1, 255), "codes must be below 255"),
    ("upload", "3 bits", "values", lambda a: a.astype(np.float16), "codes must be of dtype u1, got f2"),
    ("upload", "3 bits", "exponents", lambda a: np.zeros(5, np.int16), "exponents must have 0 rows, got 5"),
    ("upload", "float16", "gradient devices", swap_rows, "gradient devices must be ascending"),
    ("upload", "float16", "gradient records", put(1, 0), "gradient records must be positive"),
    ("upload", "float16", "gradient records", put(0, -5), "gradient records must be positive"),
    ("upload", "float16", "gradients", put((0, 0), np.nan), "gradients must be finite"),
    ("upload", "float16", "gradients", lambda a: a[:, 1:], "gradients must have 5 parameters"),
    ("upload", "float16", "gradients", lambda a: a[:1], "gradients must have 2 rows, got 1"),
    ("download", "float16", "head", lambda a: a[:5], "head must have 6 rows, got 5"),
    ("download", "float16", "head", lambda a: np.append(a, a[:1]), "head must have 6 rows, got 7"),
    ("download", "float16", "head", put(0, -1), "run must not be negative"),
    ("download", "float16", "head", put(1, 0), "round must be in"),
    ("download", "float16", "head", put(1, 2**32), "round must be in"),
    ("download", "float16", "head", put(3, 2), "per device must be 0 or 1"),
    ("download", "float16", "head", put(4, -1), "pending must be a count"),
    ("download", "float16", "head", put(4, 2**62), "pending must be a count"),
    ("download", "float16", "head", put(4, 3), "pending round is missing"),
    ("download", "float16", "head", put(4, 1), "arrays must be 8, got 13"),
    ("download", "float16", "weights", put(0, np.nan), "weights must be finite"),
    ("download", "float16", "weights", put(4, -np.inf), "weights must be finite"),
    ("download", "float16", "weights", lambda a: a[:4], "weights must have 5 rows, got 4"),
    ("download", "float16", "weights", lambda a: a.astype(np.float16), "weights must be of dtype f4, got f2"),
    ("download", "float16", "schedule", lambda a: a[:, :3], "schedule must have 4 columns"),
    ("download", "float16", "schedule", swap_rows, "schedule must be ascending device ids"),
    ("download", "float16", "schedule", put((0, 1), -1), "schedule must have pass >= 0"),
    ("download", "float16", "schedule", put((0, 2), -1), "schedule must have pass >= 0 and 0 <= start"),
    ("download", "float16", "schedule", put((0, slice(2, 4)), [5, 4]), "0 <= start <= stop"),
    ("download", "float16", "pending round", put(0, 0), "pending round must be positive"),
    ("download", "float16", "pending devices", swap_rows, "pending devices must be ascending"),
    ("download", "float16", "pending lengths", put(0, -1), "pending lengths must be counts"),
    ("download", "float16", "pending lengths", put(0, 2**40), "pending lengths must be counts"),
    ("download", "float16", "pending lengths", put(0, 4), "cut gradients must have 6 rows, got 5"),
    ("download", "float16", "cut gradients", put(0, np.inf), "values must be finite"),
    ("download", "float16", "exponents", put(0, -201), "exponents must be in -200..111"),
    ("download", "float32", "exponents", put(0, -1), "exponents must be in 0..0"),
    ("registration", "float16", "devices", swap_rows, "devices must be ascending device ids"),
    ("registration", "float16", "train", put(0, -1), "records must be in 0..2\\^31-1"),
    ("registration", "float16", "test", put(0, 2**31), "records must be in 0..2\\^31-1"),
    ("registration", "float16", "test", lambda a: a[1:], "test records must have 4 rows, got 3"),
    ("registration", "float16", "train", lambda a: a.astype(np.int32), "train records must be of dtype i8, got i4"),
    ("head download", "float16", "numbers", put(0, -1), "run must not be negative"),
    ("head download", "float16", "numbers", put(1, 0), "round must be in 1"),
    ("head download", "float16", "devices", swap_rows, "devices must be ascending device ids"),
    ("head download", "float16", "records", put(0, -1), "records must be counts of the records sent"),
    ("head download", "float16", "records", put(0, 2**62), "records must be counts of the records sent"),
    ("head download", "float16", "records", put(0, 1), "features must have 4 rows, got 5"),
    ("head download", "float16", "head", put(3, np.nan), "head must be finite"),
    ("head download", "float16", "head", lambda a: a[1:], "head must have 15 rows, got 14"),
    ("head download", "float32", "features", put((1, 2), np.inf), "values must be finite"),
    ("head download", "float32", "features", lambda a: a[:, 1:], "features must have 4 columns"),
    ("head download", "float32", "exponents", put(1, 1), "exponents must be in 0..0"),
    ("head download", "float16", "exponents", put(1, 112), "exponents must be in -200..111"),
    ("head upload", "float16", "counts", flip(0, 1), "nonce must be that of the message"),
    ("head upload", "float16", "counts", put(1, 4), "records must be 5, those that were asked about, or 0"),
    ("head upload", "float16", "counts", put(1, 0), "correct must be in 0..0"),
    ("head upload", "float16", "counts", put(2, 6), "correct must be in 0..5"),
    ("head upload", "float16", "counts", put(2, -1), "correct must be in 0..5"),
    ("head upload", "float16", "loss", put(0, np.nan), "loss must be in 0"),
    ("head upload", "float16", "loss", put(0, -1e-9), "loss must be in 0"),
    ("head upload", "float16", "head", put(0, np.inf), "head must be finite"),
    ("head upload", "float16", "head", lambda a: a[1:], "head must have 15 rows, got 14"),
    ("head upload", "float16", "head", put(14, 5.1), "head must be a gradient that labels can give"),
    ("head upload", "float32", "features", put((0, 0), -1e3), "features must be gradients that labels can give"),
    ("head upload", "float32", "features", lambda a: a[:, 1:], "features must have 4 columns"),
    ("head upload", "float32", "features", put((0, 0), np.nan), "values must be finite"),
    ("head upload", "float32", "exponents", lambda a: a[1:], "features exponents must have 5 rows, got 4"),
]


@pytest.mark.parametrize(("kind", "dtype", "field", "change", "refusal"), REFUSALS)
def test_refusals_name_the_field(
    kind: str, dtype: str, field: str, change: Callable[[np.ndarray], Any], refusal: str
) -> None:
    arrays = unpack(message(kind, dtype).to_bytes())
    read(kind, pack_arrays(KINDS[kind], arrays))  # good until changed
    at = FIELDS[kind][field]
    if (changed := change(arrays[at])) is not None:
        arrays[at] = changed
    with pytest.raises(WireError, match=refusal):
        read(kind, pack_arrays(KINDS[kind], arrays))


@pytest.mark.parametrize("kind", KINDS)
def test_other_versions_and_kinds_are_refused(kind: str) -> None:
    payload = bytearray(message(kind).to_bytes())
    for version in (0, 1, 3):
        payload[2] = version
        with pytest.raises(WireError, match=f"version must be 2, got {version}"):
            read(kind, bytes(payload))
    for other in set(KINDS) - {kind}:
        with pytest.raises(WireError, match=f"kind must be {KINDS[kind]}, got {KINDS[other]}"):
            read(kind, message(other).to_bytes())


@pytest.mark.parametrize("kind", KINDS)
def test_an_array_too_many_is_refused(kind: str) -> None:
    arrays = unpack(message(kind).to_bytes())
    with pytest.raises(WireError, match=f"arrays must be {len(arrays)}, got {len(arrays) + 1}"):
        read(kind, pack_arrays(KINDS[kind], [*arrays, np.zeros(1, dtype=np.int32)]))


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(WireError, match="weights must have 6 rows, got 5"):
        Download.from_bytes(message("download").to_bytes(), parameters=6)
    with pytest.raises(WireError, match="gradients must have 6 parameters"):
        Upload.from_bytes(message("upload").to_bytes(), parameters=6)


def test_lengths_whose_sum_overflows_are_refused() -> None:
    lengths = np.array([2**62] * 4, dtype=np.int64)
    exponents = np.array([1, 0, 0, 0], dtype=np.int32)
    block = CutGradients(1, 1, np.arange(4), lengths, np.zeros(0, "<f2"), exponents)
    down = Download(1, 1, 0, False, np.zeros(2, np.float32), np.zeros((0, 4), np.int64), [block])
    with pytest.raises(WireError, match="pending lengths"):
        Download.from_bytes(down.to_bytes(), parameters=2)
