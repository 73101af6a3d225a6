"""A deployment of real processes on this machine: a SuperLink with TLS and keys, and nodes with their own data.

Where it is permitted each node has a network namespace, an address and a link of its own; else all share the loopback.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fedsplit.device.home import Home
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from fedsplit.release.streams import simulation_secret
from simulations.shared.network import (
    BRIDGE,
    START,
    add_namespace,
    free_port,
    ip,
    make_network,
    remove_network,
    wait_for_port,
)
from simulations.shared.study import ROOT

NAME = "trial"
FEDSPLIT = str(Path(sys.executable).with_name("fedsplit"))


def importing_studies(**more: str) -> dict[str, str]:
    """Return this process's environment for another one that imports modules of the studies by their name."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **more}


class Deployment:
    """Starts and stops the processes; everything is below one folder.

    Parameters
    ----------
    folder : Path
    namespaces : bool
        Whether nodes get namespaces of their own; needs root.
    """

    def __init__(self, folder: Path, *, namespaces: bool = False) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.namespaces = namespaces
        self.host = f"{BRIDGE}.1" if namespaces else "127.0.0.1"
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.links: dict[str, str] = {}
        flower = {"FLWR_HOME": str(self.folder / "flwr"), "FLWR_TELEMETRY_ENABLED": "0"}
        self.environment = {**importing_studies(), **flower, "COLUMNS": "1000"}

    @property
    def address(self) -> str:
        """Where nodes reach the server."""
        return f"{self.host}:{self.port}"

    @property
    def authority(self) -> Path:
        """The certificate that nodes are given."""
        return self.folder / "server" / "ca.crt"

    def fedsplit(self, *arguments: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        command = [FEDSPLIT, *arguments]
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"fedsplit {' '.join(arguments)}: {done.stderr.strip()}")
        return done

    def start_server(self) -> None:
        """Start the SuperLink, the first time with new certificates."""
        if not self.authority.exists():
            self.fedsplit("certs", "server", "--host", self.host)
        command = ["server", "start", "server", "--host", self.host, "--port", str(self.port), "--name", NAME]
        self._start("server", command)
        wait_for_port(self.host, self.port)

    def make_node(
        self,
        name: str,
        devices: Sequence[int],
        settings: Settings | None = None,
        *,
        limits: str = "enforce = false\n",
        allow: Sequence[str] = (),
    ) -> Path:
        """Make a node's folder, with its own data and the simulation's device secrets, and register its key.

        Parameters
        ----------
        name : str
        devices : sequence of int
        settings : Settings, optional
            Whose data the node gets its part of, in files of its own.
        limits : str
            The limits file.
        allow : sequence of str
            What the settings of a run may name.
        """
        home = self.folder / name
        Home.create(home, devices, allow)
        (home / "limits.toml").write_text(limits)
        if settings is not None:
            write_data(self.folder / f"{name}-data", devices, settings)
            for device in devices:
                secret = home / f"secret-{device}"
                secret.write_bytes(simulation_secret(settings.run.seed, device))
                secret.chmod(0o600)
        self.fedsplit("server", "register", str(home / "key.pub"), "--superlink", NAME)
        return home

    def start_node(self, name: str, *options: str, warm: bool = True) -> "subprocess.Popen[bytes]":
        """Start a node's process; it logs to ``NAME.log``."""
        data = self.folder / f"{name}-data"
        command = ["node", "start", "--superlink", self.address, "--ca", str(self.authority), "--home", name]
        command += ["--data", str(data)] if data.exists() else []
        return self._start(name, [*command, *(["--warm"] if warm else []), *options], self._namespace(name))

    def _namespace(self, name: str) -> list[str]:
        if not self.namespaces:
            return []
        if name not in self.links:
            self.links[name] = add_namespace(name, len(self.links) + 2)
        return ["ip", "netns", "exec", f"fs-{name}"]

    def link(self, name: str, state: str) -> None:
        """Set a node's link ``up`` or ``down``."""
        ip("link", "set", self.links[name], state)

    def _start(self, name: str, arguments: Sequence[str], before: Sequence[str] = ()) -> "subprocess.Popen[bytes]":
        command = [*before, FEDSPLIT, *arguments]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        self.processes[name] = process
        return process

    def log(self, name: str) -> str:
        """Return what a process has said."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def run_log(self, out: str) -> str:
        """Return the log of a run."""
        return (self.folder / out / "run.log").read_text(errors="replace")

    def wait_for(self, name: str, text: str, timeout: float = START) -> None:
        """Wait until a process has said something."""
        deadline = time.monotonic() + timeout
        while text not in self.log(name):
            if time.monotonic() > deadline or (self.processes[name].poll() is not None and text not in self.log(name)):
                raise RuntimeError(f"{name} has not said {text!r}: {self.log(name)[-2000:]}")
            time.sleep(0.1)

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a process and all its children."""
        os.killpg(self.processes[name].pid, number)

    def kill(self, name: str) -> None:
        """End a process and its children at once, without a word to anybody."""
        self.signal(name, signal.SIGKILL)
        self.processes.pop(name).wait()
        if name == "server":
            wait_for_port(self.host, self.port, open_=False)  # its child may take a moment longer

    def run(self, config: Path | str, out: str, *options: str) -> "subprocess.Popen[bytes]":
        """Start ``fedsplit run``; it logs to ``OUT.log``, the result on its last line."""
        return self._start(out, ["run", str(config), "--superlink", NAME, "--out", out, "--json", *options])

    def result(self, out: str, timeout: float = 600) -> dict[str, Any]:
        """Wait for a run to end well and return its result."""
        process = self.processes[out]
        if process.wait(timeout):
            raise RuntimeError(self.log(out)[-2000:])
        found: dict[str, Any] = json.loads((self.folder / out / "result.json").read_text())
        return found

    def wait_for_round(self, out: str, number: int, timeout: float = 300) -> None:
        """Wait until a run has finished a round."""
        deadline = time.monotonic() + timeout
        while self.rounds(out) < number:
            if time.monotonic() > deadline or self.processes[out].poll() is not None:
                raise RuntimeError(f"round {number} was not reached: {self.log(out)[-2000:]}")
            time.sleep(0.05)

    def rounds(self, out: str) -> int:
        """Return how many rounds of a run are finished."""
        path = self.folder / out / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def serverapp(self) -> int:
        """Return the pid of the process that trains."""
        listed = subprocess.run(["ps", "-wweo", "pid,args"], capture_output=True, text=True, check=True).stdout
        for line in listed.splitlines():
            if "flwr-serverapp" in line and f":{self.port} " in line:
                return int(line.split()[0])
        raise RuntimeError("no run is being trained")

    def stop(self) -> None:
        """End all processes."""
        running = [self.processes.pop(name) for name in [*self.processes][::-1]]
        for number in (signal.SIGCONT, signal.SIGTERM):
            for process in running:
                send(process, number)
        for process in running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                pass
            send(process, signal.SIGKILL)  # its children
            process.wait()
        try:
            os.kill(self.serverapp(), signal.SIGKILL)  # which outlives its SuperLink if it waits for something
        except (RuntimeError, ProcessLookupError):
            pass
        self.links = {}


@contextmanager
def deployment(
    folder: Path, *, namespaces: bool = False, environment: dict[str, str] | None = None
) -> Iterator[Deployment]:
    """Open a deployment with a running server; end all its processes afterwards."""
    if namespaces:
        make_network()
    built = Deployment(folder, namespaces=namespaces)
    built.environment |= environment or {}
    try:
        built.start_server()
        yield built
    finally:
        built.stop()
        if namespaces:
            remove_network()


def write_data(folder: Path, devices: Sequence[int], settings: Settings) -> None:
    """Write devices' records to files of their own, as their owners would have them."""
    source = Experiment(settings).source
    folder.mkdir()
    for device in devices:
        data = source.device(device)
        arrays: dict[str, Any] = {}
        for end, records in (("", data.train), ("_test", data.test)):
            arrays |= {f"x{end}": records.x, f"y{end}": records.y}
            if records.segments is not None:
                arrays[f"segments{end}"] = records.segments
        np.savez(folder / f"{device:06d}.npz", **arrays)


def send(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """Send a signal to a process and its children, if there are any left."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass
