"""The server's side of a deployment: what its SuperLink is told, Flower's own settings, who is let in."""

import re
import socket
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import small_settings
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from fedsplit.common.certs import (
    CA,
    CERTIFICATE,
    KEY,
    fingerprint,
    make_certificates,
    make_key_pair,
    read_public_key,
)
from fedsplit.common.errors import ConfigError
from fedsplit.device.home import Home
from fedsplit.flower.programs import connect_flower, flower_config, run_flower, tell_keys
from fedsplit.server.link import folder as module
from fedsplit.server.link.folder import ServerFolder, check_port_free, register_node, server_of, superlink_command
from fedsplit.server.link.runs import submit
from simulations.shared.network import free_port


@pytest.fixture
def server(tmp_path: Path) -> ServerFolder:
    make_certificates(tmp_path / "server", ["127.0.0.1"])
    return ServerFolder(tmp_path / "server")


def test_a_superlink_has_tls_and_asks_for_keys(server: ServerFolder) -> None:
    port = free_port()
    command = superlink_command(server, "127.0.0.1", port, insecure=False)
    assert command[command.index("--database") + 1] == ":flwr-in-memory:"  # what devices send is on no disk
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
    assert server_of("fedsplit") == server and server_of("a trial") is None


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


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[EllipticCurvePublicKey]:
    folder = tmp_path_factory.mktemp("keys")
    for number in range(6):
        make_key_pair(folder / str(number), "")
    return [read_public_key((folder / f"{number}.pub").read_bytes()) for number in range(6)]


def let_in(server: ServerFolder, key: EllipticCurvePublicKey, devices: list[int]) -> None:
    with server.letting_in(key, devices):
        pass


def test_a_device_belongs_to_one_key(keys: list[EllipticCurvePublicKey], server: ServerFolder) -> None:
    assert server.owners() == {} and server.keys() == []
    let_in(server, keys[0], [2, 0])
    let_in(server, keys[1], [1])
    let_in(server, keys[0], [0, 2])  # Flower may not know it
    first = fingerprint(keys[0])
    expected = {first: [0, 2], fingerprint(keys[1]): [1]}
    assert server.owners() == expected and server.keys() == keys[:2]
    with pytest.raises(ConfigError, match=r"the key SHA256:\S+ is registered already, for devices \[0, 2\]"):
        let_in(server, keys[0], [7])
    with pytest.raises(ConfigError) as refused:
        let_in(server, keys[2], [9, 2])
    assert str(refused.value) == f"device 2 belongs to the key {first}: each device has one node"
    with pytest.raises(KeyboardInterrupt), server.letting_in(keys[2], [9]):
        assert server.owners() == {**expected, fingerprint(keys[2]): [9]}
        raise KeyboardInterrupt
    assert server.owners() == expected and not list(server.folder.glob(".*"))


