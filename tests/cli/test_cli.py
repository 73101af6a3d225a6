"""The command line: a mistake is one line and exit code 2, a run leaves its folder behind, records stay out of logs."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import own
import pytest
from conftest import CONFIGS, simulated_json, small_settings
from safetensors.numpy import load_file

from fedsplit import simulate
from fedsplit.common.errors import RunError
from fedsplit.data import Records
from fedsplit.data import loading as loading_module
from fedsplit.data.pooled import load_pool
from fedsplit.device.node import Node
from fedsplit.flower.grid import InProcessGrid
from fedsplit.plan.settings import load_settings
from fedsplit.runs.client_app import client_app
from fedsplit.runs.folder import open_run_folder
from fedsplit.runs.training import TrainingRun

SECRET = 7654.25  # a record's value: no error text may hold it
RESULT_KEYS = {
    *("test_accuracy", "test_loss", "test_f1", "rounds", "devices", "nodes", "exchanges", "samples"),
    *("samples_per_second", "seconds", "bytes_up", "bytes_down", "dense_bytes_up", "exposures_max", "seed", "versions"),
    *("test_exposures_max", "ledger", "guard"),
}
Main = Callable[..., str]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(small_settings().to_toml())
    return path


@pytest.fixture
def main(main: Callable[..., None]) -> Callable[..., None]:
    return partial(main, "simulate")


def sets(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


# --- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (sets("protocol.batchsize=3"), ["protocol.batchsize: unknown key", "'protocol.batch-size'"]),
        (["--engine", "dask"], ["run.engine", "'ray' or 'inline'", "got 'dask'"]),
        (sets("run.rounds"), ["--set must look like section.key=value", "got 'run.rounds'"]),
        (sets("model.builder=own:no"), ["model.builder 'own:no'", "module own has no function 'no'"]),
        (sets("model.builder=no_such_module:f"), ["model.builder", "there is no module 'no_such_module'"]),
        (sets("model.builder=own"), ["model.builder must be 'module:function'", "got 'own'"]),
        (sets("model.builder=own:not_a_model"), ["'own:not_a_model' must return a SplitModel, not Tensor"]),
        (sets("dropping.policy=top-k", "dropping.k=11"), ["k must be at most 10", "got 11"]),
        (
            sets("first-layer.args={fraction_train=7.5}", "first-layer.strategy=FedAdam"),
            ["no 'fraction_train'", "it takes beta_1, beta_2, tau"],
        ),
        (sets("model.builder=own:conv1d_model"), ["records of shape (2, 16), the data's have (12,)"]),
        (sets("data.outputs=4"), ["the trunk must return 4 outputs per record", "(3,)"]),
        (
            sets("first-layer.args={etaa=1}"),
            ["first-layer.args: FedAvg takes no 'etaa'", "it takes none"],
        ),
        (sets("data.builder=own:no"), ["data.builder 'own:no'", "module own has no function 'no'"]),
        (sets("data.name=digits"), ["exactly one of name, folder, builder", "got name and builder"]),
        (sets("devices.test=[1,9]"), ["test names device 9", "0..4"]),
        (sets("devices.test=9"), ["test must be in 0..5", "got 9"]),
        (sets("dropping.policy=units", "dropping.k=9"), ["policy 'units' sends all outputs: k must be 10", "got 9"]),
        (
            sets("dropping.policy=bits", "dropping.bits=2", "model.builder=own:tanh_model"),
            ["policy 'bits' needs the activation relu"],
        ),
        (sets("protocol.mode=release-once"), ["'release-once' needs a [public] section with epochs of at least 1"]),
        (sets("public.devices=[0,3]"), ["public.devices: device 3 is a test device"]),
        (sets("public.devices=[5]"), ["public.devices: device 5 does not exist", "0..4"]),
        (sets("public.file=no.npz"), ["public file no.npz: cannot be read", "FileNotFoundError"]),
        (sets("data.overlap=false"), ["overlap = false is for the data set 'wearables', not for a builder"]),
        (sets("guard.limits=no.toml", "guard.mode=enforce"), ["limits file no.toml: No such file or directory"]),
        (sets("guard.mode=enforce"), ["the limits do not allow this run", "first-layer gradients would leave"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    refused: Main, file: Path, out: Path, arguments: list[str], parts: list[str]
) -> None:
    said = refused(file, "--out", out, *arguments)
    assert all(part in said for part in parts), said
    assert not out.exists()


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["data.name=digts"],
            ["one of wearables, pig-cvp, mnist, digits, breast-cancer", "got 'digts'", "mean 'digits'"],
        ),
        (["devices.count=3000"], ["partition 'iid' leaves device", "without records: use fewer devices"]),
        (
            ["devices.partition=dirichlet", "devices.alpha=0.001"],
            ["partition 'dirichlet' leaves device", "use fewer devices or a larger alpha"],
        ),
        (["model.name=sensor-cnn"], ["model 'sensor-cnn' takes records of 2 axes", "(64,)"]),
    ],
)
def test_settings_that_do_not_fit_a_data_set(refused: Main, out: Path, overrides: list[str], parts: list[str]) -> None:
    said = refused(CONFIGS / "digits.toml", "--out", out, "--engine", "inline", *sets(*overrides))
    assert all(part in said for part in parts), said


def test_settings_files_that_cannot_be_read(refused: Main, tmp_path: Path) -> None:
    assert "no.toml: No such file or directory" in refused(tmp_path / "no.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("[run\n")
    assert f"{bad}: not valid TOML: " in refused(bad)


def test_a_data_file_that_is_damaged_or_missing(
    refused: Main, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_pool.cache_clear()
    copy = tmp_path / "mnist_5k.csv.gz"
    copy.write_bytes(b"\x1f\x8b" + bytes(100))
    monkeypatch.setattr(loading_module, "installed_file", lambda *a, **k: copy)
    command = (CONFIGS / "mnist.toml", "--out", out, "--engine", "inline")
    said = refused(*command)
    assert f"{copy}: damaged or of another version: expected SHA-256 " in said and ", found " in said
    copy.unlink()
    assert f"{copy}: cannot be read (FileNotFoundError)" in refused(*command)
    assert not out.exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three devices' files."""
    path = tmp_path / "devices"
    path.mkdir()
    for name in "abc":
        write_device(path / f"hospital-{name}.npz")
    return path


