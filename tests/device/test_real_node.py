"""A real node: what it needs of a run is its terms, and it is as small as its first layer."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blocked import EXTRA, without
from conftest import new_node, simulated_json, small_settings
from flwr.app import Context, Message, MessageType, RecordDict
from own import linear
from torch import nn

from fedsplit import SplitModel
from fedsplit.common.errors import ConfigError
from fedsplit.device.home import Home
from fedsplit.device.link import HOME
from fedsplit.device.nodes import real_node
from fedsplit.flower.grid import InProcessGrid
from fedsplit.flower.record import from_record, to_record
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from fedsplit.release.streams import simulation_secret
from fedsplit.runs.client_app import client_app
from fedsplit.runs.nodes import simulated_by, simulated_node, terms_by
from fedsplit.wire.exchange import Download, Registration, Upload

pytestmark = pytest.mark.slow  # starts processes

DEVICES = 5
FROZEN = {"first_layer": {"strategy": "frozen"}, "dropping": {"policy": "top-k", "k": 4, "mask": "keyed"}}
LIMITS = "equations = 1.0\nleverage = 1.0\nactive = 1.0\n"


def small_trunk() -> SplitModel:
    """About 100 thousand parameters."""
    return with_trunk(nn.Linear(10, 9_000), nn.Linear(9_000, 3))


def large_trunk() -> SplitModel:
    """About 80 million parameters."""
    return with_trunk(nn.Linear(10, 8_900), nn.Linear(8_900, 8_900), nn.Linear(8_900, 3))


def with_trunk(*trunk: nn.Module) -> SplitModel:
    torch.manual_seed(1)
    return SplitModel.from_sequential(nn.Sequential(nn.Linear(12, 10), nn.ReLU(), *trunk), (12,))


class Halved(nn.Module):
    """A layer of one's own, which no description says."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) / 2


def halved_model() -> SplitModel:
    return SplitModel.from_sequential(nn.Sequential(Halved(), nn.ReLU(), nn.Linear(10, 3)), (12,))


def written(folder: Path, devices: list[int]) -> str:
    """Write devices' records as their owners have them."""
    folder.mkdir()
    for device in devices:
        train, test = linear(device, DEVICES).train, linear(device, DEVICES).test
        np.savez(folder / f"{device}.npz", x=train.x, y=train.y, x_test=test.x, y_test=test.y)
    return str(folder)


def made(folder: Path, devices: list[int], allow: tuple[str, ...] = ()) -> Home:
    home = Home.create(folder, devices, allow)
    (home.folder / "limits.toml").write_text(LIMITS)
    return home


PROCESS = """
import json, sys
from pathlib import Path
import numpy as np
from fedsplit.device.nodes import answer, real_node
from fedsplit.wire.exchange import Download, Upload

terms, home, data = sys.argv[1:]
weights = np.random.default_rng(1).normal(size=130).astype(np.float32)
asked = Download(1, 1, 0, False, weights, np.array([(0, 0, 0, 7)]), [])
found = answer(lambda: real_node(Path(terms).read_text(), home, data), "train", asked.to_bytes())
upload = Upload.from_bytes(found, parameters=130)
# ru_maxrss of a process that was just forked is its parent's: the kernel keeps this one from exec on
peak = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(json.dumps({"records": len(upload.release.counts), "megabytes": int(peak[0]) / 1000}))
"""


