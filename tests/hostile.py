"""A node that is registered and lies: ``python hostile.py HOST:PORT CA HOME DATA NAME``."""

import sys
import threading
from itertools import cycle
from pathlib import Path

import numpy as np

from fedsplit.device.link.warm import WarmNode
from fedsplit.device.nodes import answer, real_node
from fedsplit.wire.exchange import Registration, Upload
from fedsplit.wire.release import Release

PARAMETERS = 1040  # of the first layer that the tests train
LIES = {
    "numbers": {"nan": "values must be finite", "shape": "width must be 16", "counts": "targets must have"},
    "words": {
        "labels": "targets must be classes in 0..9",
        "device": "devices must be those that were asked",
        "replay": "nonce must be that of the message",
    },
    "size": {"large": "size must be at most", "nan": "values must be finite", "counts": "targets must have"},
    "name": {"registration": "devices: 0 does not belong to the node's key"},
}
"""By node: the lies that it tells in turn, and what the server says of each."""


def lie(what: str, kind: str, payload: bytes, before: list[bytes]) -> bytes:
    """Return another answer than the honest one."""
    if kind == "query":
        if what == "registration":
            return Registration(np.array([0]), np.array([10]), np.array([0])).to_bytes()
        return payload
    if what == "large":
        return bytes(100_000_000)
    before.append(payload)
    if what == "replay":
        return before[0]
    upload = Upload.from_bytes(payload, parameters=PARAMETERS)
    fields = dict(vars(upload.release))
    if what == "nan":
        fields["codes"] = np.full_like(upload.release.codes, np.nan)
    if what == "shape":
        fields |= {"width": 64, "bitmap": np.pad(upload.release.bitmap, ((0, 0), (0, 6)))}
    if what == "counts":
        fields["records"] = upload.release.records - 1
    if what == "labels":
        fields["targets"] = upload.release.targets + 10
    if what == "device":
        fields["devices"] = np.zeros_like(upload.release.devices)
    return Upload(**{**vars(upload), "release": Release(**fields)}).to_bytes()


def main() -> None:
    """Take part until killed."""
    address, authority, home, data, name = sys.argv[1:]
    before: list[bytes] = []
    told = cycle(LIES[name])

    def lying(kind: str, terms: str, payload: bytes) -> bytes:
        honest = answer(lambda: real_node(terms, home, data), kind, payload)
        registers = kind == "query" and "registration" not in LIES[name]
        return honest if registers else lie(next(told), kind, honest, before)

    folder = Path(home)
    WarmNode(address, Path(authority).read_bytes(), folder / "key", folder / "connected", lying).serve(
        threading.Event()
    )


if __name__ == "__main__":
    main()
