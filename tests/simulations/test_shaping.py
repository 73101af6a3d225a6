"""The proxy of the study `shaped`: it changes no byte, and nothing is faster than its link allows."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from simulations.shaped.proxy import Link, shaped

pytestmark = pytest.mark.slow  # waits for links that are slow on purpose

FAST = 1000.0  # Mbit/s
Talk = Callable[[socket.socket], None]


def echo(there: socket.socket) -> None:
    while data := there.recv(65536):
        there.sendall(data)


@contextmanager
def server(talk: Talk) -> Iterator[int]:
    """Serve each connection with ``talk``; give the port."""
    listening = socket.create_server(("127.0.0.1", 0))

    def one(there: socket.socket) -> None:
        with there:
            talk(there)

    def serve() -> None:
        while True:
            try:
                there, _ = listening.accept()
            except OSError:  # closed
                return
            threading.Thread(target=one, args=(there,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def sent_and_echoed(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as here:
        sending = threading.Thread(target=lambda: (here.sendall(data), here.shutdown(socket.SHUT_WR)))
        sending.start()
        got = b"".join(iter(lambda: here.recv(65536), b""))
        sending.join()
    return got


@pytest.mark.parametrize(
    ("up", "down", "delay", "size"), [(8, FAST, 0.0, 400_000), (FAST, 8, 0.0, 400_000), (FAST, FAST, 0.1, 1)]
)
def test_each_direction_has_its_own_speed_and_delay(up: float, down: float, delay: float, size: int) -> None:
    data = np.random.default_rng(0).bytes(size)
    links = Link(up, delay), Link(down, delay)
    with server(echo) as port, shaped("127.0.0.1", port, *links) as slow:
        began = time.perf_counter()
        assert sent_and_echoed(slow, data) == data
        seconds = time.perf_counter() - began
    assert [link.bytes for link in links] == [size, size]
    assert seconds >= 8e-6 * size / min(up, down) + 4 * delay - 0.001  # there and back, and twice to connect


def test_connections_share_the_link() -> None:
    data = [np.random.default_rng(seed).bytes(100_000) for seed in range(4)]
    got: dict[int, bytes] = {}
    with server(echo) as port, shaped("127.0.0.1", port, Link(8, 0.0), Link(FAST, 0.0)) as slow:
        threads = [
            threading.Thread(target=lambda i=i: got.update({i: sent_and_echoed(slow, data[i])})) for i in range(4)
        ]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.perf_counter() - began >= 0.4 - 0.001
    assert [got[i] for i in range(4)] == data


def test_a_sender_is_read_no_faster_than_the_link_is() -> None:
    """So what is on its way fits into little memory, however much is sent."""
    link = Link(0.1, 0.0)
    with server(echo) as port, shaped("127.0.0.1", port, link, Link(FAST, 0.0)) as slow:
        with socket.create_connection(("127.0.0.1", slow), timeout=20) as here:
            here.setblocking(False)
            began = time.perf_counter()
            here.send(bytes(1_000_000))  # as much as the kernel takes
            time.sleep(0.3)
            assert link.bytes <= 1e5 / 8 * (time.perf_counter() - began + 0.05) + 4096


def test_a_server_that_ends_or_is_not_there_ends_the_connection() -> None:
    def hang_up(there: socket.socket) -> None:
        there.sendall(b"enough")

    with server(hang_up) as port, shaped("127.0.0.1", port, Link(FAST, 0.0), Link(FAST, 0.0)) as slow:
        assert sent_and_echoed(slow, b"") == b"enough"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nobody = probe.getsockname()[1]
    with shaped("127.0.0.1", nobody, Link(FAST, 0.0), Link(FAST, 0.0)) as slow:
        with socket.create_connection(("127.0.0.1", slow), timeout=20) as here:
            assert here.recv(1) == b""