def exchange(builder: Callable[[], SplitModel], folder: Path) -> float:
    """Have a new process, in which no extra is installed, answer for a device; return its peak in megabytes."""
    name = f"test_real_node:{builder.__name__}"
    data = {"builder": None, "shape": [12], "task": "classification", "outputs": 3}
    experiment = Experiment(small_settings(model={"builder": name}, data=data, **FROZEN))
    folder.mkdir()
    (folder / "terms.json").write_text(experiment.terms.to_json())
    made(folder / "home", [0])
    command = [sys.executable, "-c", PROCESS, folder / "terms.json", folder / "home", written(folder / "data", [0])]
    env = {**without(EXTRA, folder / "hook"), "PYTHONPATH": str(folder / "hook")}
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["records"] == 7
    return float(found["megabytes"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell peaks of memory")
def test_a_node_is_as_large_as_its_first_layer(tmp_path: Path) -> None:
    few, many = exchange(small_trunk, tmp_path / "few"), exchange(large_trunk, tmp_path / "many")
    assert abs(many - few) < 60, f"trunk of 80 million parameters: {many:.0f} MB, of 100 thousand: {few:.0f} MB"


def ask(settings: Settings, rows: list[tuple[int, int, int, int]], number: int = 1) -> Download:
    layer = Experiment(settings).model.first_layer
    weights = layer.flatten(layer.initial_weights())
    return Download(1, number, 0, False, weights, np.array(rows), [])


HALVED = "test_real_node:halved_model"


@pytest.mark.parametrize("builder", ["own:linear_model", "own:tanh_model", "own:gelu_model", HALVED])
def test_a_real_node_releases_what_a_simulated_one_does(builder: str, tmp_path: Path) -> None:
    """With the secret of a simulation, to the last byte."""
    settings = small_settings(
        model={"builder": builder},
        protocol={"dtype": "float16"},
        first_layer={"strategy": "frozen"},
        dropping={"policy": "at-most", "k": 4, "mask": "keyed"},
    )
    home = made(tmp_path / "home", [1, 4], ("own:linear", HALVED))
    for device in (1, 4):
        (home.folder / f"secret-{device}").write_bytes(simulation_secret(settings.run.seed, device))
        (home.folder / f"secret-{device}").chmod(0o600)
    simulated = new_node(settings, 0, 1, tmp_path / "run" / "nodes")
    terms = Experiment(settings).terms.to_json()
    nodes = [real_node(terms, str(home.folder), data) for data in (None, written(tmp_path / "data", [1, 4]))]
    trained, tested = ask(settings, [(1, 0, 0, 10), (4, 0, 0, 19)]), ask(settings, [(4, 0, 0, 6)])
    for node, (kind, download) in product(nodes, (("train", trained), ("evaluate", tested))):
        answers = [each.answer(kind, download.to_bytes()) for each in (node, simulated)]
        ours, theirs = (Upload.from_bytes(found, parameters=len(download.weights)).release for found in answers)
        assert len(ours.counts) and [a.tobytes() for a in ours.arrays()] == [a.tobytes() for a in theirs.arrays()]


def test_owners_records_may_test_everywhere(tmp_path: Path) -> None:
    """Nobody looks for test records on devices of other nodes."""
    settings = small_settings(devices={"test": "all"}, **FROZEN)
    made(tmp_path / "home", [2], ("own:linear",))
    node = real_node(Experiment(settings).terms.to_json(), str(tmp_path / "home"), written(tmp_path / "data", [2]))
    registration = node.register()
    assert registration.devices.tolist() == [2] and registration.test.tolist() == [6]


def test_the_limits_are_held_against_the_terms(tmp_path: Path) -> None:
    home = made(tmp_path / "home", [0], ("own:linear",))
    with pytest.raises(ConfigError, match="first-layer gradients would leave, gradients is false"):
        real_node(Experiment(small_settings()).terms.to_json(), str(home.folder))


def changed(settings: Settings, section: str, **values: Any) -> str:
    terms = json.loads(Experiment(settings).terms.to_json())
    terms[section] |= values
    return json.dumps(terms)


def test_code_and_folders_are_the_owners_to_allow(tmp_path: Path) -> None:
    home = made(tmp_path / "home", [0], ("own:linear_model",))
    built = {"builder": "own:gelu_model", "input_shape": [12]}
    nobody = small_settings(data={"builder": None, "shape": [12], "outputs": 3}, **FROZEN)
    for terms, said in (
        (changed(small_settings(**FROZEN), "data"), "data.builder 'own:linear'"),
        (changed(nobody, "data", builder="os:getcwd"), "data.builder 'os:getcwd'"),
        (changed(nobody, "data", folder="/etc"), "data.folder '/etc'"),
        (changed(nobody, "model", dropping={"policy": "own:P", "fields": {}}), "dropping.policy 'own:P'"),
        (changed(nobody, "model", layer=built), "model.builder 'own:gelu_model'"),
        (changed(nobody, "model", task="own:Task"), "data.task 'own:Task'"),
    ):
        with pytest.raises(ConfigError, match=f"{said} is not among what the node's owner allows"):
            real_node(terms, str(home.folder))


def test_records_of_another_shape_are_refused(tmp_path: Path) -> None:
    home = made(tmp_path / "home", [0], ("own:linear",))
    layer = json.loads(Experiment(small_settings(**FROZEN)).terms.to_json())["model"]["layer"]
    layer |= {"arguments": {"in_features": 13, "out_features": 10}, "input_shape": [13]}
    with pytest.raises(ConfigError, match=r"takes records of shape \(13,\), the data's have \(12,\)"):
        real_node(changed(small_settings(**FROZEN), "model", layer=layer), str(home.folder))


def test_a_settings_file_means_the_same_terms(tmp_path: Path) -> None:
    """As a plain flwr run names it; then the model's code runs on the node, if its owner allows it."""
    settings = small_settings(**FROZEN)
    (tmp_path / "small.toml").write_text(settings.to_toml())
    path = str(tmp_path / "small.toml")
    home = made(tmp_path / "home", [0], ("own:linear", "own:linear_model"))
    assert terms_by(path, str(home.folder)) == Experiment(settings).terms.to_json()
    assert simulated_by(path) == simulated_json(settings)
    stricter = made(tmp_path / "stricter", [0], ("own:linear",))
    with pytest.raises(
        ConfigError, match=r"model\.builder 'own:linear_model' is not among what the node's owner allows"
    ):
        terms_by(path, str(stricter.folder))


def test_of_a_settings_file_no_folder_is_opened_that_is_not_allowed(tmp_path: Path) -> None:
    settings = small_settings(**FROZEN, data={"builder": None, "folder": str(tmp_path / "private"), "outputs": 3})
    (tmp_path / "small.toml").write_text(settings.to_toml())
    home = made(tmp_path / "home", [0], ("own:linear", "own:linear_model"))
    with pytest.raises(ConfigError, match=r"data\.folder '.*private' is not among what the node's owner allows"):
        terms_by(str(tmp_path / "small.toml"), str(home.folder))


def test_the_app_reads_no_settings_file_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with it would be told to the server."""
    (tmp_path / "app").mkdir()
    (tmp_path / "own.toml").write_text("secret = 12345")
    monkeypatch.setattr("fedsplit.runs.client_app.APP_FOLDER", tmp_path / "app")
    home = made(tmp_path / "home", [1])
    app = client_app()
    InProcessGrid(app, 5)
    for path in ("../own.toml", str(tmp_path / "own.toml")):
        context = Context(1, 7, {HOME: str(home.folder)}, RecordDict(), {"config": path})
        with pytest.raises(ConfigError, match="must be in the app"):
            app(Message(to_record(b""), 7, MessageType.QUERY, ttl=100.0), context)


def test_a_simulated_node_builds_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = simulated_json(small_settings())
    monkeypatch.setattr("fedsplit.plan.experiment._built", lambda name: pytest.fail("a trunk is built"))
    assert simulated_node(told, 0, 5, str(tmp_path / "run" / "nodes")).first_layer.size == 130


@pytest.mark.parametrize("real", [False, True])
def test_the_app_answers_where_a_run_config_names_a_settings_file(
    real: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a plain flwr run does."""
    (tmp_path / "small.toml").write_text(small_settings(**FROZEN).to_toml())
    home = made(tmp_path / "home", [1], ("own:linear", "own:linear_model"))
    monkeypatch.setattr("fedsplit.runs.client_app.STATE_FOLDER", tmp_path / "state")
    monkeypatch.setattr("fedsplit.runs.client_app.APP_FOLDER", tmp_path)
    own = {HOME: str(home.folder)} if real else {"partition-id": 1, "num-partitions": 5}
    context = Context(1, 7, own, RecordDict(), {"config": str(tmp_path / "small.toml")})
    app = client_app()
    InProcessGrid(app, 5)  # which says who this process is: else there is no message
    reply = app(Message(to_record(b""), 7, MessageType.QUERY, ttl=100.0), context)
    assert Registration.from_bytes(from_record(reply.content)).devices.tolist() == [1]
