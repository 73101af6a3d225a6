"""A message of every kind, which numbers are drawn for, and how it is read and compared."""

import dataclasses
import struct
from typing import Any

import numpy as np
from payloads import PARAMETERS, ints, some_ids, some_release

from fedsplit.model.head import Head
from fedsplit.model.tasks import task_of
from fedsplit.wire.exchange import CutGradients, Download, Gradients, Registration, Upload
from fedsplit.wire.head import HeadDownload, HeadUpload, Rows
from fedsplit.wire.ledger import Ledger, Reason

KINDS = {"upload": 1, "download": 2, "registration": 3, "head download": 5, "head upload": 6}
HEAD = Head(4, 3, bias=True, task=task_of("classification"))
Arrays = list[np.ndarray]


def some_ledger(rng: np.random.Generator) -> Ledger:
    counts, rest = rng.choice([0.0, 0.25, 3.0, 2.0**60], 5), rng.choice([0.0, 0.25, 3.0, np.inf, np.nan], 3)
    return Ledger(*counts.tolist(), *rest.tolist())


def some_upload(
    rng: np.random.Generator,
    records: list[int],
    width: int,
    dtype: str,
    targets: str,
    groups: int,
    lost: int = 1,
    bits: int = 0,
) -> Upload:
    sums = Gradients(some_ids(rng, groups), rng.integers(1, 99, groups), rng.normal(size=(groups, PARAMETERS)))
    release = some_release(rng, records, width, dtype, targets, bits=bits)
    reasons, numbers = rng.integers(1, len(Reason) + 1, lost), rng.integers(0, 2**31, lost)
    refused = np.stack([some_ids(rng, lost), reasons, numbers], axis=1)
    rounds, failed, ledger = rng.integers(1, 9, lost), some_ids(rng, lost), some_ledger(rng)
    return Upload(release, sums, rounds, failed, refused, ledger, nonce=int(rng.integers(2**62)))


def some_download(rng: np.random.Generator, lengths: list[list[int]], rows: int, dtype: str) -> Download:
    pending = []
    for block in lengths:
        values = (rng.normal(size=sum(block)) * 10.0 ** rng.integers(-20, 9)).astype(np.float32)
        ids, number, digest = some_ids(rng, len(block)), int(rng.integers(1, 2**32)), int(rng.integers(2**62))
        pending.append(CutGradients.pack(number, digest, ids, ints(*block), values, dtype))
    starts = rng.integers(0, 50, rows)
    table = [some_ids(rng, rows), rng.integers(0, 9, rows), starts, starts + rng.integers(0, 9, rows)]
    return Download(
        run=int(rng.integers(2**62)),
        round_number=int(rng.integers(1, 2**32)),
        keep_from=int(rng.integers(2**32)),
        per_device=bool(rng.integers(2)),
        weights=rng.normal(size=PARAMETERS).astype(np.float32),
        schedule=np.stack(table, axis=1).astype(np.int64),
        pending=tuple(pending),
        nonce=int(rng.integers(2**62)),
    )


def some_registration(rng: np.random.Generator, devices: int) -> Registration:
    return Registration(some_ids(rng, devices), *rng.integers(0, 2**31, (2, devices)))


def some_head_download(rng: np.random.Generator, records: list[int], dtype: str) -> HeadDownload:
    features = (rng.normal(size=(sum(records), 4)) * 10.0 ** rng.integers(-9, 9, (sum(records), 1))).astype(np.float32)
    head = rng.normal(size=HEAD.size).astype(np.float32)
    names, number, ids = rng.integers(2**62, size=3).tolist(), int(rng.integers(1, 2**32)), some_ids(rng, len(records))
    return HeadDownload(names[0], number, names[1], names[2], ids, ints(*records), head, Rows.pack(features, dtype))


def some_head_upload(asked: HeadDownload, y: np.ndarray, dtype: str) -> HeadUpload:
    found = HEAD.sums(asked.head, asked.features.values(), y)
    rows = Rows.pack(found.features.astype(np.float32), dtype)
    return HeadUpload(asked.nonce, len(y), found.loss, found.correct, found.head, rows)


ASKED = some_head_download(np.random.default_rng(5), [2, 0, 3], "float32")


def read(kind: str, payload: bytes) -> Any:
    if kind == "registration":
        return Registration.from_bytes(payload)
    if kind == "head download":
        return HeadDownload.from_bytes(payload, HEAD)
    if kind == "head upload":
        return HeadUpload.from_bytes(payload, HEAD, ASKED, test=False)
    return {"upload": Upload, "download": Download}[kind].from_bytes(payload, parameters=PARAMETERS)


def assert_same(a: Any, b: Any) -> None:
    """Compare messages field by field: types of arrays and every bit of them."""
    assert type(a) is type(b)
    if dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b or (a != a and b != b)


DTYPES = ("<f4", "<f2", "<i4", "<i8", "<u1", "<u2", "<u4", "<f8", "<i2")


def message(kind: str, dtype: str = "float16") -> Any:
    """Return a message; ``dtype`` of an upload's values may also be ``1 bits`` to ``8 bits``."""
    rng = np.random.default_rng(7)
    if kind == "upload":
        targets = "columns" if dtype == "float32" else "classes"
        bits = int(dtype.removesuffix(" bits")) if dtype.endswith("bits") else 0
        return some_upload(rng, [2, 0, 3], 13, dtype, targets, groups=2, lost=2, bits=bits)
    if kind == "download":
        return some_download(rng, [[3, 0, 2], [4]], 3, dtype)
    if kind == "head download":
        return some_head_download(rng, [2, 0, 3], dtype)
    if kind == "head upload":
        return some_head_upload(ASKED, ints(0, 2, 1, 0, 1), dtype)
    return some_registration(rng, 4)


def unpack(payload: bytes) -> Arrays:
    """Read a payload's arrays, without any of fedsplit's code."""
    (count,), offset, table, found = struct.unpack_from("<H", payload, 4), 6, [], []
    for _ in range(count):
        code, ndim = payload[offset], payload[offset + 1]
        table.append((np.dtype(DTYPES[code]), struct.unpack_from(f"<{ndim}I", payload, offset + 2)))
        offset += 2 + 4 * ndim
    for dtype, shape in table:
        items = int(np.prod(shape))
        found.append(np.frombuffer(payload, dtype, items, offset).reshape(shape).copy())
        offset += items * dtype.itemsize
    assert offset == len(payload)
    return found
