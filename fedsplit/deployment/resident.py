"""A node's resident process: Flower starts a process for each message, and this one answers for it.

It has torch, the data and the model loaded already. The two talk over a Unix socket in a folder of the owner's alone.
"""

import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsplit import errors
from fedsplit.errors import FedsplitError, RunError

Answer = Callable[[str, str, bytes], bytes]
_LARGEST = 2**32  # bytes of one part
_PAUSE = 0.5  # seconds between two looks at whether there is still something to do


def ask(path: str, kind: str, settings_json: str, payload: bytes) -> bytes:
    """Have the resident process at a socket answer a payload.

    Raises
    ------
    FedsplitError
        What it raised, or that it is not there.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            _send(connection, kind.encode(), settings_json.encode(), payload)
            error, content = _receive(connection), _receive(connection)
    except OSError:
        raise RunError("the node's resident process is gone: start the node again") from None
    if error:
        raise getattr(errors, error.decode(), FedsplitError)(content.decode())
    return content


class Resident:
    """Answers at a socket, one message after another.

    Parameters
    ----------
    path : Path
        Of the socket.
    answer : callable
        Takes a message's kind, the run's settings as JSON, and its payload; returns the answer's.
    """

    def __init__(self, path: Path, answer: Answer) -> None:
        self.path = path
        self._answer = answer
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._socket.settimeout(_PAUSE)

    def serve_while(self, needed: Callable[[], bool]) -> None:
        """Answer until nobody needs it any more."""
        while needed():
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(None)
                try:
                    kind, settings_json, payload = (_receive(connection) for _ in range(3))
                    _send(connection, *self._result(kind.decode(), settings_json.decode(), payload))
                except OSError:
                    continue  # who asked is gone
        self._socket.close()

    def _result(self, kind: str, settings_json: str, payload: bytes) -> tuple[bytes, bytes]:
        try:
            return b"", self._answer(kind, settings_json, payload)
        except FedsplitError as error:
            return type(error).__name__.encode(), str(error).encode()


@contextmanager
def resident(answer: Answer) -> Iterator[Resident]:
    """Open a resident process's socket in a new folder that only this user can enter."""
    with tempfile.TemporaryDirectory(prefix="fedsplit-") as folder:  # a home's own path may be too long for a socket
        yield Resident(Path(folder) / "socket", answer)


def _send(connection: socket.socket, *parts: bytes) -> None:
    for part in parts:
        connection.sendall(struct.pack("<Q", len(part)) + part)


def _receive(connection: socket.socket) -> bytes:
    (size,) = struct.unpack("<Q", _exactly(connection, 8))
    if size > _LARGEST:
        raise OSError("a part is too large")
    return _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytes:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while len(view):
        if not (got := connection.recv_into(view)):
            raise OSError("the other side is gone")
        view = view[got:]
    return bytes(buffer)
