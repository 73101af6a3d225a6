"""Ray as it really is: actors that die, a cluster that is there already, one that is not."""

import logging
import os
import signal
from pathlib import Path

import pytest
from conftest import small_settings
from references import largest_difference, moved, trained

from fedsplit import simulate
from fedsplit.config import Settings
from fedsplit.errors import ConfigError, RunError

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


def _is_below(pid: int, ancestor: int) -> bool:
    while pid not in (0, 1, ancestor):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
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
    assert "the simulation's engine stopped, a new one is started" in caplog.text
    assert result["test_loss"] == undisturbed["test_loss"]
    assert result["exposures_max"] == undisturbed["exposures_max"]
    assert largest_difference(trained(tmp_path / "killed"), trained(tmp_path / "undisturbed")) == 0
    lines = [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("killed", "undisturbed")]
    assert lines == [6, 6]


def test_an_engine_that_dies_again_and_again_ends_the_run(tmp_path: Path) -> None:
    deadly = settings().model_copy(update={"data": settings().data.model_copy(update={"builder": "own:deadly"})})
    with pytest.raises(RunError, match=r"the simulation's engine stopped twice in round 0: .*Actor"):
        simulate(deadly, out=tmp_path / "run")
    assert not actors()


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
    assert not actors()
