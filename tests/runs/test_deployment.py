"""Deployments of real processes: TLS, keys, several nodes with their own data, honest and hostile ones."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from deployments import HONEST, deployed, simulated, written
from hostile import LIES
from references import largest_difference, trained

from fedsplit.device.home import Home
from fedsplit.plan.settings import Settings, load_settings
from fedsplit.runs.simulation import simulate
from simulations.shared.processes import Deployment, deployment, write_data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Deployment]:
    with deployment(tmp_path) as built:
        yield built


def test_a_deployment_is_the_simulation(trial: Deployment) -> None:
    """Standard nodes with data of their own, of which the server knows nothing but the shape: the same parameters.

    The test of the proxy does the same with warm nodes.
    """
    settings = load_settings(written(trial.folder / "simulated.toml", simulated(HONEST)))
    config = written(trial.folder / "deployed.toml", deployed(HONEST))
    for name, devices in (("gateway", [0, 2]), ("wearable", [1]), ("tester", [3])):
        trial.make_node(name, devices, settings)
        trial.start_node(name, warm=False)
    rounds = "run.rounds=2"  # each takes long: see docs/deployment.md
    trial.run(config, "run", "--set", rounds)
    result = trial.result("run", timeout=200)
    settings = load_settings(trial.folder / "simulated.toml", [rounds, "run.engine=inline"])
    expected = simulate(settings, out=trial.folder / "simulation")
    assert largest_difference(trained(trial.folder / "run"), trained(trial.folder / "simulation")) <= 1e-5
    assert result["test_accuracy"] == expected["test_accuracy"] and result["samples"] == expected["samples"]
    rows = json.loads(trial.fedsplit("status", "run", "--json").stdout)
    assert sorted(row["devices"] for row in rows) == ["0, 2", "1", "3"]
    assert all(row["state"] == "connected" and row["bytes_up"] > 0 for row in rows)
    # what the server's folder holds of the records is nothing
    assert not any("records" in path.name or path.suffix == ".npz" for path in (trial.folder / "run").rglob("*"))


def test_hostile_nodes_change_nothing(trial: Deployment) -> None:
    """Registered nodes tell another lie in every message; all are named and quarantined."""
    count = HONEST + len(LIES)
    settings = load_settings(written(trial.folder / "simulated.toml", simulated(count)))
    config = written(trial.folder / "deployed.toml", deployed(count))
    for device in range(HONEST):
        trial.make_node(f"n{device}", [device], settings)
        trial.start_node(f"n{device}")
    processes = []
    for device, what in enumerate(LIES, start=HONEST):
        home = trial.make_node(what, [device], settings)
        command = [sys.executable, str(Path(__file__).parents[1] / "hostile.py"), trial.address, str(trial.authority)]
        processes.append(subprocess.Popen([*command, str(home), f"{home}-data", what]))
    try:
        trial.run(config, "run", "--set", "protocol.timeout=6")
        trial.result("run", timeout=200)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    rows = {row["devices"]: row for row in json.loads(trial.fedsplit("status", "run", "--json").stdout)}
    log = trial.run_log("run")
    for device, (name, lies) in enumerate(LIES.items(), start=HONEST):
        assert all(text in log for text in lies.values())
        if name != "name":  # which has not registered
            assert rows[str(device)]["state"] == "quarantined", name
            assert f"(devices {device}) is quarantined after 3 offences" in log
    for device in range(HONEST):
        assert rows[str(device)]["offences"] == 0 and rows[str(device)]["state"] == "connected"
    honest_only(trial.folder / "honest", settings)
    honest = {**simulated(count), "data": {"folder": str(trial.folder / "honest"), "outputs": 10}}
    honest["devices"] = {"test": [3]}
    simulate(
        load_settings(written(trial.folder / "honest.toml", honest), ["run.engine=inline"]), out=trial.folder / "h"
    )
    assert largest_difference(trained(trial.folder / "run"), trained(trial.folder / "h")) <= 1e-6


def honest_only(folder: Path, settings: Settings) -> None:
    """Write all devices' records, those of the hostile ones as test records that nobody asks for."""
    write_data(folder, range(settings.devices.count or 0), settings)
    for path in sorted(folder.iterdir())[HONEST:]:
        with np.load(path) as file:
            x, y = file["x"], file["y"]
        np.savez(path, x_test=x, y_test=y)


def test_a_killed_training_process_is_told_and_the_run_resumes(trial: Deployment) -> None:
    """On another SuperLink, which is told of the nodes when it starts: they come back to it by themselves."""
    settings = load_settings(written(trial.folder / "simulated.toml", simulated(HONEST)))
    config = written(trial.folder / "deployed.toml", deployed(HONEST))
    for device in range(HONEST):
        trial.make_node(f"n{device}", [device], settings)
        trial.start_node(f"n{device}")
    more = ("--set", "run.rounds=12")
    trial.run(config, "run", *more)
    trial.wait_for_round("run", 3)
    subprocess.run(["kill", "-9", str(trial.serverapp())], check=True)
    assert trial.processes["run"].wait(60) == 2
    assert "the process that trained was killed" in trial.log("run") and "--resume" in trial.log("run")
    trial.kill("server")
    trial.start_server()
    trial.run(config, "run", "--resume", *more)
    trial.fedsplit("server", "register", "n0/key.pub", "--superlink", "trial")  # whom it was told already
    result = trial.result("run")
    simulate(
        load_settings(trial.folder / "simulated.toml", ["run.rounds=12", "run.engine=inline"]),
        out=trial.folder / "simulation",
    )
    assert largest_difference(trained(trial.folder / "run"), trained(trial.folder / "simulation")) <= 1e-5
    ledgers = [Home(trial.folder / f"n{d}").accountant("train").rows() for d in range(HONEST)]
    assert sum(spent.releases for rows in ledgers for _, spent in rows) >= result["samples"]


def test_strangers_stay_out(trial: Deployment, tmp_path: Path) -> None:
    """An unregistered key, another's certificate, two nodes with one folder, one node of another's device."""
    trial.fedsplit("node", "init", "stranger", "--device", "0")
    for warm in (True, False):
        process = trial.start_node("stranger", warm=warm)
        assert process.wait(60) == 2, trial.log("stranger")
    assert "it is not registered" in trial.log("stranger") and "is its key registered?" in trial.log("stranger")

    trial.make_node("member", [1])
    trial.start_node("member")
    trial.wait_for("member", "connected to")
    twice = trial.fedsplit("node", "start", "--superlink", trial.address, "--ca", "server/ca.crt", "--home", "member",
                           check=False)  # fmt: skip
    assert twice.returncode == 2 and "is already running" in twice.stderr

    trial.fedsplit("certs", "other", "--host", "127.0.0.1")
    refused = trial.fedsplit("node", "start", "--superlink", trial.address, "--ca", "other/ca.crt", "--home", "member",
                             check=False)  # fmt: skip
    assert refused.returncode == 2

    trial.fedsplit("node", "init", "thief", "--device", "1")
    again = trial.fedsplit("server", "register", "thief/key.pub", "--superlink", "trial", check=False)
    assert again.returncode == 2 and "device 1 belongs to the key" in again.stderr
