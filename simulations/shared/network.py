"""Ports, and where it is permitted a network namespace with an address and a link for each node."""

import shutil
import socket
import subprocess
import time

BRIDGE = "10.77.0"  # the first three numbers of the nodes' addresses
START = 90.0  # seconds that a process may take to be there


def make_network() -> None:
    """Make the bridge that joins the nodes' links; needs root."""
    remove_network()  # of a run that was killed
    ip("link", "add", "fs-bridge", "type", "bridge")
    ip("addr", "add", f"{BRIDGE}.1/24", "dev", "fs-bridge")
    ip("link", "set", "fs-bridge", "up")


def add_namespace(name: str, number: int) -> str:
    """Make a node's namespace ``fs-NAME`` with the address that ends in ``number``; return its link's name."""
    space, outer, inner = f"fs-{name}", f"fso-{name}"[:15], f"fsi-{name}"[:15]
    ip("netns", "add", space)
    ip("link", "add", outer, "type", "veth", "peer", "name", inner)
    ip("link", "set", outer, "master", "fs-bridge", "up")
    ip("link", "set", inner, "netns", space)
    ip("-n", space, "addr", "add", f"{BRIDGE}.{number}/24", "dev", inner)
    ip("-n", space, "link", "set", inner, "up")
    ip("-n", space, "link", "set", "lo", "up")
    return outer


def remove_network() -> None:
    """Remove all links and namespaces that are named as those of nodes are."""
    links = subprocess.run(["ip", "-o", "link"], check=False, capture_output=True, text=True).stdout
    for link in (line.split(": ")[1].split("@")[0] for line in links.splitlines() if ": fso-" in line):
        subprocess.run(["ip", "link", "del", link], check=False, capture_output=True)
    listed = subprocess.run(["ip", "netns", "list"], check=False, capture_output=True, text=True).stdout
    for space in (line.split()[0] for line in listed.splitlines() if line.startswith("fs-")):
        subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)
    subprocess.run(["ip", "link", "del", "fs-bridge"], check=False, capture_output=True)


def namespaces_permitted() -> bool:
    """Whether this user may make network namespaces."""
    if shutil.which("ip") is None:
        return False
    probe = subprocess.run(["ip", "netns", "add", "fs-probe"], check=False, capture_output=True)
    subprocess.run(["ip", "netns", "del", "fs-probe"], check=False, capture_output=True)
    return probe.returncode == 0


def ip(*arguments: str) -> None:
    """Run iproute2's ip."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_for_port(host: str, port: int, timeout: float = START, *, open_: bool = True) -> None:
    """Wait until somebody listens, or nobody any more."""
    deadline = time.monotonic() + timeout
    while _listens(host, port) != open_:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{'nobody' if open_ else 'somebody'} listens on {host}:{port}")
        time.sleep(0.1)


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
        return True
    except OSError:
        return False
