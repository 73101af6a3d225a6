"""Files that are written whole or not at all, locks on them, and what is said where neither can be had."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fedsplit.common.errors import ConfigError


def locked(file: IO[str]) -> bool:
    """Lock a file, if need be after somebody who only reads it; whether nobody else has."""
    for _ in range(20):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
    return False


def shared(file: IO[str]) -> bool:
    """Lock a file to read it; whether nobody has it for writing."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def alone(path: Path, otherwise: str) -> Iterator[None]:
    """Hold a lock file for this process; raises ConfigError with the text ``otherwise`` if another process has it."""
    with path.open("w") as file:
        if not locked(file):
            raise ConfigError(otherwise)
        yield


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file under another name and put it in place in one step, so that a killed process leaves the old."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    yield new
    os.replace(new, path)


def put(path: Path, text: str) -> None:
    """Write a whole file in one step, as UTF-8."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Raise a ConfigError that names ``what`` in place of an OSError: it cannot be written, and why."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{what} cannot be written: {error.strerror}") from None
