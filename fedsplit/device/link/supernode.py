"""A node's way to its server: what is checked before it starts, and Flower's SuperNode."""

import json
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from flwr.supernode.cli import flwr_clientapp

from fedsplit.common.errors import ConfigError
from fedsplit.flower.programs import CLIENT_APP, end_with_parent, environment, flower

log = logging.getLogger(__name__)
_TIMEOUT = 5.0  # seconds to reach a server
TAKEOVER = 75.0  # seconds in which Flower takes a killed node for online, and refuses the same key
_CONNECTED = 15.0  # seconds after which a SuperNode that has not ended is connected
_AGAIN = 5.0  # seconds between two tries to start one


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
    except ssl.SSLEOFError:
        return False  # closed in the middle: it is just ending, or a proxy has nothing behind it
    except ssl.SSLError:
        speaks_tls = False
    except (socket.gaierror, UnicodeError) as error:
        if getattr(error, "errno", None) == socket.EAI_AGAIN:
            return False  # no name server can be reached just now
        raise ConfigError(f"{address}: there is no host of this name") from None
    except OSError:
        return False
    if speaks_tls and authority is None:
        raise ConfigError(f"{address} speaks TLS: give its authority with --ca, instead of --insecure")
    if not speaks_tls and authority is not None:
        raise ConfigError(f"{address} does not speak TLS: nothing is sent there")
    return True


def wait_for_superlink(address: str, authority: bytes | None, stop: threading.Event) -> None:
    """Wait until a server answers or ``stop`` is set.

    Parameters
    ----------
    address : str
        HOST:PORT.
    authority : bytes or None
        The certificate authority (PEM); None is without TLS.
    stop : threading.Event

    Raises
    ------
    ConfigError
        As :func:`check_superlink`.
    """
    said = False
    while not check_superlink(address, authority):
        if not said:
            log.warning("%s does not answer yet: waiting", address)
            said = True
        if stop.wait(1.0):
            return


def supernode_command(address: str, authority: Path | None, key: Path, node_config: dict[str, str]) -> list[str]:
    """Return the command that starts a SuperNode, with a free port of this machine as its own.

    Parameters
    ----------
    address : str
        The SuperLink's, HOST:PORT.
    authority : Path or None
        File of the certificate authority (PEM); None is without TLS.
    key : Path
        File of the node's private key, which is used with TLS only.
    node_config : dict
        The node's settings by name.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = " ".join(f"{name}={json.dumps(value)}" for name, value in node_config.items())
    command = [flower("flower-supernode"), "--superlink", address, "--host", "127.0.0.1", "--port", str(port)]
    if authority is None:
        return [*command, "--insecure", "--node-config", config]
    tls = ["--root-certificates", str(authority), "--auth-supernode-private-key", str(key)]
    return [*command, *tls, "--node-config", config]


def client_app(arguments: list[str]) -> None:
    """Do the work of the process that a SuperNode starts for a message."""
    sys.argv = [CLIENT_APP, *arguments]
    flwr_clientapp()


class SuperNode:
    """A SuperNode process, which ends with this one.

    Parameters
    ----------
    command : sequence of str
    programs : Path
        A folder of programs that win over those of the same name.
    seen : Path
        A file that is there once the node has been connected. After that a server that refuses it may take an earlier
        process, which was killed, for online still, and a server that was restarted does not know this one: it is then
        started again, for a while.
    """

    def __init__(self, command: Sequence[str], programs: Path, seen: Path) -> None:
        self._command, self._seen = list(command), seen
        self._environment = environment()
        self._environment["PATH"] = os.pathsep.join([str(programs), self._environment["PATH"]])
        self._started = 0.0
        self._again: float | None = None  # when to start it again
        self._away: float | None = None  # since when it could not connect
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        self._started, self._again = time.monotonic(), None
        return subprocess.Popen(self._command, env=self._environment, preexec_fn=end_with_parent)

    def look_after(self) -> None:
        """Start it again if it has ended; raises ConfigError if it cannot connect."""
        now = time.monotonic()
        if self._process.poll() is None:
            if now - self._started > _CONNECTED and not self._seen.exists():
                self._seen.touch()
            if now - self._started > TAKEOVER:
                self._away = None
        elif self._again is not None:
            if now >= self._again:
                self._process = self._start()
        elif not self._seen.exists():
            raise ConfigError("the server refuses this node, see above: is its key registered?")
        else:
            self._away = self._away or now
            if now - self._away > TAKEOVER:
                raise ConfigError("the server refuses this node, see above: its key is not registered, or used twice")
            log.warning(
                "the SuperNode has ended: the server was restarted, or takes this node for online: trying again"
            )
            self._again = now + _AGAIN

    def stop(self) -> None:
        """End it, and wait for it."""
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
