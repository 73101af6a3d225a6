"""A deployment that cannot begin says why in one line: addresses, certificates, keys, data, names, who has what."""

import os
import socket
import ssl
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from conftest import small_settings
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from fedsplit import certs, deployment
from fedsplit.certs import CA, CERTIFICATE, KEY, fingerprint, make_certificates, make_key_pair
from fedsplit.deployment import (
    ServerFolder,
    check_port_free,
    check_superlink,
    connect_flower,
    flower_config,
    read_authority,
    register_node,
    server_of,
    submit,
    superlink_command,
    wait_for_superlink,
)
from fedsplit.errors import ConfigError
from fedsplit.home import Home

Handle = Callable[[socket.socket], None]


# ------------------------------------------------------------------------------------- servers of several kinds


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


class Before(datetime):
    """Ten days ago."""

    @classmethod
    def now(cls, tz=None) -> datetime:
        return datetime.now(tz) - timedelta(days=10)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with certificates: good ones, another authority's, expired ones, another host's."""
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder / "good", ["localhost", "127.0.0.1"])
    make_certificates(folder / "other", ["localhost", "127.0.0.1"])
    make_certificates(folder / "elsewhere", ["server.example.org", "10.0.0.1"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certs, "datetime", Before)
        make_certificates(folder / "expired", ["localhost", "127.0.0.1"], days=1)
    return folder


@pytest.fixture(scope="module")
def tls(made: Path) -> Iterator[dict[str, str]]:
    """Addresses of servers, each with another certificate, and of one that speaks no TLS."""
    good, expired, elsewhere = (speaking_tls(made / name) for name in ("good", "expired", "elsewhere"))
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
    server: str, authority: str | None, made: Path, tls: dict[str, str]
) -> None:
    known = read_authority(made / authority / CA) if authority else None
    with pytest.raises(ConfigError) as refused:
        check_superlink(tls[server], known)
    assert str(refused.value).startswith(tls[server]) and REFUSED[server, authority] in str(refused.value)


def test_the_right_server_is_found(made: Path, tls: dict[str, str]) -> None:
    assert check_superlink(tls["good"], read_authority(made / "good" / CA))
    assert check_superlink(tls["good"].replace("127.0.0.1", "localhost"), read_authority(made / "good" / CA))
    assert check_superlink(tls["plain"], None)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_node_waits_for_a_server_that_is_not_there_yet(
    made: Path, tls: dict[str, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = free_address()
    authority = read_authority(made / "good" / CA)
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
        patch.setattr(deployment, "check_superlink", lambda *_: next(answers))
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


def test_a_private_key_is_no_authority(made: Path) -> None:
    with pytest.raises(ConfigError, match="is not a certificate in PEM"):
        read_authority(made / "good" / KEY)


def test_an_empty_authority_is_refused(tmp_path: Path) -> None:
    (tmp_path / CA).touch()
    with pytest.raises(ConfigError):
        read_authority(tmp_path / CA)


# ------------------------------------------------------------------------------------------------ the server


@pytest.fixture
def server(tmp_path: Path) -> ServerFolder:
    make_certificates(tmp_path / "server", ["127.0.0.1"])
    return ServerFolder(tmp_path / "server")


def test_a_superlink_has_tls_and_asks_for_keys(server: ServerFolder) -> None:
    port = int(free_address().rpartition(":")[2])
    command = superlink_command(server, "127.0.0.1", port, insecure=False)
    assert "--enable-supernode-auth" in command and "--insecure" not in command
    for option, name in (("--ssl-ca-certfile", CA), ("--ssl-certfile", CERTIFICATE), ("--ssl-keyfile", KEY)):
        assert command[command.index(option) + 1] == str(server.folder / name)
    assert command[command.index("--port") + 1] == str(port)
    trial = superlink_command(ServerFolder(server.folder / "none"), "127.0.0.1", port, insecure=True)
    assert "--insecure" in trial and "--enable-supernode-auth" not in trial


def test_a_port_in_use_is_told(server: ServerFolder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use; choose"):
            superlink_command(server, "127.0.0.1", port, insecure=False)
    check_port_free("127.0.0.1", port)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 65536), ("127.0.0.1", -1), ("nowhere.invalid", 9092)])
def test_where_nobody_can_listen_is_told(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {host}:{port}: "):
        check_port_free(host, port)


@pytest.mark.parametrize("name", [CA, CERTIFICATE, KEY])
def test_a_server_without_a_certificate_does_not_start(name: str, server: ServerFolder) -> None:
    (server.folder / name).unlink()
    with pytest.raises(ConfigError, match=f"{server.folder / name} is missing: make it with fedsplit certs"):
        superlink_command(server, "127.0.0.1", 0, insecure=False)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_server_key_that_others_can_read_is_refused(mode: int, server: ServerFolder) -> None:
    (server.folder / KEY).chmod(mode)
    with pytest.raises(ConfigError, match=f"{server.folder / KEY} can be read by others: chmod 600 it"):
        superlink_command(server, "127.0.0.1", 0, insecure=False)


@pytest.fixture
def flower_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    return tmp_path / "flwr" / "config.toml"


WRITTEN = '# mine, dear to me\n[superlink]\ndefault = "local"  # and this\n\n[superlink.local]\naddress = ":local:"'


def test_flowers_own_settings_are_left_alone(flower_home: Path, server: ServerFolder) -> None:
    flower_home.parent.mkdir()
    flower_home.write_text(WRITTEN)  # without a line's end
    assert connect_flower("fedsplit", "127.0.0.1:9092", server.folder / CA) == flower_home == flower_config()
    text = flower_home.read_text()
    assert text.startswith(WRITTEN + "\n")
    found = tomllib.loads(text)["superlink"]
    assert found["fedsplit"] == {"address": "127.0.0.1:9092", "root-certificates": str(server.folder / CA)}
    assert found["default"] == "local" and found["local"] == {"address": ":local:"}
    connect_flower("fedsplit", "127.0.0.1:9092", server.folder / CA)
    assert flower_home.read_text() == text  # once
    connect_flower("a trial", "127.0.0.1:1", None)
    assert tomllib.loads(flower_home.read_text())["superlink"]["a trial"]["insecure"] is True
    assert server_of("fedsplit").folder == server.folder


def test_anothers_name_is_not_taken(flower_home: Path, server: ServerFolder) -> None:
    connect_flower("fedsplit", "127.0.0.1:9092", server.folder / CA)
    text = flower_home.read_text()
    for address, authority in (("127.0.0.1:9093", server.folder / CA), ("127.0.0.1:9092", None)):
        with pytest.raises(ConfigError, match=r"has another \[superlink\.fedsplit\]: remove it or choose another"):
            connect_flower("fedsplit", address, authority)
    assert flower_home.read_text() == text


@pytest.mark.parametrize("damage", [b"[superlink", b"\xff"])
def test_flowers_settings_that_are_damaged_are_told(damage: bytes, flower_home: Path) -> None:
    flower_home.parent.mkdir()
    flower_home.write_bytes(damage)
    with pytest.raises(ConfigError, match=f"{flower_home} cannot be read: "):
        connect_flower("fedsplit", "127.0.0.1:9092", None)
    assert flower_home.read_bytes() == damage


def test_an_unknown_superlink_is_told(flower_home: Path, tmp_path: Path) -> None:
    said = f"no SuperLink 'fedsplt' in {flower_home}: fedsplit server start --name fedsplt adds it"
    for asks in (
        lambda: server_of("fedsplt"),
        lambda: submit("{}", "fedsplt", tmp_path / "run", resume=False),
    ):
        with pytest.raises(ConfigError) as refused:
            asks()
        assert str(refused.value) == said
    assert not flower_home.exists()


def test_a_device_belongs_to_one_key(server: ServerFolder) -> None:
    assert server.owners() is None  # of whom nobody was registered, which is not the same as of nobody
    server.add("SHA256:a", [2, 0])
    server.add("SHA256:b", [1])
    expected = {"SHA256:a": [0, 2], "SHA256:b": [1]}
    assert server.owners() == expected
    with pytest.raises(ConfigError, match=r"the key SHA256:a is registered already, for devices \[0, 2\]"):
        server.add("SHA256:a", [7])
    with pytest.raises(ConfigError, match="device 2 belongs to the key SHA256:a: each device has one node"):
        server.add("SHA256:c", [9, 2])
    assert server.owners() == expected and not list(server.folder.glob(".*"))


@pytest.mark.parametrize("damage", ["[a", "a = 3", "[a]\ndevices = 3", "[a]\ndevices = ['x']", "[a]\n", "a = 'x'"])
def test_a_damaged_list_of_nodes_is_never_taken_for_none(damage: str, server: ServerFolder) -> None:
    (server.folder / "nodes.toml").write_text(damage)
    for asks in (server.owners, lambda: server.add("SHA256:a", [0])):
        with pytest.raises(ConfigError, match=r"nodes\.toml is damaged: it must hold devices = \[ids\] for each key"):
            asks()
    assert (server.folder / "nodes.toml").read_text() == damage


@pytest.fixture
def told(flower_home: Path, server: ServerFolder, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that Flower was given."""
    connect_flower("fedsplit", "127.0.0.1:9092", server.folder / CA)
    commands: list[list[str]] = []
    monkeypatch.setattr(deployment, "run_flower", lambda command: commands.append(list(command)) or "")
    return commands


