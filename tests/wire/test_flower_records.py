"""Payloads in Flower's records, and the digest that names weights."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from some_messages import message

from fedsplit.common.errors import WireError
from fedsplit.flower.record import from_record, to_record
from fedsplit.wire.exchange import weights_digest


@pytest.mark.parametrize(
    ("payload", "record"),
    [
        (b"", ConfigRecord),
        (message("download").to_bytes(), ConfigRecord),
        (bytes(2**22 - 1), ConfigRecord),
        (bytes(range(256)) * 2**14, ArrayRecord),
        (np.random.default_rng(0).bytes(5_000_001), ArrayRecord),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else str(len(v)),
)
def test_a_payload_travels_as_one_entry_of_a_flower_record(payload: bytes, record: type) -> None:
    """Only from 4 MiB on as an array, which travels in pieces."""
    content = to_record(payload)
    assert list(content) == ["fedsplit"]
    assert type(content["fedsplit"]) is record
    assert list(content["fedsplit"]) == ["packed"]
    assert from_record(content) == payload


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"other": to_record(b"x")["fedsplit"]}),
        RecordDict({"fedsplit": ArrayRecord()}),
        RecordDict({"other": to_record(bytes(2**22))["fedsplit"]}),
        RecordDict({"fedsplit": ConfigRecord()}),
        RecordDict({"fedsplit": ConfigRecord({"other": b"x"})}),
        RecordDict({"fedsplit": ConfigRecord({"packed": 1})}),
        RecordDict({"fedsplit": ConfigRecord({"packed": "x"})}),
        RecordDict({"fedsplit": ConfigRecord({"packed": [b"x"]})}),
        RecordDict({"fedsplit": MetricRecord({"packed": 1})}),
    ],
)
def test_a_record_without_a_payload_is_refused(content: RecordDict) -> None:
    with pytest.raises(WireError, match="message must hold one packed array under 'fedsplit'"):
        from_record(content)


def test_the_digest_names_weights() -> None:
    weights = np.array([1.0, 2.0], dtype=np.float32)
    other = np.array([1.0, np.nextafter(np.float32(2), np.float32(3))], dtype=np.float32)
    assert weights_digest(weights) == weights_digest(weights.copy())
    assert weights_digest(weights) != weights_digest(other)
    assert 0 <= weights_digest(weights) < 2**62