def write_device(path: Path, x: Any = None) -> None:
    rng = np.random.default_rng(1)
    train = {"x": rng.normal(size=(9, 12)) if x is None else x, "y": np.arange(9) % 3}
    np.savez(path, **train, x_test=rng.normal(size=(3, 12)), y_test=np.arange(3))


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (np.nan, "train: x holds NaN, infinity"),
        (np.inf, "train: x holds NaN, infinity"),
        (None, "train: records must have shape (12,), got (11,)"),
    ],
)
def test_bad_records_name_device_and_file_and_no_value(
    refused: Main, folder: Path, out: Path, bad: float | None, text: str
) -> None:
    x = np.full((9, 11 if bad is None else 12), SECRET)
    if bad is not None:
        x[4, 5] = bad
    write_device(folder / "hospital-b.npz", x)
    said = refused(CONFIGS / "own-data.toml", "--out", out, "--engine", "inline", *sets(f'data.folder="{folder}"'))
    assert f"device 1 (hospital-b.npz), {text}" in said
    assert "7654" not in said and not out.exists()


def test_a_folder_of_files_trains(main: Callable[..., None], folder: Path, out: Path) -> None:
    """What is refused above is refused for its records and nothing else."""
    overrides = sets(f'data.folder="{folder}"', "run.rounds=2")
    main(CONFIGS / "own-data.toml", "--out", out, "--engine", "inline", *overrides)
    result = json.loads((out / "result.json").read_text())
    assert (result["devices"], result["rounds"]) == (3, 2)


