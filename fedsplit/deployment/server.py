"""The server's folder, its SuperLink, and which nodes are let in."""

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
from flwr.common.constant import PUBLIC_KEY_ALREADY_IN_USE_MESSAGE

from fedsplit.deployment.certs import CA, CERTIFICATE, KEY, fingerprint
from fedsplit.deployment.flower import connection, flower, run_flower
from fedsplit.errors import ConfigError
from fedsplit.packing import MAX_DEVICES
from fedsplit.state import replacing

NODES, DATABASE = "nodes.toml", "superlink.db"


@dataclass(frozen=True)
class ServerFolder:
    """The server's folder: certificates, the database of its SuperLink, and which devices belong to which key."""

    folder: Path

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
        path = self.folder / NODES
        if not path.exists():
            return {}
        try:
            found = tomllib.loads(path.read_text(encoding="utf-8"))
            return {str(key): [int(device) for device in entry["devices"]] for key, entry in found.items()}
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f"{path} is damaged: it must hold devices = [ids] for each key") from None

    @contextmanager
    def letting_in(self, key: str, devices: Sequence[int]) -> Iterator[None]:
        """Note whose key has which devices; if what is done meanwhile fails, forget it again.

        Raises
        ------
        ConfigError
            If the key is there with other devices, or a device belongs to another.
        """
        try:
            folder = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise ConfigError(f"server folder {self.folder} cannot be read: {error.strerror}") from None
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # nobody else lets a node in meanwhile
            before = self.owners()
            if key in before and before[key] != sorted(devices):
                raise ConfigError(f"the key {key} is registered already, for devices {before[key]}")
            for other, theirs in before.items():
                if other != key and (shared := sorted(set(theirs) & set(devices))):
                    raise ConfigError(f"device {shared[0]} belongs to the key {other}: each device has one node")
            self._write({**before, key: sorted(devices)})
            try:
                yield
            except BaseException:
                self._write(before)
                raise
        finally:
            os.close(folder)

    def _write(self, owners: dict[str, list[int]]) -> None:
        text = tomli_w.dumps({name: {"devices": ids} for name, ids in owners.items()})
        try:
            with replacing(self.folder / NODES) as new:
                new.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{self.folder / NODES} cannot be written: {error.strerror}") from None


def superlink_command(server: ServerFolder, host: str, port: int, *, insecure: bool) -> list[str]:
    """Return the command that starts a SuperLink; raises ConfigError if something is missing or the port in use."""
    check_port_free(host, port)
    command = [flower("flower-superlink"), "--host", host, "--port", str(port)]
    command += ["--database", str(server.folder / DATABASE), "--disable-runtime-dependency-installation"]
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
        If the key cannot be used, is registered already, or the SuperLink refuses it.
    """
    try:
        line = public_key.read_bytes()
    except OSError as error:
        raise ConfigError(f"public key {public_key} cannot be read: {error.strerror}") from None
    key, named = fingerprint(line), line.decode(errors="replace").partition("fedsplit-devices=")[2].split()
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
        try:
            run_flower(["supernode", "register", str(public_key), name])
        except ConfigError as error:
            if PUBLIC_KEY_ALREADY_IN_USE_MESSAGE not in str(error):  # else only its devices were missing here
                raise
    return chosen