def test_a_node_is_registered_with_the_devices_that_its_key_names(
    told: list[list[str]], server: ServerFolder, tmp_path: Path
) -> None:
    first, second = Home.create(tmp_path / "a", [3, 1]).key_path, Home.create(tmp_path / "b", [5]).key_path
    public = [path.with_suffix(".pub") for path in (first, second)]
    assert register_node("fedsplit", public[0], None) == [1, 3]
    assert register_node("fedsplit", public[1], [4, 6]) == [4, 6]  # the operator's word wins
    assert told == [["supernode", "register", str(path), "fedsplit"] for path in public]
    assert server.owners() == {
        fingerprint(path.read_bytes()): d for path, d in zip(public, ([1, 3], [4, 6]), strict=True)
    }
    with pytest.raises(ConfigError, match=r"the key SHA256:\S+ is registered already, for devices \[1, 3\]"):
        register_node("fedsplit", public[0], None)
    assert len(told) == 2


@pytest.mark.parametrize("comment", ["", "me@home", "fedsplit-devices=", "fedsplit-devices=x", "fedsplit-devices=1,"])
def test_a_key_that_names_no_devices_is_refused(comment: str, told: list[list[str]], tmp_path: Path) -> None:
    make_key_pair(tmp_path / "key", comment)
    with pytest.raises(ConfigError, match=r"key\.pub names no devices: give them with --device"):
        register_node("fedsplit", tmp_path / "key.pub", None)
    assert told == [] and register_node("fedsplit", tmp_path / "key.pub", [0]) == [0]


