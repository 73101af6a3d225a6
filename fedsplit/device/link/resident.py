"""A node's resident process: Flower starts a process for each message, and this one answers for it.

It has torch, the data and the model loaded already. The two talk over a Unix socket in a folder of the owner's alone.
What Flower starts is not even a Python with Flower in it, which takes a second: a small program of Flower's name for it
asks the resident process to fork, and it is the copy that does Flower's work.
"""

import os
import socket
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsplit.common import errors
from fedsplit.common.errors import FedsplitError, RunError

Answer = Callable[[str, str, bytes], bytes]
Client = Callable[[list[str]], None]
_LARGEST = 2**32  # bytes of one part
_PAUSE = 0.5  # seconds between two looks at whether there is still something to do
_SILENCE = 60.0  # seconds in which who has connected must go on
_START = "start"  # the kind of what that asks for
_LAUNCHER = """#!{python} -IS
import os, socket, struct, sys
started = b""
try:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect({path!r})
        for part in (b"{kind}", b"", "\\0".join(sys.argv[1:]).encode()):
            connection.sendall(struct.pack("<Q", len(part)) + part)
        started = connection.recv(1)
except OSError:
    pass
if not started:
    os.execv({client!r}, [{client!r}, *sys.argv[1:]])
"""


def ask(path: str, kind: str, terms_json: str, payload: bytes) -> bytes:
    """Have the resident process at a socket answer a payload.

    Parameters
    ----------
    path : str
        Of the socket.
    kind : str
        Of the message.
    terms_json : str
        The run's terms.
    payload : bytes
        Packed for the wire, as the answer is.

    Raises
    ------
    FedsplitError
        If the process raises one, or is not there.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            _send(connection, kind.encode(), terms_json.encode(), payload)
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
    folder : Path
        Of the socket, and of the program that Flower starts for a message.
    answer : callable
        Takes a message's kind, the run's terms as JSON, and its payload; returns the answer's.
    client : callable
        Does the work of that program, from its arguments.
    program : str
        The path of Flower's own, for when nobody answers.
    """

    def __init__(self, folder: Path, answer: Answer, client: Client, program: str) -> None:
        self.path, self.programs = folder / "socket", folder / "bin"
        self._answer = answer
        self._client = client
        self._children: list[int] = []
        self.programs.mkdir()
        text = _LAUNCHER.format(python=sys.executable, path=str(self.path), kind=_START, client=program)
        (self.programs / Path(program).name).write_text(text, encoding="utf-8")
        (self.programs / Path(program).name).chmod(0o700)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(self.path))
        self._socket.listen()
        self._socket.settimeout(_PAUSE)

    def serve_while(self, needed: Callable[[], bool]) -> None:
        """Answer until nobody needs it any more."""
        while needed():
            self._children = [child for child in self._children if not os.waitpid(child, os.WNOHANG)[0]]
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(_SILENCE)
                try:
                    kind, terms_json, payload = (_receive(connection) for _ in range(3))
                    if kind.decode() == _START:
                        self._fork(connection, payload.decode().split("\0"))
                        connection.sendall(b"1")
                    else:
                        _send(connection, *self._result(kind.decode(), terms_json.decode(), payload))
                except (OSError, UnicodeDecodeError):
                    continue  # who asked is gone, or silent, or somebody else
        self._socket.close()

    def _fork(self, connection: socket.socket, arguments: list[str]) -> None:
        """Have a copy of this process do a client's work, which needs neither torch nor the socket."""
        if child := os.fork():
            self._children.append(child)
            return
        code = 1
        try:
            connection.close()
            self._socket.close()
            self._client(arguments)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException as error:  # which Flower's program tells itself, but for its own mistakes
            print(f"{type(error).__name__} in a client process", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # what this process has open is not the copy's to close

    def _result(self, kind: str, terms_json: str, payload: bytes) -> tuple[bytes, bytes]:
        try:
            return b"", self._answer(kind, terms_json, payload)
        except FedsplitError as error:
            return type(error).__name__.encode(), str(error).encode()


@contextmanager
def resident(answer: Answer, client: Client, program: str) -> Iterator[Resident]:
    """Open a resident process's socket in a new folder that only this user can enter.

    Parameters
    ----------
    answer, client, program : Answer, Client, str
        As of :class:`Resident`.
    """
    with tempfile.TemporaryDirectory(prefix="fedsplit-") as folder:  # a home's own path may be too long for a socket
        yield Resident(Path(folder), answer, client, program)


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