def test_nodes_are_let_in_one_after_another(keys: list[EllipticCurvePublicKey], server: ServerFolder) -> None:
    """Two operators at once: neither's node is lost."""
    threads = [threading.Thread(target=let_in, args=(server, key, [i])) for i, key in enumerate(keys)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(server.owners().values()) == [[i] for i in range(len(keys))]


DAMAGED = ["[a", "a = 3", "[a]\ndevices = 3", "[a]\ndevices = ['x']", "[a]\n", "a = 'x'", "[a]\ndevices = [0]",
           "[a]\ndevices = [0]\nkey = 3", "[a]\ndevices = [0]\nkey = 'x'"]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_list_of_nodes_is_never_taken_for_none(
    damage: str, keys: list[EllipticCurvePublicKey], server: ServerFolder
) -> None:
    (server.folder / "nodes.toml").write_text(damage)
    for asks in (server.owners, lambda: let_in(server, keys[0], [0])):
        with pytest.raises(ConfigError, match=r"nodes\.toml is damaged: it must hold devices = \[ids\] and a key"):
            asks()
    assert (server.folder / "nodes.toml").read_text() == damage


Told = list[tuple[str, EllipticCurvePublicKey]]


@pytest.fixture
def told(flower_home: Path, server: ServerFolder, monkeypatch: pytest.MonkeyPatch) -> Told:
    """The keys that a SuperLink was told, and where."""
    connect_flower("fedsplit", "127.0.0.1:9092", server.folder / CA)
    found: Told = []

    def tell(address: str, authority: bytes, keys: list[EllipticCurvePublicKey]) -> bool:
        assert authority == (server.folder / CA).read_bytes()
        found.extend((address, key) for key in keys)
        return True

    monkeypatch.setattr(module, "tell_keys", tell)
    return found


def test_a_node_is_registered_with_the_devices_that_its_key_names(
    told: Told, server: ServerFolder, tmp_path: Path
) -> None:
    first, second = Home.create(tmp_path / "a", [3, 1]).key_path, Home.create(tmp_path / "b", [5]).key_path
    public = [path.with_suffix(".pub") for path in (first, second)]
    assert register_node("fedsplit", public[0], None) == [1, 3]
    assert register_node("fedsplit", public[1], [4, 6]) == [4, 6]  # the operator's word wins
    keys = [read_public_key(path.read_bytes()) for path in public]
    assert told == [("127.0.0.1:9092", key) for key in keys]
    assert server.owners() == {fingerprint(key): d for key, d in zip(keys, ([1, 3], [4, 6]), strict=True)}
    with pytest.raises(ConfigError, match=r"the key SHA256:\S+ is registered already, for devices \[1, 3\]"):
        register_node("fedsplit", public[0], [7])
    assert len(told) == 2


@pytest.mark.parametrize("status", [None, 403])
def test_a_node_that_flower_refuses_is_not_let_in(
    status: int | None, told: Told, server: ServerFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither if there is no SuperLink."""

    def refuse(*_: object) -> bool:
        if status:
            raise ConfigError(f"HTTP status {status}")
        return False

    monkeypatch.setattr(module, "tell_keys", refuse)
    key = Home.create(tmp_path / "a", [3]).key_path.with_suffix(".pub")
    with pytest.raises(ConfigError, match="HTTP status 403" if status else "does not answer at 127.0.0.1:9092: is it"):
        register_node("fedsplit", key, None)
    assert server.owners() == {}


def test_a_superlink_that_does_not_answer_is_told_nothing(
    keys: list[EllipticCurvePublicKey], server: ServerFolder
) -> None:
    authority = (server.folder / CA).read_bytes()
    assert tell_keys(f"127.0.0.1:{free_port()}", authority, keys) is False


def test_a_superlink_of_flowers_own_is_none_of_ours(flower_home: Path) -> None:
    flower_home.parent.mkdir()
    flower_home.write_text('[superlink.supergrid]\naddress = "supergrid"\n')
    with pytest.raises(ConfigError, match="SuperLink 'supergrid' is not one of fedsplit's"):
        server_of("supergrid")


def test_an_insecure_server_has_no_keys(flower_home: Path, tmp_path: Path) -> None:
    connect_flower("trial", "127.0.0.1:1", None)
    key = Home.create(tmp_path / "a", [3]).key_path.with_suffix(".pub")
    with pytest.raises(ConfigError, match="SuperLink 'trial' is insecure: it takes whoever comes, and knows no keys"):
        register_node("trial", key, None)


def test_a_run_needs_a_node(told: Told, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="SuperLink 'fedsplit' has no nodes yet: let them in with fedsplit server"):
        submit("{}", "fedsplit", tmp_path / "run", resume=False)


@pytest.mark.parametrize("comment", ["", "me@home", "fedsplit-devices=", "fedsplit-devices=x", "fedsplit-devices=1,"])
def test_a_key_that_names_no_devices_is_refused(comment: str, told: Told, tmp_path: Path) -> None:
    make_key_pair(tmp_path / "key", comment)
    with pytest.raises(ConfigError, match=r"key\.pub names no devices: give them with --device"):
        register_node("fedsplit", tmp_path / "key.pub", None)
    assert told == [] and register_node("fedsplit", tmp_path / "key.pub", [0]) == [0]


def test_what_is_no_nodes_key_is_not_registered(told: Told, tmp_path: Path) -> None:
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


def test_a_key_for_anothers_device_is_not_let_in(
    told: Told, keys: list[EllipticCurvePublicKey], server: ServerFolder, tmp_path: Path
) -> None:
    """Else it may connect, and registering it again with its own device fails, since Flower has it already."""
    let_in(server, keys[0], [3])
    with pytest.raises(ConfigError, match=f"device 3 belongs to the key {re.escape(fingerprint(keys[0]))}"):
        register_node("fedsplit", Home.create(tmp_path / "b", [3]).key_path.with_suffix(".pub"), None)
    assert told == []


def test_what_flower_says_is_told_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^flwr nonsense failed: .*nonsense") as refused:
        run_flower(["nonsense"])
    assert "\n" not in str(refused.value) and "│" not in str(refused.value)


# ------------------------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_server_start_refuses(tmp_path: Path, refused: Callable[..., str]) -> None:
    make_certificates(tmp_path / "server", ["127.0.0.1"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        start = ("server", "start", "server", "--port", port)
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in refused(*start)
    (tmp_path / "server" / KEY).chmod(0o644)
    assert "server.key can be read by others: chmod 600 it" in refused(*start)
    assert not (tmp_path / "flwr").exists()


@pytest.mark.slow
def test_the_operators_other_commands_refuse(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "small.toml").write_text(small_settings().to_toml())
    (tmp_path / "own.py").write_text((Path(__file__).parents[1] / "own.py").read_text())
    said = refused("run", "small.toml", "--superlink", "fedsplt", "--out", "run")
    assert "no SuperLink 'fedsplt' in " in said and not (tmp_path / "run").exists()
    make_key_pair(tmp_path / "key", "me@home")
    assert "key.pub names no devices: give them with --device" in refused("server", "register", "key.pub")
    assert "--host must be a host's name or address" in refused("certs", "server", "--host", "a:1")
    assert not (tmp_path / "server").exists()
