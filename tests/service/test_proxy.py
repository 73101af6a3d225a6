"""The proxy of docs/deployment.md, with its very text: what it keeps from the network, and a run over it."""

import http.client
import os
import re
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployments import HONEST, deployed, simulated, written
from references import largest_difference, trained

from fedsplit.plan.settings import load_settings
from fedsplit.runs.simulation import simulate
from simulations.shared.network import free_port, wait_for_port
from simulations.shared.processes import Deployment, deployment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(280),
    pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx"),
]
PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"
KEPT = ("/v1/control/start-run", "/v1/control/register-node", "/v1/control/list-runs", "/v1/runtime/acquire-task")
TRICKS = (
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol/start-run",
    "/v1/fleet/%252e%252e/control/start-run",
    "/v1/fleet/./../control/start-run",
    "/v1/fleet/..;/control/start-run",
    "/v1/fleet/..\\control\\start-run",
    "//v1/control/start-run",
    "/v1//control/start-run",
    "/V1/Control/start-run",
    "/v1/%63ontrol/start-run",
    "/v1/fleet/#/../../control/start-run",
    "/v1/control/start-run?/../../../v1/fleet/",
    "/v1/control/start-run#/../../../v1/fleet/",
    "/v1/control/start-run/../../fleet/activate-node/../../control/start-run",
    "/v1/control/start-run%23/../../../v1/fleet/x",
    "/v1/control/start-run%3f/../../../v1/fleet/x",
    "/v1/control/start-run/../../fleet/x",
    "https://127.0.0.1/v1/control/start-run",
    "https://127.0.0.1/v1/fleet/../control/start-run",
)


def configuration(server: Path, port: int, superlink: int) -> str:
    """Return the block on the page with paths and ports of its own."""
    (block,) = re.findall(r"```nginx\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    changes = {
        "listen 443 ": f"listen 127.0.0.1:{port} ",
        "/srv/fedsplit/server/": f"{server}/",
        "https://127.0.0.1:9092/": f"https://127.0.0.1:{superlink}/",
    }
    for before, after in changes.items():
        assert before in block
        block = block.replace(before, after)
    return block


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("trial")) as built:
        yield built


@pytest.fixture(scope="module")
def proxy(trial: Deployment) -> Iterator[str]:
    """Start nginx in front of the SuperLink; give its address."""
    folder, port = trial.folder / "nginx", free_port()
    folder.mkdir()
    names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "\n".join(f"{name}_temp_path {folder / name};" for name in names)
    block = configuration(trial.folder / "server", port, trial.port)
    user = "user root;" if os.getuid() == 0 else ""  # its workers write below the trial's folder
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; worker_processes 1; pid {folder / 'pid'}; error_log {folder / 'error.log'};\n"
        f"events {{ worker_connections 64; }}\nhttp {{\n{temporary}\n{block}\n}}\n"
    )
    command = ["nginx", "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]
    process = subprocess.Popen(command)
    try:
        wait_for_port("127.0.0.1", port)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        assert process.wait(20) == 0


def post(trial: Deployment, address: str, path: str, body: bytes = b"", most: int | None = None) -> tuple[int, str]:
    """Post to a path as it is written; return the status and what is said."""
    context = ssl.create_default_context(cafile=str(trial.authority))
    if most is not None:
        context.maximum_version = ssl.TLSVersion(most)
    connection = http.client.HTTPSConnection(address, context=context, timeout=20)
    try:
        connection.putrequest("POST", path, skip_accept_encoding=True)
        for name, value in (("Content-Type", "application/protobuf"), ("Content-Length", str(len(body)))):
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        connection.close()


def says_nginx(answer: tuple[int, str]) -> bool:
    return answer[0] in (400, 404) and "<center>nginx" in answer[1]


@pytest.mark.parametrize("path", KEPT)
def test_only_this_machine_reaches_what_asks_for_no_key(path: str, trial: Deployment, proxy: str) -> None:
    assert says_nginx(post(trial, proxy, path))
    status, said = post(trial, trial.address, path)
    assert status not in (404, 405) and "nginx" not in said, (status, said)  # it is there


def test_only_this_machine_reaches_the_superlink_itself(trial: Deployment) -> None:
    listed = subprocess.run(["ss", "-Hltn"], check=False, capture_output=True, text=True).stdout
    if not listed:
        pytest.skip("needs ss")
    assert {line.split()[3] for line in listed.splitlines() if line.split()[3].endswith(f":{trial.port}")} == {
        trial.address
    }


def test_tricks_with_paths_do_not_help(trial: Deployment, proxy: str) -> None:
    """They end at the proxy, or as a path that the SuperLink does not have."""
    unknown = post(trial, trial.address, "/v1/fleet/no-such-thing")
    assert unknown[0] == 404
    for path in TRICKS:
        answer = post(trial, proxy, path)
        assert says_nginx(answer) or answer == unknown, (path, answer)


def test_nodes_reach_their_part(trial: Deployment, proxy: str) -> None:
    """With pieces of large messages, and over TLS 1.3 alone."""
    answer = post(trial, proxy, "/v1/fleet/activate-node")
    assert answer == post(trial, trial.address, "/v1/fleet/activate-node") and answer[0] != 404
    for size, refused in ((5 * 2**20 + 10_000, False), (9 * 2**20, True)):
        try:
            status = post(trial, proxy, "/v1/fleet/push-object", bytes(size))[0]
        except OSError:  # closed while it was sent
            status = 413
        assert (status == 413) is refused
    with pytest.raises(ssl.SSLError):
        post(trial, proxy, "/v1/fleet/activate-node", most=ssl.TLSVersion.TLSv1_2)


def test_a_run_trains_over_it(trial: Deployment, proxy: str) -> None:
    rounds = ["run.rounds=3"]
    settings = load_settings(written(trial.folder / "simulated.toml", simulated(HONEST)), rounds)
    config = written(trial.folder / "deployed.toml", deployed(HONEST))
    for name, devices in (("gateway", [0, 2]), ("wearable", [1]), ("tester", [3])):
        trial.make_node(name, devices, settings)
        trial.start_node(name, "--superlink", proxy)  # the last one counts
    for name in ("gateway", "wearable", "tester"):
        trial.wait_for(name, f"connected to {proxy} as node")
    trial.run(config, "run", "--set", *rounds, "--set", "protocol.timeout=60")  # on a machine that has other work
    result = trial.result("run", timeout=200)
    assert result["rounds"] == 3
    simulate(settings, out=trial.folder / "simulation")
    assert largest_difference(trained(trial.folder / "run"), trained(trial.folder / "simulation")) <= 1e-5
