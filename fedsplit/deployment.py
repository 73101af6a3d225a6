"""Starting the processes of a deployment: the Flower commands that do it, and what is checked before.

The starters hide nothing: each prints the command that it runs, which can be run without it as well.
"""

import ctypes
import json
import logging
import os
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from shutil import copy, which

import tomli_w
from cryptography.x509 import load_pem_x509_certificates

from fedsplit.certs import CA, CERTIFICATE, KEY, fingerprint
from fedsplit.config import Settings
from fedsplit.errors import ConfigError
from fedsplit.packing import MAX_DEVICES
from fedsplit.state import replacing

log = logging.getLogger(__name__)
NODES, DATABASE = "nodes.toml", "superlink.db"
_FLOWER = "1.41."
_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",  # seconds between two looks for work, by default 1
    "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES": "4",  # of a message's objects, by default 2
    "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PULLS": "4",
}
_TIMEOUT = 5.0  # seconds to reach a server
TAKEOVER = 75.0  # seconds in which Flower takes a killed node for online, and refuses the same key
_CONNECTED = 15.0  # seconds after which a SuperNode that has not ended is connected


def flower(program: str) -> str:
    """Return the path of one of Flower's programs: the one installed beside this Python, else on the PATH."""
    beside = Path(sys.executable).with_name(program)
    found = str(beside) if beside.exists() else which(program)
    if found is None:
        raise ConfigError(f"{program} is not installed: it comes with flwr")
    return found


def environment() -> dict[str, str]:
    """Return the environment of a Flower process: this one's, unless it says otherwise without telemetry or waits."""
    return {**_ENVIRONMENT, **os.environ}


# ------------------------------------------------------------------------------------------------ the server


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

    def owners(self) -> dict[str, list[int]] | None:
        """Return the devices of each key by its fingerprint, or None if no node was registered here.

        Raises
        ------
        ConfigError
            If the file is damaged.
        """
        path = self.folder / NODES
        if not path.exists():
            return None
        try:
            found = tomllib.loads(path.read_text(encoding="utf-8"))
            return {str(key): [int(device) for device in entry["devices"]] for key, entry in found.items()}
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f"{path} is damaged: it must hold devices = [ids] for each key") from None

    def check_new(self, key: str, devices: Sequence[int]) -> dict[str, list[int]]:
        """Return the devices of all keys, this new one with it.

        Raises
        ------
        ConfigError
            If the key is there already, or a device belongs to another.
        """
        known = self.owners() or {}
        if key in known:
            raise ConfigError(f"the key {key} is registered already, for devices {known[key]}")
        for other, theirs in known.items():
            if shared := sorted(set(theirs) & set(devices)):
                raise ConfigError(f"device {shared[0]} belongs to the key {other}: each device has one node")
        return {**known, key: sorted(devices)}

    def add(self, key: str, devices: Sequence[int]) -> None:
        """Note whose key has which devices; raises ConfigError as :meth:`check_new`."""
        owners = self.check_new(key, devices)
        text = tomli_w.dumps({name: {"devices": ids} for name, ids in owners.items()})
        with replacing(self.folder / NODES) as new:
            new.write_text(text, encoding="utf-8")


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


def connect_flower(name: str, address: str, root: Path | None) -> Path:
    """Make a SuperLink known to Flower's own commands by a name; return the file that says so.

    Raises
    ------
    ConfigError
        If the name is another's.
    """
    path = flower_config()
    entry: dict[str, object] = {"address": address}
    entry |= {"insecure": True} if root is None else {"root-certificates": str(root.resolve())}
    known = _connections(path).get(name)
    if known == entry:
        return path
    if known is not None:
        raise ConfigError(f"{path} has another [superlink.{name}]: remove it or choose another --name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:  # what is there, comments included, is left alone
        file.write("\n" + tomli_w.dumps({"superlink": {name: entry}}))
    return path


def flower_config() -> Path:
    """Return the file in which Flower's commands look for SuperLinks."""
    return Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr")) / "config.toml"


def _connections(path: Path) -> dict[str, dict[str, object]]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8")).get("superlink", {})
        return {name: entry for name, entry in dict(found).items() if isinstance(entry, dict)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def server_of(name: str) -> ServerFolder:
    """Return the folder of a SuperLink that Flower's commands know; raises ConfigError."""
    path = flower_config()
    entry = _connections(path).get(name)
    if entry is None:
        raise ConfigError(f"no SuperLink {name!r} in {path}: fedsplit server start --name {name} adds it")
    return ServerFolder(Path(str(entry.get("root-certificates", "."))).parent)


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
    server.check_new(key, chosen)  # before Flower knows it
    run_flower(["supernode", "register", str(public_key), name])
    server.add(key, chosen)
    return chosen


def run_flower(arguments: Sequence[str]) -> str:
    """Run one of Flower's own commands and return its output; raises ConfigError with what it said."""
    command = [flower("flwr"), *arguments]
    log.info("%s", shlex.join(command))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.strip(" │╭╰─╮╯") for line in (done.stdout + done.stderr).splitlines()]
        raise ConfigError(f"flwr {arguments[0]} failed: {' '.join(line for line in said if line)[:500]}")
    return done.stdout


def submit(settings_json: str, name: str, folder: Path, *, resume: bool, modules: Sequence[Path] = ()) -> str:
    """Start a run on a SuperLink and return its id.

    The app that goes there holds no code of fedsplit's, which nodes and server have installed, but the settings, and
    the ``modules`` that these name.

    Raises
    ------
    ConfigError
        If the SuperLink is not known or refuses it.
    """
    server = server_of(name)
    config: dict[str, str | bool] = {"settings": settings_json, "out": str(folder.resolve()), "resume": resume}
    config["nodes"] = str(server.folder)
    with tempfile.TemporaryDirectory() as app:
        write_app(Path(app), config, modules)
        return start_run(Path(app), name)


def write_app(folder: Path, config: dict[str, str | bool], modules: Sequence[Path] = ()) -> None:
    """Write the Flower app of a run: its run config, and files of the user's own."""
    for side in ("server", "client"):
        text = f"from fedsplit.{side}_app import app\n__all__ = ['app']\n"
        (folder / f"run_{side}.py").write_text(text, encoding="utf-8")
    for module in modules:
        copy(module, folder)
    components = {"serverapp": "run_server:app", "clientapp": "run_client:app"}
    project = {
        "project": {"name": "fedsplit-run", "version": "1.0.0", "description": "", "license": "Apache-2.0"},
        "tool": {"flwr": {"app": {"publisher": "fedsplit", "components": components, "config": config}}},
    }
    (folder / "pyproject.toml").write_text(tomli_w.dumps(project), encoding="utf-8")


def start_run(app: Path, name: str) -> str:
    """Start a Flower app on a SuperLink and return the run's id; raises ConfigError."""
    said = run_flower(["run", str(app), name, "--format", "json"])
    try:
        return str(json.loads(said)["run-id"])
    except (ValueError, KeyError):
        raise ConfigError(f"SuperLink {name!r} did not start the run: {said.strip()[:300]}") from None


def own_modules(folder: Path, functions: Sequence[str | None]) -> list[Path]:
    """Return the files beside a settings file that hold a user's own ``module:function``, to go with the run."""
    files = (folder / f"{name.partition(':')[0]}.py" for name in functions if name)
    return sorted({file for file in files if file.exists()})


def check_settings(settings: Settings) -> None:
    """Refuse settings that do not fit together before a run is submitted; raises FedsplitError."""
    from fedsplit.assemble import data_source, public_records, split_model

    source = data_source(settings)
    split_model(settings, source)
    public_records(settings, source)


def run_status(run: str, name: str) -> str:
    """Return Flower's word for how a run is: running, or finished and how."""
    said = json.loads(run_flower(["ls", "--run-id", run, name, "--format", "json"]))
    found = [str(r.get("status")) for r in said.get("runs", [])]
    return found[0] if found else "unknown"


# ------------------------------------------------------------------------------------------------ a node


def read_authority(path: Path) -> bytes:
    """Return the authority's certificate; raises ConfigError if it cannot be read or is none."""
    try:
        found = path.read_bytes()
        load_pem_x509_certificates(found)  # refuses a file without any, which ssl would take for the system's
        ssl.create_default_context(cadata=found.decode("ascii"))
    except OSError as error:
        raise ConfigError(f"authority {path} cannot be read: {error.strerror or 'not a certificate'}") from None
    except ValueError:
        raise ConfigError(f"authority {path} is not a certificate in PEM") from None
    return found


def check_superlink(address: str, authority: bytes | None) -> bool:
    """Try the connection to a server as a node would; return whether anything answers.

    Raises
    ------
    ConfigError
        If it answers, but with TLS where there should be none or the other way round, or with a certificate that is
        not signed by the authority, has expired or is another host's.
    """
    host, colon, port = address.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 65536:
        raise ConfigError(f"--superlink must be HOST:PORT, got {address!r}")
    context = ssl.create_default_context(cadata=None if authority is None else authority.decode("ascii"))
    if authority is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host, int(port)), timeout=_TIMEOUT) as plain:
            with context.wrap_socket(plain, server_hostname=host):
                speaks_tls = True
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(f"{address}: its certificate is refused: {error.verify_message}") from None
    except ssl.SSLError:
        speaks_tls = False
    except (socket.gaierror, UnicodeError):
        raise ConfigError(f"{address}: there is no host of this name") from None
    except OSError:
        return False
    if speaks_tls and authority is None:
        raise ConfigError(f"{address} speaks TLS: give its authority with --ca, instead of --insecure")
    if not speaks_tls and authority is not None:
        raise ConfigError(f"{address} does not speak TLS: nothing is sent there")
    return True


