"""A payload as the content of a Flower message; the only file that names record keys.

It imports nothing else of the wire: a deployed node pays for imports with every message.
"""

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedsplit.common.errors import WireError

_RECORD_KEY, _PAYLOAD = "fedsplit", "packed"
_LARGE = 2**22  # bytes

TERMS = "terms"
"""The key of a run config under which nodes find the run's terms."""


def to_record(payload: bytes) -> RecordDict:
    """Wrap a payload as the content of a Flower message.

    Flower sends every object in a request of its own, and an array is three; only a large one is worth that, since it
    travels in pieces.
    """
    if len(payload) < _LARGE:
        return RecordDict({_RECORD_KEY: ConfigRecord({_PAYLOAD: payload})})
    array = Array(dtype="uint8", shape=(len(payload),), stype="raw", data=payload)
    return RecordDict({_RECORD_KEY: ArrayRecord({_PAYLOAD: array})})


def from_record(content: RecordDict) -> bytes:
    """Return the payload of a Flower message's content. Raises WireError if there is none."""
    record = content.get(_RECORD_KEY)
    if isinstance(record, ArrayRecord) and _PAYLOAD in record:
        return record[_PAYLOAD].data
    payload = record.get(_PAYLOAD) if isinstance(record, ConfigRecord) else None
    if not isinstance(payload, bytes):
        raise WireError(f"message must hold one packed array under {_RECORD_KEY!r}")
    return payload
