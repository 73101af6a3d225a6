"""Files of arrays that tell when they are damaged."""

import os
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.files import replacing


def save_sealed(path: Path, *, durable: bool = True, **arrays: NDArray[Any] | np.generic) -> bytes:
    """Write arrays and the SHA-256 of all that is written behind them, in one step; return the hash."""
    body = BytesIO()
    np.savez(body, **arrays)  # type: ignore[arg-type]
    digest = sha256(body.getvalue()).digest()
    with replacing(path) as new, new.open("wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(body.getvalue() + digest)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    return digest


def load_sealed(path: Path) -> tuple[dict[str, NDArray[Any]], bytes]:
    """Undo :func:`save_sealed`; ValueError if a single bit has changed (zip checks less), OSError if unreadable."""
    content = path.read_bytes()
    if sha256(content[:-32]).digest() != content[-32:]:
        raise ValueError(f"{path} is damaged")
    with np.load(BytesIO(content), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}, content[-32:]