def test_out_folders_that_cannot_be_used(refused: Main, file: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    thing = full / "thing"
    thing.write_text("mine")
    assert f"out folder {full} is not empty" in refused(file, "--out", full)
    assert f"out folder {thing}/below cannot be written: Not a directory" in refused(file, "--out", thing / "below")
    assert f"out folder {thing} is a file" in refused(file, "--out", thing)
    assert [path.name for path in full.iterdir()] == ["thing"] and thing.read_text() == "mine"


def test_resume_that_cannot_be(refused: Main, file: Path, out: Path) -> None:
    assert f"nothing to resume: {out}/config.toml does not exist" in refused(file, "--out", out, "--resume")
    assert not out.exists()
    assert "--resume needs --out" in refused(file, "--resume")


def test_resume_with_other_settings_names_the_key_and_both_values(refused: Main, file: Path, out: Path) -> None:
    open_run_folder(out, small_settings(), resume=False)
    said = refused(file, "--out", out, "--resume", *sets("trunk.lr=0.25"))
    assert "cannot resume with other settings: trunk.lr was 0.1, is 0.25" in said


def test_more_nodes_than_devices(out: Path) -> None:
    settings = small_settings()
    open_run_folder(out, settings, resume=False)
    grid = InProcessGrid(client_app(simulated_json(settings), str(out / "nodes")), 6)
    with pytest.raises(RunError, match=r"^6 nodes for 5 devices: lower the number of nodes$"):
        TrainingRun(settings, out).train(grid)


# --- a device that fails in the middle -------------------------------------------------------------------------


def test_a_device_that_raises_sits_out_and_its_records_stay_out_of_all_text(
    main: Callable[..., None],
    file: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    records, asked = Node._records, []

    def failing(node: Node, device: int, *, test: bool) -> Records:
        found = records(node, device, test=test)
        asked.append((device, test))
        # in pipelined mode a device's records are looked up once to release and once more for the backward half
        if device == 1 and asked.count((1, False)) == 3:
            raise ValueError(f"cannot use {found.x.tolist()} of {SECRET}")
        return found

    monkeypatch.setattr(Node, "_records", failing)
    main(file, "--out", out, "--json", *sets("run.evaluate-every=1", "protocol.min-nodes=3"))
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["rounds"] == 4 and len((out / "metrics.jsonl").read_text().splitlines()) == 4
    sizes = [len(own.linear(device, 5).train) for device in range(5)]
    assert result["samples"] == 4 * sum(sizes) - sizes[1]
    logged = caplog.text + said.err
    assert "device 1 sits out a round (ValueError)" in logged
    values = own.linear(1, 5).train.x.ravel()
    for text in (logged, said.out, *(path.read_text() for path in (out / "metrics.jsonl", out / "result.json"))):
        assert "7654" not in text and "cannot use" not in text
        assert not any(repr(float(value)) in text for value in values)


# --- what a run leaves behind ----------------------------------------------------------------------------------


def test_json_is_one_object_and_the_folder_holds_the_run(
    main: Callable[..., None], file: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(file, "--out", out, "--json", *sets("run.rounds=3"))
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    result = json.loads(said)
    assert set(result) >= RESULT_KEYS
    assert set(result["seconds"]) == {"startup", "training", "total"}
    assert (result["rounds"], result["devices"], result["nodes"], result["seed"]) == (3, 5, 5, 3)
    assert set(result["ledger"]) >= {"releases", "equations", "bits", "leverage", "epsilon", "delta", "dfil"}
    # rounds 1 and 2 are of the same weights: the same bytes again are nothing new
    assert result["ledger"]["releases"] == result["exposures_max"] == 2
    assert result["ledger"]["epsilon"] == "unbounded"
    assert result["guard"]["mode"] == "observe"
    assert len(result["test_f1"]) == 3 and 0 <= result["test_accuracy"] <= 1 and result["test_loss"] > 0
    assert result["samples"] == 3 * sum(len(own.linear(device, 5).train) for device in range(5))
    assert set(result["versions"]) >= {"fedsplit", "flwr", "torch", "numpy", "python"}
    assert json.loads((out / "result.json").read_text()) == result
    assert load_settings(out / "config.toml") == small_settings(run={"rounds": 3})
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in metrics] == [1, 2, 3]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    first = load_file(out / "checkpoint" / "first_layer.safetensors")
    assert {name: w.shape for name, w in first.items()} == {"weight": (10, 12), "bias": (10,)}
    trunk = load_file(out / "checkpoint" / "trunk.safetensors")
    assert [w.shape for w in trunk.values() if w.ndim == 2] == [(8, 10), (3, 8)]
    assert not (out / "nodes").exists()


def test_without_json_the_result_is_a_table(
    main: Callable[..., None], file: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(file, "--out", out, *sets("run.rounds=1"))
    said = capsys.readouterr().out
    words = ("test_accuracy", "exposures_max", "bytes_up", "small: 1 rounds, 5 devices", "equations about a record")
    for word in words:
        assert word in said
    with pytest.raises(json.JSONDecodeError):
        json.loads(said)


def test_the_default_folder_is_named_after_the_run(
    main: Callable[..., None], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(file, *sets("run.rounds=1", "run.name=mine"))
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("mine-") and (folder / "result.json").exists()


def test_resuming_a_finished_run_changes_nothing(out: Path) -> None:
    settings = small_settings(run={"rounds": 2})
    first = simulate(settings, out=out)
    metrics = (out / "metrics.jsonl").read_text()
    again = simulate(settings, out=out, resume=True)
    same = RESULT_KEYS - {"seconds", "samples_per_second"}
    assert {key: again[key] for key in same} == {key: first[key] for key in same}
    assert (out / "metrics.jsonl").read_text() == metrics


# --- the installed command -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_installed_command_refuses_in_one_line(file: Path, out: Path) -> None:
    command = [str(Path(sys.executable).parent / "fedsplit"), "simulate", str(file), "--out", str(out)]
    done = subprocess.run([*command, *sets("run.rounds=0")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "fedsplit: run.rounds: should be greater than or equal to 1, got 0\n"


@pytest.mark.slow
def test_the_installed_command_finds_a_function_beside_the_settings(tmp_path: Path, out: Path) -> None:
    (tmp_path / "beside.py").write_text(Path(own.__file__).read_text())
    builders = {"data": {"builder": "beside:linear"}, "model": {"builder": "beside:linear_model"}}
    (tmp_path / "small.toml").write_text(small_settings(run={"rounds": 1}, **builders).to_toml())
    command = [str(Path(sys.executable).parent / "fedsplit"), "simulate", str(tmp_path / "small.toml")]
    done = subprocess.run([*command, "--out", str(out), "--json"], capture_output=True, text=True, timeout=60, cwd="/")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rounds"] == 1
    assert "Traceback" not in done.stderr
