"""A node's resident process: what is asked over its socket, how errors cross, and who can reach it."""

import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedsplit.common import errors
from fedsplit.common.errors import ConfigError, FedsplitError, RunError, StateError, WireError
from fedsplit.device.link import resident as module
from fedsplit.device.link.resident import Answer, Client, ask, resident

Lies = Callable[[socket.socket], None]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.02)


@contextmanager
def served(answer: Answer, client: Client = print, program: str = "flwr-clientapp") -> Iterator[Path]:
    """Answer in a thread, which must end well."""
    done, failed = threading.Event(), []

    with resident(answer, client, program) as opened:

        def serve() -> None:
            try:
                opened.serve_while(lambda: not done.is_set())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield opened.path
        finally:
            done.set()
            thread.join()
    assert failed == []


def echo(kind: str, settings: str, payload: bytes) -> bytes:
    return kind.encode() + settings.encode() + payload[::-1]


def test_large_payloads_come_back_whole() -> None:
    payload = os.urandom(9_000_001)
    with served(echo) as path:
        assert ask(str(path), "train", '{"ü": 1}', payload) == b"train" + '{"ü": 1}'.encode() + payload[::-1]
        assert ask(str(path), "", "", b"") == b""  # an empty answer is one
        for number in range(20):
            assert ask(str(path), "query", "{}", b"%d" % number) == b"query{}" + (b"%d" % number)[::-1]


@pytest.mark.parametrize(
    "name", sorted(name for name in vars(errors) if isinstance(getattr(errors, name), type) and name[0].isupper())
)
def test_each_error_crosses_with_its_text(name: str) -> None:
    def refuses(kind: str, settings: str, payload: bytes) -> bytes:
        raise getattr(errors, name)("limits: ünlike 3 > 2")

    with served(refuses) as path:
        with pytest.raises(FedsplitError, match=r"^limits: ünlike 3 > 2$") as raised:
            ask(str(path), "train", "{}", b"")
        assert type(raised.value).__name__ == name


def test_an_error_does_not_stop_it() -> None:
    answers: Iterator[FedsplitError | bytes] = iter([WireError("a"), b"one", StateError("b"), ConfigError("c"), b"two"])

    def answer(kind: str, settings: str, payload: bytes) -> bytes:
        found = next(answers)
        if isinstance(found, FedsplitError):
            raise found
        return found

    heard: list[object] = []
    with served(answer) as path:
        for _ in range(5):
            try:
                heard.append(ask(str(path), "train", "{}", b""))
            except FedsplitError as error:
                heard.append(type(error))
    assert heard == [WireError, b"one", StateError, ConfigError, b"two"]


def test_nobody_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="resident process is gone: start the node again"):
        ask(str(tmp_path / "socket"), "train", "{}", b"")
    with served(echo) as path:
        pass
    with pytest.raises(RunError, match="resident process is gone"):
        ask(str(path), "train", "{}", b"")


def test_one_that_ends_before_it_has_answered_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        half = struct.pack("<Q", 0) + struct.pack("<Q", 10) + b"half"

        def dies() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(8)
                connection.sendall(half)

        thread = threading.Thread(target=dies)
        thread.start()
        with pytest.raises(RunError, match="resident process is gone"):
            ask(str(tmp_path / "socket"), "train", "{}", b"payload")
        thread.join()


def nothing(connection: socket.socket) -> None:
    """Connect and go."""


def half_a_size(connection: socket.socket) -> None:
    connection.sendall(b"\x01\x00")


def half_a_payload(connection: socket.socket) -> None:
    connection.sendall(struct.pack("<Q", 1000) + b"only the beginning")


def too_large(connection: socket.socket) -> None:
    connection.sendall(struct.pack("<Q", 2**62) + b"x")


def deaf(connection: socket.socket) -> None:
    """Ask for much and go before it comes."""
    for part in (b"train", b"{}", bytes(5_000_000)):
        connection.sendall(struct.pack("<Q", len(part)) + part)


@pytest.mark.parametrize("dies", [nothing, half_a_size, half_a_payload, too_large, deaf])
def test_who_dies_half_way_does_not_stop_it(dies: Lies) -> None:
    with served(echo) as path:
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(path))
                dies(connection)
        assert ask(str(path), "train", "{}", b"abc") == b"train{}cba"


def test_only_its_user_can_reach_it() -> None:
    with resident(echo, print, "flwr-clientapp") as opened:
        folder = opened.path.parent
        assert folder.stat().st_mode & 0o777 == 0o700 and folder.stat().st_uid == os.getuid()
        assert sorted(path.name for path in folder.iterdir()) == ["bin", "socket"]
        assert len(str(opened.path)) < 100  # longer ones cannot be bound
    assert not folder.exists()


def started(programs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Start what Flower starts for a message."""
    command = [str(programs / "flwr-clientapp"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_what_flower_starts_is_a_copy_of_this_process(tmp_path: Path) -> None:
    """With the arguments as they were; its end is not this process's, whatever it is."""
    here, done = os.getpid(), tmp_path / "done"

    def client(arguments: list[str]) -> None:
        (tmp_path / "part").write_text(f"{os.getppid()} {arguments[1:]}")
        (tmp_path / "part").rename(done.with_suffix(f".{arguments[0]}"))  # whole as soon as it is there
        if arguments[0] == "raises":
            raise ValueError
        sys.exit(arguments[0] == "exits")

    with served(echo, client) as path:
        for how in ("ends", "exits", "raises"):
            ended = started(path.parent / "bin", how, "--token", "ü b", "")
            assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
            until(done.with_suffix(f".{how}").exists)
            assert done.with_suffix(f".{how}").read_text() == f"{here} ['--token', 'ü b', '']"
            assert ask(str(path), "query", "{}", b"1") == b"query{}1"  # who forked goes on


def until(true: Callable[[], bool]) -> None:
    """Wait for something that another process does."""
    for _ in range(1000):
        if true():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it has not come")


def test_without_this_process_flowers_own_program_is_started(tmp_path: Path) -> None:
    own = tmp_path / "flwr-clientapp"
    own.write_text('#!/bin/sh\necho "own $*"\nexit 3\n')
    own.chmod(0o700)
    with served(echo, print, str(own)) as path:
        copied = tmp_path / "bin"
        shutil.copytree(path.parent / "bin", copied)
    ended = started(copied, "--token", "a b")
    assert (ended.returncode, ended.stdout) == (3, "own --token a b\n")
