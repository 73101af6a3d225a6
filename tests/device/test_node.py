"""A node that cannot begin says why in one line: addresses, certificates, keys, data."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fedsplit.common.certs import CA, CERTIFICATE, KEY, read_authority
from fedsplit.common.errors import ConfigError
from fedsplit.device.home import Home
from fedsplit.device.link import supernode as module
from fedsplit.device.link.supernode import SuperNode, check_superlink, wait_for_superlink
from simulations.shared.network import free_port

Handle = Callable[[socket.socket], None]


@contextmanager
def listening(handle: Handle) -> Iterator[str]:
    """Handle connections one after another in a thread; give the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(20)
                    try:
                        handle(connection)
                    except OSError:
                        pass  # who connected has seen enough

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def speaking_tls(folder: Path) -> Handle:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / CERTIFICATE, folder / KEY)

    def handle(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as wrapped:
            wrapped.recv(1)

    return handle


def speaking_plainly(connection: socket.socket) -> None:
    connection.recv(4096)
    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n")


@pytest.fixture(scope="module")
def tls(certificates: Path) -> Iterator[dict[str, str]]:
    """Addresses of servers, each with another certificate, and of one that speaks no TLS."""
    good, expired, elsewhere = (speaking_tls(certificates / name) for name in ("good", "expired", "elsewhere"))
    with listening(good) as a, listening(expired) as b, listening(elsewhere) as c, listening(speaking_plainly) as d:
        yield {"good": a, "expired": b, "elsewhere": c, "plain": d}


REFUSED = {  # by the server and the authority that the node has: what it says
    ("good", "other"): "its certificate is refused: ",
    ("expired", "expired"): "its certificate is refused: certificate has expired",
    ("elsewhere", "elsewhere"): "its certificate is refused: IP address mismatch",
    ("good", None): "speaks TLS: give its authority with --ca, instead of --insecure",
    ("plain", "good"): "does not speak TLS: nothing is sent there",
}


@pytest.mark.parametrize(("server", "authority"), REFUSED)
def test_a_server_that_is_not_the_right_one_is_refused(
    server: str, authority: str | None, certificates: Path, tls: dict[str, str]
) -> None:
    known = read_authority(certificates / authority / CA) if authority else None
    with pytest.raises(ConfigError) as refused:
        check_superlink(tls[server], known)
    assert str(refused.value).startswith(tls[server]) and REFUSED[server, authority] in str(refused.value)


def test_the_right_server_is_found(certificates: Path, tls: dict[str, str]) -> None:
    assert check_superlink(tls["good"], read_authority(certificates / "good" / CA))
    assert check_superlink(tls["good"].replace("127.0.0.1", "localhost"), read_authority(certificates / "good" / CA))
    assert check_superlink(tls["plain"], None)


def test_a_node_waits_for_a_server_that_is_not_there_yet(
    certificates: Path, tls: dict[str, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"127.0.0.1:{free_port()}"
    authority = read_authority(certificates / "good" / CA)
    assert not check_superlink(address, authority) and not check_superlink(address, None)
    looks: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            looks.append(timeout or 0.0)
            return len(looks) == 3

    wait_for_superlink(address, authority, Stop())
    assert len(looks) == 3 and caplog.text.count(f"{address} does not answer yet: waiting") == 1

    answers = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(module, "check_superlink", lambda *_: next(answers))
        looks.clear()
        wait_for_superlink(address, authority, Stop())
    assert len(looks) == 2
    with pytest.raises(ConfigError, match="does not speak TLS"):
        wait_for_superlink(tls["plain"], authority, Stop())


@pytest.mark.parametrize("address", ["server", "server:", ":9092", "server:0", "server:65536", "server:x", "", "a:-1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="--superlink must be HOST:PORT, got "):
        check_superlink(address, None)


def test_an_unknown_host_is_told() -> None:
    with pytest.raises(ConfigError, match=r"no-such-host\.invalid:9092: there is no host of this name"):
        check_superlink("no-such-host.invalid:9092", None)


@pytest.mark.parametrize("address", ["server..example.org:443", ".:443", "x" * 64 + ".org:443", "server:²"])
def test_an_impossible_host_is_told(address: str) -> None:
    with pytest.raises(ConfigError):
        check_superlink(address, None)


@pytest.mark.parametrize("content", [b"garbage", b"\n", b"\xff\xfe", None, "folder"])
def test_what_is_no_authority_is_refused(content: bytes | str | None, tmp_path: Path) -> None:
    path = tmp_path / CA
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    with pytest.raises(ConfigError, match=f"authority {path} (cannot be read: |is not a certificate)") as refused:
        read_authority(path)
    assert "\n" not in str(refused.value)


def test_a_private_key_is_no_authority(certificates: Path) -> None:
    with pytest.raises(ConfigError, match="is not a certificate in PEM"):
        read_authority(certificates / "good" / KEY)


def test_an_empty_authority_is_refused(tmp_path: Path) -> None:
    (tmp_path / CA).touch()
    with pytest.raises(ConfigError):
        read_authority(tmp_path / CA)


def look_until(node: SuperNode, done: Callable[[], bool]) -> None:
    while not done():
        node.look_after()
        time.sleep(0.01)


@pytest.mark.parametrize("code", [0, 1])
def test_a_supernode_that_has_ended_is_started_again(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that was restarted knows nobody's number, and Flower's SuperNode ends, as if all were well."""
    monkeypatch.setattr(module, "_CONNECTED", 0.2)
    monkeypatch.setattr(module, "_AGAIN", 0.1)
    monkeypatch.setattr(module, "TAKEOVER", 0.3)
    starts, go = tmp_path / "starts", tmp_path / "go"
    script = f"echo >> {starts}; while [ ! -e {go} ]; do sleep 0.01; done; rm {go}; exit {code}"
    node = SuperNode(["sh", "-c", script], tmp_path, seen := tmp_path / "seen")
    try:
        for times in (1, 2):
            look_until(node, lambda: starts.exists() and starts.read_text().count("\n") == times)  # noqa: B023
            look_until(node, seen.exists)
            go.touch()
            look_until(node, lambda: not go.exists() and node._process.poll() is not None)
        look_until(node, lambda: starts.read_text().count("\n") == 3)
    finally:
        node.stop()
    assert caplog.text.count("the SuperNode has ended") == 2


def test_a_supernode_that_is_refused_tries_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it has been connected once: an earlier process of it may be there still."""
    monkeypatch.setattr(module, "_AGAIN", 0.05)
    monkeypatch.setattr(module, "TAKEOVER", 0.5)
    node = SuperNode(["false"], tmp_path, seen := tmp_path / "seen")
    with pytest.raises(ConfigError, match="refuses this node, see above: is its key registered"):
        look_until(node, lambda: False)
    seen.touch()
    began, node = time.monotonic(), SuperNode(["false"], tmp_path, seen)
    with pytest.raises(ConfigError, match="its key is not registered, or used twice"):
        look_until(node, lambda: False)
    assert time.monotonic() - began > 0.5


# ------------------------------------------------------------------------------------------- the command line


@pytest.mark.slow
@pytest.mark.parametrize(("server", "authority"), [case for case in REFUSED if "elsewhere" not in case])  # as above
def test_node_start_refuses_a_server(
    server: str,
    authority: str | None,
    certificates: Path,
    tls: dict[str, str],
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    Home.create(tmp_path / "home", [0])
    trust = ["--ca", certificates / authority / CA] if authority else ["--insecure"]
    said = refused("node", "start", "--superlink", tls[server], "--home", "home", *trust)
    assert f"{tls[server]}" in said and REFUSED[server, authority] in said


@pytest.mark.slow
def test_node_start_refuses_what_cannot_be_reached(tmp_path: Path, refused: Callable[..., str]) -> None:
    Home.create(tmp_path / "home", [0])
    start = ("node", "start", "--home", "home", "--insecure", "--superlink")
    assert "--superlink must be HOST:PORT, got 'server.example.org'" in refused(*start, "server.example.org")
    assert "there is no host of this name" in refused(*start, "no-such-host.invalid:443")


@pytest.mark.slow
def test_node_start_refuses_its_own_files(certificates: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """Before anything is sent or waited for: nobody listens there."""
    home = Home.create(tmp_path / "home", [0, 1])
    start = ("node", "start", "--home", "home", "--superlink", f"127.0.0.1:{free_port()}")
    assert "either --ca, the authority of the server's certificate, or --insecure" in refused(*start)
    good = (*start, "--ca", certificates / "good" / CA)
    assert "data path" in (said := refused(*good, "--data", "nowhere")) and "does not exist" in said
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "0.npz", x=np.zeros((1, 2)), y=np.zeros(1))
    assert "holds 1 .npz files, the node has 2 device(s)" in refused(*good, "--data", "data")
    home.key_path.chmod(0o640)
    assert f"{home.key_path} can be read by others: chmod 600 it" in refused(*good)
