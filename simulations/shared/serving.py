"""A process of ``fedsplit serve`` over TLS, for as long as it is needed."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsplit.common.certs import make_certificates
from simulations.shared.network import free_port, wait_for_port
from simulations.shared.processes import FEDSPLIT, importing_studies


@contextmanager
def serving(run: Path, folder: Path, *options: str) -> Iterator[str]:
    """Serve a run; the value is the service's address.

    Parameters
    ----------
    run : Path
    folder : Path
        Gets ``certs``, and holds ``tokens``.
    options : str
        More options of ``fedsplit serve``.
    """
    make_certificates(folder / "certs", ["127.0.0.1"])
    port = free_port()
    command = [FEDSPLIT, "serve", str(run), "--port", str(port), *options]
    with listening([*command, "--certs", str(folder / "certs"), "--tokens", str(folder / "tokens")], port):
        yield f"https://127.0.0.1:{port}"


@contextmanager
def listening(command: list[str], port: int) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a process that listens on a port of this machine; end it afterwards."""
    process = subprocess.Popen(command, env=importing_studies())
    try:
        wait_for_port("127.0.0.1", port)
        yield process
    finally:
        process.terminate()
        process.wait(20)