def test_what_is_no_nodes_key_is_not_registered(told: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"public key .*key\.pub cannot be read: No such file"):
        register_node("fedsplit", tmp_path / "key.pub", [0])
    private = Home.create(tmp_path / "a", [0]).key_path
    with pytest.raises(ConfigError, match="not a public key"):
        register_node("fedsplit", private, [0])
    form = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (tmp_path / "ed.pub").write_bytes(ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(*form))
    with pytest.raises(ConfigError, match="must be on an elliptic curve"):
        register_node("fedsplit", tmp_path / "ed.pub", [0])
    assert told == []


def test_a_key_for_anothers_device_is_not_let_in(told: list[list[str]], server: ServerFolder, tmp_path: Path) -> None:
    """Else it may connect, and registering it again with its own device fails, since Flower has it already."""
    server.add("SHA256:a", [3])
    with pytest.raises(ConfigError, match="device 3 belongs to the key SHA256:a"):
        register_node("fedsplit", Home.create(tmp_path / "b", [3]).key_path.with_suffix(".pub"), None)
    assert told == []


def test_what_flower_says_is_told_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^flwr nonsense failed: .*nonsense") as refused:
        deployment.run_flower(["nonsense"])
    assert "\n" not in str(refused.value) and "│" not in str(refused.value)


