"""The server's folder, its SuperLink, and which nodes are let in.

The SuperLink keeps what it knows in memory: nothing that devices sent reaches its disk, and a database would take most
of its time. Who is let in is written in ``nodes.toml``, and told to each SuperLink that starts.
"""

import fcntl
import os
import socket
import ssl
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from fedsplit.common.certs import CA, CERTIFICATE, KEY, fingerprint, openssh_line, read_authority, read_public_key
from fedsplit.common.errors import ConfigError
from fedsplit.common.files import put, writing
from fedsplit.flower.programs import connection, flower, tell_keys
from fedsplit.wire.container import MAX_DEVICES

NODES = "nodes.toml"
_IN_MEMORY = ":flwr-in-memory:"


@dataclass(frozen=True)
class ServerFolder:
    """The server's folder: certificates, and which devices belong to which key."""

    folder: Path

    @property
    def authority(self) -> Path:
        """The certificate that the server's own is signed by."""
        return self.folder / CA

    @property
    def certificates(self) -> tuple[Path, Path, Path]:
        """The authority, the server's certificate and its key; raises ConfigError."""
        paths = tuple(self.folder / name for name in (CA, CERTIFICATE, KEY))
        for path in paths:
            if not path.exists():
                raise ConfigError(f"{path} is missing: make it with fedsplit certs {self.folder} --host NAME")
        if paths[2].stat().st_mode & 0o077:
            raise ConfigError(f"{paths[2]} can be read by others: chmod 600 it, if nobody has")
        return paths[0], paths[1], paths[2]

    def owners(self) -> dict[str, list[int]]:
        """Return the devices of each registered key, by its fingerprint.

        Raises
        ------
        ConfigError
            If the file is damaged.
        """
        return {name: devices for name, (devices, _) in self._nodes().items()}

    def keys(self) -> list[EllipticCurvePublicKey]:
        """Return the registered keys; raises ConfigError if the file is damaged."""
        return [key for _, key in self._nodes().values()]

    def _nodes(self) -> dict[str, tuple[list[int], EllipticCurvePublicKey]]:
        path = self.folder / NODES
        if not path.exists():
            return {}
        try:
            found = tomllib.loads(path.read_text(encoding="utf-8")).items()
            return {
                name: ([int(device) for device in node["devices"]], read_public_key(node["key"].encode()))
                for name, node in found
            }
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, LookupError, AttributeError, ConfigError):
            raise ConfigError(f"{path} is damaged: it must hold devices = [ids] and a key for each node") from None

    @contextmanager
    def letting_in(self, key: EllipticCurvePublicKey, devices: Sequence[int]) -> Iterator[None]:
        """Note which devices a key has; if what is done meanwhile fails, forget it again.

        Raises
        ------
        ConfigError
            If the key is there with other devices, or a device belongs to another.
        """
        name, chosen = fingerprint(key), sorted(devices)
        try:
            folder = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise ConfigError(f"server folder {self.folder} cannot be read: {error.strerror}") from None
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # nobody else lets a node in meanwhile
            before = self._nodes()
            if name in before and before[name][0] != chosen:
                raise ConfigError(f"the key {name} is registered already, for devices {before[name][0]}")
            for other, (theirs, _) in before.items():
                if other != name and (shared := sorted(set(theirs) & set(chosen))):
                    raise ConfigError(f"device {shared[0]} belongs to the key {other}: each device has one node")
            self._write({**before, name: (chosen, key)})
            try:
                yield
            except BaseException:
                self._write(before)
                raise
        finally:
            os.close(folder)

    def _write(self, nodes: dict[str, tuple[list[int], EllipticCurvePublicKey]]) -> None:
        found = {name: {"devices": devices, "key": openssh_line(key)} for name, (devices, key) in nodes.items()}
        with writing(str(self.folder / NODES)):
            put(self.folder / NODES, tomli_w.dumps(found))


def superlink_command(server: ServerFolder, host: str, port: int, *, insecure: bool) -> list[str]:
    """Return the command that starts a SuperLink.

    Parameters
    ----------
    server : ServerFolder
        Holds the certificates.
    host : str
        Name or address to listen at.
    port : int
    insecure : bool
        Whether to go without TLS and without the nodes' keys.

    Raises
    ------
    ConfigError
        If a file is missing, or the port is in use.
    """
    check_port_free(host, port)
    command = [flower("flower-superlink"), "--host", host, "--port", str(port)]
    command += ["--database", _IN_MEMORY, "--disable-runtime-dependency-installation"]
    if insecure:
        return [*command, "--insecure"]
    ca, certificate, key = (str(path) for path in server.certificates)
    tls = ["--ssl-ca-certfile", ca, "--ssl-certfile", certificate, "--ssl-keyfile", key]
    return [*command, *tls, "--enable-supernode-auth"]


def check_pair(certificate: Path, key: Path) -> None:
    """Raise ConfigError if a certificate and a key do not belong together."""
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError):
        raise ConfigError(f"{key} is not the key of {certificate}") from None


def check_port_free(host: str, port: int) -> None:
    """Raise ConfigError if nothing can listen there."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "hosts are names or addresses, ports 0..65535"
        raise ConfigError(f"cannot listen on {host}:{port}: {why}; choose another --port") from None


def server_of(name: str) -> ServerFolder | None:
    """Return the folder of a SuperLink that Flower's commands know, None if it has no keys; raises ConfigError."""
    entry = connection(name)
    if entry.get("insecure"):
        return None
    if "root-certificates" not in entry:
        raise ConfigError(f"SuperLink {name!r} is not one of fedsplit's: no certificates are known of it")
    return ServerFolder(Path(str(entry["root-certificates"])).parent)


def register_node(name: str, public_key: Path, devices: Sequence[int] | None) -> list[int]:
    """Register a node's public key with a SuperLink, for some devices; return them.

    Parameters
    ----------
    name : str
        Of the SuperLink.
    public_key : Path
        As ``fedsplit node init`` wrote it.
    devices : sequence of int or None
        None: those that the file itself names.

    Raises
    ------
    ConfigError
        If the key cannot be used, is registered for other devices, or the SuperLink refuses it.
    """
    try:
        line = public_key.read_bytes()
    except OSError as error:
        raise ConfigError(f"public key {public_key} cannot be read: {error.strerror}") from None
    key, named = read_public_key(line), line.decode(errors="replace").partition("fedsplit-devices=")[2].split()
    try:
        chosen = list(devices or [int(device) for device in named[0].split(",")])
    except (IndexError, ValueError):
        raise ConfigError(f"{public_key} names no devices: give them with --device") from None
    if wrong := [device for device in chosen if not 0 <= device < MAX_DEVICES]:
        raise ConfigError(f"device must be in 0..{MAX_DEVICES - 1}, got {wrong[0]}")
    server = server_of(name)
    if server is None:
        raise ConfigError(f"SuperLink {name!r} is insecure: it takes whoever comes, and knows no keys")
    with server.letting_in(key, chosen):
        if not tell_keys(address := str(connection(name)["address"]), read_authority(server.authority), [key]):
            raise ConfigError(f"SuperLink {name!r} does not answer at {address}: is it running?")
    return chosen
