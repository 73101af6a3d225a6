"""Files that are written whole or not at all, and locks on them."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def locked(file: IO[str]) -> bool:
    """Lock a file, if need be after somebody who only reads it; whether nobody else has."""
    for _ in range(20):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
    return False


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file under another name and put it in place in one step, so that a killed process leaves the old."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    yield new
    os.replace(new, path)
