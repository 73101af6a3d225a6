"""A payload as the content of a Flower message; the only file that names record keys.

It imports nothing else of the wire: a deployed node pays for imports with every message.
"""

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedsplit.errors import WireError

_RECORD_KEY, _PAYLOAD, _DOZES, _SECONDS = "fedsplit", "packed", "dozes", "seconds"
_LARGE = 2**22  # bytes
LONGEST_PAUSE = 60.0  # seconds


def to_record(payload: bytes, *, dozes: bool = False) -> RecordDict:
    """Wrap a payload as the content of a Flower message.

    Flower sends every object in a request of its own, and an array is three; only a large one is worth that, since it
    travels in pieces.

    Parameters
    ----------
    payload : bytes
    dozes : bool
        Whether to say that the node sleeps when no message waits for it, as Flower's SuperNode does; a large payload
        does not say it.
    """
    if len(payload) < _LARGE:
        return RecordDict({_RECORD_KEY: ConfigRecord({_PAYLOAD: payload, **({_DOZES: True} if dozes else {})})})
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


def dozes(content: RecordDict) -> bool:
    """Whether a reply says that its node sleeps when no message waits for it."""
    record = content.get(_RECORD_KEY)
    return isinstance(record, ConfigRecord) and record.get(_DOZES) is True


def to_pause(seconds: float) -> RecordDict:
    """Return the content of a message that only keeps a node awake."""
    return RecordDict({_RECORD_KEY: ConfigRecord({_SECONDS: seconds})})


def from_pause(content: RecordDict) -> float:
    """Return the seconds to stay awake, at most a minute; what is no such message asks for none."""
    record = content.get(_RECORD_KEY)
    seconds = record.get(_SECONDS) if isinstance(record, ConfigRecord) else None
    return min(seconds, LONGEST_PAUSE) if isinstance(seconds, float) and seconds > 0 else 0.0