# ------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs the command line, expects exit code 2, and returns the one line on stderr."""

    def run(*arguments: object) -> str:
        command = [sys.executable, "-m", "fedsplit.cli", *map(str, arguments)]
        # a narrow terminal: no line is wrapped
        environment = {**os.environ, "FLWR_HOME": str(tmp_path / "flwr"), "COLUMNS": "40"}
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 2 and done.stdout == "", (done.stdout, done.stderr)
        lines = done.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("fedsplit: "), done.stderr
        assert "Traceback" not in done.stderr
        return lines[0]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("server", "authority"), [case for case in REFUSED if "elsewhere" not in case])  # as above
def test_node_start_refuses_a_server(
    server: str, authority: str | None, made: Path, tls: dict[str, str], tmp_path: Path, refused: Callable[..., str]
) -> None:
    Home.create(tmp_path / "home", [0])
    trust = ["--ca", made / authority / CA] if authority else ["--insecure"]
    said = refused("node", "start", "--superlink", tls[server], "--home", "home", *trust)
    assert f"{tls[server]}" in said and REFUSED[server, authority] in said


@pytest.mark.slow
def test_node_start_refuses_what_cannot_be_reached(tmp_path: Path, refused: Callable[..., str]) -> None:
    Home.create(tmp_path / "home", [0])
    start = ("node", "start", "--home", "home", "--insecure", "--superlink")
    assert "--superlink must be HOST:PORT, got 'server.example.org'" in refused(*start, "server.example.org")
    assert "there is no host of this name" in refused(*start, "no-such-host.invalid:443")


@pytest.mark.slow
def test_node_start_refuses_its_own_files(made: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """Before anything is sent or waited for: nobody listens there."""
    home = Home.create(tmp_path / "home", [0, 1])
    start = ("node", "start", "--home", "home", "--superlink", free_address())
    assert "either --ca, the authority of the server's certificate, or --insecure" in refused(*start)
    good = (*start, "--ca", made / "good" / CA)
    assert "data path" in (said := refused(*good, "--data", "nowhere")) and "does not exist" in said
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "0.npz", x=np.zeros((1, 2)), y=np.zeros(1))
    assert "holds 1 .npz files, the node has 2 devices" in refused(*good, "--data", "data")
    home.key_path.chmod(0o640)
    assert f"{home.key_path} can be read by others: chmod 600 it" in refused(*good)


@pytest.mark.slow
def test_server_start_refuses(tmp_path: Path, refused: Callable[..., str]) -> None:
    make_certificates(tmp_path / "server", ["127.0.0.1"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        start = ("server", "start", "server", "--port", port)
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in refused(*start)
    (tmp_path / "server" / KEY).chmod(0o644)
    assert "server.key can be read by others: chmod 600 it" in refused(*start)
    assert not (tmp_path / "flwr").exists() and not (tmp_path / "server" / "superlink.db").exists()


@pytest.mark.slow
def test_the_operators_other_commands_refuse(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "small.toml").write_text(small_settings().to_toml())
    (tmp_path / "own.py").write_text((Path(__file__).parent / "own.py").read_text())
    said = refused("run", "small.toml", "--superlink", "fedsplt", "--out", "run")
    assert "no SuperLink 'fedsplt' in " in said and not (tmp_path / "run").exists()
    make_key_pair(tmp_path / "key", "me@home")
    assert "key.pub names no devices: give them with --device" in refused("server", "register", "key.pub")
    assert "--host must be a host's name or address" in refused("certs", "server", "--host", "a:1")
    assert not (tmp_path / "server").exists()
