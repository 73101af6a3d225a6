"""Faults while a run is on, and what each is expected to do."""

import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from simulations.shared.processes import Deployment

TIMEOUT = 8.0  # seconds that a message may take while faults are injected
FAULTY = ("data.overlap=false", f"protocol.timeout={TIMEOUT}", "protocol.max-staleness=3")


@dataclass(frozen=True)
class Case:
    """A fault while a run is on, and what it is expected to do.

    ``inject`` is called after round ``at`` of ``rounds`` and returns a word on what was seen; ``log`` must be in the
    run's log; ``returns`` tells whether the node is there at the end.
    """

    name: str
    inject: Callable[[Deployment], str]
    goes_on: bool = True
    log: str = ""
    at: int = 15
    returns: bool = True
    rounds: int = 60

    @property
    def settings(self) -> tuple[str, ...]:
        """What it changes of the settings."""
        return (*FAULTY, f"run.rounds={self.rounds}")

    def shorter(self, length: float) -> "Case":
        """Return the same in a run of only a part of the rounds."""
        return replace(self, at=max(1, round(length * self.at)), rounds=max(2, round(length * self.rounds)))


def kill_node(trial: Deployment) -> str:
    """Kill a node for good."""
    trial.kill("n0")
    return "5 devices gone for good"


def kill_and_return(trial: Deployment) -> str:
    """Kill a node and start it again with its key, which Flower refuses while it takes the old one for online."""
    trial.kill("n0")
    began = time.monotonic()
    trial.start_node("n0")
    said = trial.log("n0").count("connected to")
    while trial.log("n0").count("connected to") == said:
        time.sleep(0.2)
    return f"back after {time.monotonic() - began:.0f} s"


def hang(trial: Deployment) -> str:
    """Stop a node for longer than a message may take, then let it go on."""
    trial.signal("n0", signal.SIGSTOP)
    time.sleep(2 * TIMEOUT)
    trial.signal("n0", signal.SIGCONT)
    return f"hung for {2 * TIMEOUT:.0f} s"


def lose_state(trial: Deployment) -> str:
    """Delete what a node has kept for the backward half."""
    home, lost = trial.folder / "n0" / "runs", 0
    while not lost:
        for path in home.glob("*/pending-*.npz"):
            path.unlink()
            lost += 1
    return "pending chunk deleted"


def cut(trial: Deployment) -> str:
    """Take a node's link down for a while."""
    trial.link("n0", "down")
    time.sleep(2 * TIMEOUT)
    trial.link("n0", "up")
    return f"cut for {2 * TIMEOUT:.0f} s"


def kill_serverapp(trial: Deployment) -> str:
    """Kill the process that trains."""
    subprocess.run(["kill", "-9", str(trial.serverapp())], check=True)
    return "process that trains killed"


def kill_superlink(trial: Deployment) -> str:
    """Kill the SuperLink and start it again."""
    trial.kill("server")
    time.sleep(3)
    trial.start_server()
    return "SuperLink killed and restarted"


CASES = [
    # late, since what its devices would still have given is lost
    Case("node killed", kill_node, log="(devices 0-4) has not answered", at=48, returns=False),
    # of more rounds, since nobody waits for a node that is away for half a minute: it would miss a short run
    Case("node killed, returns with its key", kill_and_return, log="(devices 0-4) has not answered", at=40, rounds=150),
    Case("node hangs", hang, log="has not answered", at=40, rounds=150),
    Case("node's pending state lost", lose_state, log="has lost its pending chunk"),
    Case("network cut and restored", cut, log="has not answered", at=40, rounds=150),
    Case("server process killed", kill_serverapp, goes_on=False, log="was killed"),
    Case("SuperLink killed and restarted", kill_superlink, goes_on=False),
]
