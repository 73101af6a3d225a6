"""Starting Flower's programs, and what its commands know of SuperLinks."""

import ctypes
import logging
import os
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from shutil import which

import httpx
import tomli_w
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from fedsplit.common.errors import ConfigError
from fedsplit.common.files import writing

log = logging.getLogger(__name__)
CLIENT_APP = "flwr-clientapp"  # the program that a SuperNode starts for each message
_FLOWER = "1.41."
_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # seconds between two looks for work, by default 1
    "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES": "4",  # of a message's objects, by default 2
    "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PULLS": "4",
}


def flower(program: str) -> str:
    """Return the path of one of Flower's programs: the one installed beside this Python, else on the PATH."""
    beside = Path(sys.executable).with_name(program)
    found = str(beside) if beside.exists() else which(program)
    if found is None:
        raise ConfigError(f"{program} is not installed: it comes with flwr")
    return found


def environment() -> dict[str, str]:
    """Return the environment of a Flower process: this one's, and what it does not say: no telemetry, short waits."""
    beside = str(Path(sys.executable).parent)  # where Flower looks for its other programs
    return {**_ENVIRONMENT, **os.environ, "PATH": os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])}


def end_with_parent() -> None:
    """Have Linux end this process with its parent, even if that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def check_flower() -> None:
    """Raise ConfigError if Flower is not of the version whose internal API :mod:`fedsplit.device.link.warm` speaks."""
    found = version("flwr")
    if not found.startswith(_FLOWER):
        raise ConfigError(f"--warm is written for flwr {_FLOWER}x, this is {found}: start the node without it")


def run_flower(arguments: Sequence[str]) -> str:
    """Run one of Flower's own commands and return its output; raises ConfigError with what it said."""
    command = [flower("flwr"), *arguments]
    log.info("%s", shlex.join(command))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.strip(" │╭╰─╮╯") for line in (done.stdout + done.stderr).splitlines()]
        raise ConfigError(f"flwr {arguments[0]} failed: {' '.join(line for line in said if line)[:500]}")
    return done.stdout


def tell_keys(address: str, authority: bytes, keys: Iterable[EllipticCurvePublicKey]) -> bool:
    """Have a SuperLink let nodes with these keys in, as ``flwr supernode register`` does for one key.

    Parameters
    ----------
    address : str
        The SuperLink's, HOST:PORT.
    authority : bytes
        The certificate authority (PEM).
    keys : iterable of EllipticCurvePublicKey

    Returns
    -------
    bool
        Whether the SuperLink answers.

    Raises
    ------
    ConfigError
        If it refuses a key that it does not know already.
    """
    from flwr.proto.control_pb2 import RegisterNodeRequest
    from flwr.supercore.control.control_http_client import ControlHttpClient
    from flwr.supercore.error import ApiErrorCode, FlowerError
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    interceptors = [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]
    with ControlHttpClient.from_server_address(address, False, authority, interceptors) as client:
        for key in keys:
            try:
                client.RegisterNode(RegisterNodeRequest(public_key=public_key_to_bytes(key)))
            except httpx.HTTPStatusError as error:
                said = FlowerError.from_json(error.response.text)
                if said is None or said.code != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                    why = said or f"HTTP status {error.response.status_code}"
                    raise ConfigError(f"the SuperLink at {address} refuses a node's key: {why}") from None
            except (httpx.RequestError, ValueError):  # also if what answers is no SuperLink
                return False
    return True


def connect_flower(name: str, address: str, root: Path | None) -> Path:
    """Make a SuperLink known to Flower's own commands by a name, and return the file that says so.

    Parameters
    ----------
    name : str
    address : str
        The SuperLink's, HOST:PORT.
    root : Path or None
        File of the certificate authority (PEM); None is without TLS.

    Raises
    ------
    ConfigError
        If another SuperLink has the name, or the file cannot be written.
    """
    path = flower_config()
    entry: dict[str, object] = {"address": address}
    entry |= {"insecure": True} if root is None else {"root-certificates": str(root.resolve())}
    known = _connections(path).get(name)
    if known == entry:
        return path
    if known is not None:
        raise ConfigError(f"{path} has another [superlink.{name}]: remove it or choose another --name")
    with writing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:  # what is there, comments included, is left alone
            file.write("\n" + tomli_w.dumps({"superlink": {name: entry}}))
    return path


def flower_config() -> Path:
    """Return the file in which Flower's commands look for SuperLinks."""
    return Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr")) / "config.toml"


def connection(name: str) -> Mapping[str, object]:
    """Return what Flower's commands know of a SuperLink: its ``address``, and whether it is ``insecure``.

    Raises
    ------
    ConfigError
        If they do not know it.
    """
    path = flower_config()
    entry = _connections(path).get(name)
    if entry is None:
        raise ConfigError(f"no SuperLink {name!r} in {path}: fedsplit server start --name {name} adds it")
    return entry


def _connections(path: Path) -> dict[str, dict[str, object]]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8")).get("superlink", {})
        return {name: entry for name, entry in dict(found).items() if isinstance(entry, dict)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
