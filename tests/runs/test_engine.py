"""Ray as it really is: actors that die, a cluster that is there already, one that is not."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import simulated_json, small_settings
from flwr.app import Message
from references import largest_difference, moved, trained

from fedsplit import simulate
from fedsplit.common.errors import ConfigError, RunError
from fedsplit.flower.grid import InProcessGrid
from fedsplit.flower.record import to_record
from fedsplit.plan.settings import Settings
from fedsplit.runs.client_app import client_app

pytestmark = pytest.mark.slow  # starts Ray


def settings(address: str | None = None, engine: str = "ray") -> Settings:
    """Five devices on three nodes, with a mini-batch SGD that any lost or doubled message would change."""
    return small_settings(
        run={"engine": engine, "ray-address": address, "rounds": 6},
        devices={"per-node": 2},
        dropping={"policy": "random", "keep": 0.5},
    )


def actors() -> list[int]:
    """The processes of Flower's actors below this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_text()
        except OSError:
            continue
        if name.startswith("ray::ClientAppActor") and _is_below(int(folder.name), os.getpid()):
            found.append(int(folder.name))
    return found


def all_end() -> bool:
    """Whether all actors end within ten seconds."""
    deadline = time.monotonic() + 10
    while actors() and time.monotonic() < deadline:
        time.sleep(0.1)
    return not actors()


def _is_below(pid: int, ancestor: int) -> bool:
    while pid not in (0, 1, ancestor):
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            return False
    return pid == ancestor


def test_a_run_whose_actor_is_killed_ends_as_if_nothing_had_happened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = simulate(settings(engine="inline"), out=tmp_path / "undisturbed")
    killed = []

    def kill(metrics: dict[str, object]) -> None:
        if metrics["round"] == 3 and not killed:
            killed.append(actors()[0])
            os.kill(killed[0], signal.SIGKILL)

    with caplog.at_level(logging.WARNING, "fedsplit"):
        result = simulate(settings(), out=tmp_path / "killed", report=kill)
    assert killed
    assert "the simulation's engine stopped after round 3, a new one is started" in caplog.text
    assert result["test_loss"] == undisturbed["test_loss"]
    assert result["exposures_max"] == undisturbed["exposures_max"]
    assert largest_difference(trained(tmp_path / "killed"), trained(tmp_path / "undisturbed")) == 0
    lines = [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("killed", "undisturbed")]
    assert lines == [6, 6]


def test_an_engine_that_dies_again_and_again_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN_TEST", str(os.getpid()))
    deadly = settings().model_copy(update={"data": settings().data.model_copy(update={"builder": "own:deadly"})})
    with pytest.raises(RunError, match=r"the simulation's engine stopped twice after round 0: .*Actor"):
        simulate(deadly, out=tmp_path / "run")
    assert all_end()


def test_a_cluster_of_two_ray_nodes_gives_the_same_parameters(tmp_path: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    simulate(settings(engine="inline"), out=tmp_path / "local")
    nodes = []
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        simulate(settings(cluster.address), out=tmp_path / "cluster", report=lambda metrics: nodes.append(ray.nodes()))
    finally:
        cluster.shutdown()
    assert len({node["NodeID"] for node in nodes[-1] if node["Alive"]}) == 2
    local = trained(tmp_path / "local")
    assert moved(settings(), local) > 1e-3
    assert largest_difference(trained(tmp_path / "cluster"), local) < 1e-5


def test_an_address_without_a_cluster_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no Ray at run.ray-address '127.0.0.1:9': Connection refused"):
        simulate(settings("127.0.0.1:9"), out=tmp_path / "run")


def test_a_run_that_is_refused_leaves_no_ray_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="k must be at most 10"):
        simulate(small_settings(run={"engine": "ray"}, dropping={"policy": "top-k", "k": 99}), out=tmp_path / "run")
    assert all_end()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupt_does_not_wait_for_what_devices_are_at(tmp_path: Path, how: signal.Signals) -> None:
    settings_file = tmp_path / "sleepy.toml"
    sleepy = settings().model_copy(update={"data": settings().data.model_copy(update={"builder": "own:sleepy"})})
    settings_file.write_text(sleepy.to_toml())
    command = [sys.executable, "-m", "fedsplit.cli", "simulate", str(settings_file), "--out", str(tmp_path / "run")]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "SLEEPY_SIGN": str(tmp_path / "asleep")}
    environment |= {"OWN_TEST": str(os.getpid())}
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 240  # a busy machine takes long to start
    while not (tmp_path / "asleep").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(how)
    said = process.communicate(timeout=30)[1]
    assert process.returncode != 0
    assert (tmp_path / "asleep").exists()
    assert "stack trace" not in said.lower() and "received at" not in said, said  # Ray's own


def test_another_ray_of_this_process_is_left_alone(tmp_path: Path) -> None:
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False)
    try:
        with pytest.raises(RunError, match="Ray is in use in this process already"):
            simulate(settings(), out=tmp_path / "run")
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_a_machine_without_the_run_folder_is_refused(tmp_path: Path) -> None:
    app = client_app(simulated_json(settings()), str(tmp_path / "elsewhere" / "nodes"))
    grid = InProcessGrid(app, 3)
    reply = next(iter(grid.send_and_receive([Message(to_record(b""), 2, "query")])))
    assert "elsewhere is not there: all Ray nodes must share it" in reply.error.reason
