"""A node that is registered and lies: ``python hostile.py HOST:PORT CA HOME DATA LIE``."""

import sys
import threading
from pathlib import Path

import numpy as np

from fedsplit.assemble import real_node
from fedsplit.client_app import answer
from fedsplit.warm import WarmNode
from fedsplit.wire import Registration, Release, Upload

PARAMETERS = 1040  # of the first layer that the tests train
LIES = ("nan", "shape", "counts", "labels", "device", "replay", "large", "registration")


def lie(what: str, kind: str, payload: bytes, before: list[bytes]) -> bytes:
    """Return another answer than the honest one."""
    if kind == "query":
        if what == "registration":
            return Registration(np.array([0]), np.array([10]), np.array([0])).to_bytes()
        return payload
    if what == "large":
        return bytes(100_000_000)
    if what == "replay":
        before.append(payload)
        return before[0] if len(before) > 1 else Upload.from_bytes(payload, parameters=PARAMETERS).to_bytes()[:-8]
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
    address, authority, home, data, what = sys.argv[1:]
    before: list[bytes] = []

    def lying(kind: str, settings: str, payload: bytes) -> bytes:
        return lie(what, kind, answer(lambda: real_node(settings, home, data), kind, payload), before)

    folder = Path(home)
    WarmNode(address, Path(authority).read_bytes(), folder / "key", folder / "connected", lying).serve(
        threading.Event()
    )


if __name__ == "__main__":
    main()