def wait_for_superlink(address: str, authority: bytes | None, stop: threading.Event) -> None:
    """Wait until a server answers or ``stop`` is set; raises ConfigError as :func:`check_superlink`."""
    said = False
    while not check_superlink(address, authority):
        if not said:
            log.warning("%s does not answer yet: waiting", address)
            said = True
        if stop.wait(1.0):
            return


def check_flower() -> None:
    """Raise ConfigError if Flower is not of the version whose internal API :mod:`fedsplit.warm` speaks."""
    found = version("flwr")
    if not found.startswith(_FLOWER):
        raise ConfigError(f"--warm is written for flwr {_FLOWER}x, this is {found}: start the node without it")


def supernode_command(address: str, authority: Path | None, key: Path, node_config: dict[str, str]) -> list[str]:
    """Return the command that starts a SuperNode; its own port on this machine is a free one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = " ".join(f"{name}={json.dumps(value)}" for name, value in node_config.items())
    command = [flower("flower-supernode"), "--superlink", address, "--host", "127.0.0.1", "--port", str(port)]
    if authority is None:
        return [*command, "--insecure", "--node-config", config]
    tls = ["--root-certificates", str(authority), "--auth-supernode-private-key", str(key)]
    return [*command, *tls, "--node-config", config]


class SuperNode:
    """A SuperNode process, which ends with this one.

    Parameters
    ----------
    command : sequence of str
    seen : Path
        A file that is there once the node has been connected: after that Flower may take the process before, if it
        was killed, for online still, and refuse this one, which is then started again for a while.
    """

    def __init__(self, command: Sequence[str], seen: Path) -> None:
        self._command, self._seen = list(command), seen
        self._began = self._started = time.monotonic()
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        self._started = time.monotonic()
        return subprocess.Popen(self._command, env=environment(), preexec_fn=end_with_parent)

    def running(self) -> bool:
        """Whether it is there; raises ConfigError if it could not connect."""
        now = time.monotonic()
        if self._process.poll() is None:
            if now - self._started > _CONNECTED:
                self._seen.touch()
            return True
        if self._process.returncode == 0:
            return False
        if now - self._started > _CONNECTED:
            raise ConfigError("the SuperNode has ended: see what it said above")
        if not self._seen.exists():
            raise ConfigError("the server refuses this node, see above: is its key registered?")
        if now - self._began > TAKEOVER:
            raise ConfigError("the server refuses this node, see above: its key is not registered, or used twice")
        log.warning("the server takes this node for online already: trying again")
        time.sleep(5.0)
        self._process = self._start()
        return True

    def stop(self) -> None:
        """End it, and wait for it."""
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def end_with_parent() -> None:
    """Have Linux end this process with its parent, even if that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
