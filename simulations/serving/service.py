"""A service in a process of its own: ``python -m simulations.serving.service RUN FOLDER KIND PORT``."""

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedsplit.common.arrays import FloatArray
from fedsplit.common.certs import CERTIFICATE, KEY
from fedsplit.common.errors import WireError
from fedsplit.service.app import service
from fedsplit.service.served import Served
from fedsplit.service.tokens import Tokens
from simulations.encryption.halves import Whole, records_of
from simulations.encryption.schemes import opened

OURS, WHOLE = "fedsplit", "AES-256-GCM, whole network"
KINDS = (OURS, WHOLE)


@dataclass(frozen=True)
class Sealed(Served):
    """The whole network behind AES-256-GCM."""

    key: bytes = b""
    whole: Any = None
    size: int = 0

    def answers(self, payloads: Sequence[bytes]) -> Sequence[FloatArray | WireError]:
        """Return the network's outputs for each of some messages."""
        cipher = AESGCM(self.key)
        plain = [opened(cipher, payload) for payload in payloads]
        return np.split(self.whole(b"".join(plain)), np.cumsum([len(p) // self.size for p in plain])[:-1])


def serve(run: Path, folder: Path, kind: str, port: int) -> None:
    """Serve in this process until it is ended."""
    torch.set_num_threads(1)
    model = served = Served.of_run(run)
    if kind == WHOLE:
        raw, key = records_of(run, served), (folder / "key").read_bytes()
        whole, size = Whole(served, raw), raw[0].nbytes
        model = Sealed(served.bundle, served.trunk, served.name, key=key, whole=whole, size=size)
    app = service([model], Tokens(folder / "tokens"))
    gc.collect()
    gc.freeze()  # as fedsplit serve does
    certificate, secret = str(folder / "certs" / CERTIFICATE), str(folder / "certs" / KEY)
    uvicorn.run(
        app,
        port=port,
        log_level="warning",
        access_log=False,
        ws="none",
        ssl_certfile=certificate,
        ssl_keyfile=secret,
    )


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
