"""Runs that are interrupted, and their checkpoints: one that is resumed ends as a whole one."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, simulated_json, small_settings
from references import largest_difference, trained

from fedsplit import simulate
from fedsplit.common.errors import ConfigError, RunError
from fedsplit.flower.grid import InProcessGrid
from fedsplit.plan.settings import Settings
from fedsplit.runs.client_app import client_app
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.training import TrainingRun
from fedsplit.server.checkpoint import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]  # whole runs


def test_a_killed_run_resumes_bit_identically(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    rounds = ["--set", "run.rounds=12", "--engine", "inline"]
    command = [sys.executable, "-m", "fedsplit.cli", "simulate", str(CONFIGS / "wearables.toml"), *rounds, "--out"]
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = killed / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "result.json").exists()
    subprocess.run([*command, str(killed), "--resume"], check=True, capture_output=True)
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, killed)]
    for result in results:
        for clocked in ("seconds", "samples_per_second"):
            del result[clocked]
        del result["guard"]["refused"]  # what a resumed run sends again is nothing new, and not counted a second time
    results[1]["exchanges"] -= 10  # the resumed run registers its ten nodes again
    up = [r.pop("bytes_up") for r in results]
    assert 0 <= up[1] - up[0] < 2000
    assert results[0] == results[1]
    assert largest_difference(trained(whole), trained(killed)) == 0.0
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, killed)]
    assert [m["train_loss"] for m in lines[0]] == [m["train_loss"] for m in lines[1]]


@pytest.mark.parametrize(
    ("mode", "chunk"), [("synchronous", 4), ("pipelined", "epoch"), ("pipelined", 4), ("single-pass", "spread")]
)
def test_an_interrupted_run_resumes_exactly(mode: str, chunk: int | str, tmp_path: Path) -> None:
    settings = small_settings(
        run={"rounds": 6},
        dropping={"policy": "random", "keep": 0.5},
        protocol={"mode": mode, "chunk": chunk, "dtype": "float16"},
        first_layer={"strategy": "FedAdam", "lr": 0.01},
        trunk={"optimizer": "adam", "lr": 0.01},
    )
    whole = simulate(settings, out=tmp_path / "whole")

    def interrupt(metrics: dict[str, object]) -> None:
        if metrics["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(settings, out=tmp_path / "cut", report=interrupt)
    resumed = simulate(settings, out=tmp_path / "cut", resume=True)
    assert largest_difference(trained(tmp_path / "whole"), trained(tmp_path / "cut")) == 0.0
    for name in ("test_accuracy", "test_loss", "exposures_max", "test_exposures_max", "samples", "rounds"):
        assert resumed[name] == whole[name]


def interrupted(settings: Settings, out: Path, after: int) -> dict[str, Any]:
    """Return the result of a run that is stopped after a round and resumed."""

    def interrupt(metrics: dict[str, object]) -> None:
        if metrics["round"] == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(settings, out=out, report=interrupt)
    return simulate(settings, out=out, resume=True)


@pytest.mark.parametrize("mode", ["single-pass", "release-once"])
def test_replay_keeps_within_its_limit_and_a_resumed_run_forgets_the_same(mode: str, tmp_path: Path) -> None:
    """Of 65 records at about 50 bytes; in release-once 10 more are public, and stay."""
    once = {"public": {"devices": [1], "epochs": 1}} if mode == "release-once" else {}
    chunk = "spread" if mode == "single-pass" else 3
    settings = small_settings(
        run={"rounds": 6}, protocol={"mode": mode, "chunk": chunk}, trunk={"replay-mb": 0.0016}, **once
    )
    kept: list[dict[int, int]] = []

    def look(metrics: dict[str, Any]) -> None:
        replay = run.strategy.progress.replay
        files = sorted(path.name for path in run.folder.releases.glob("*.npz"))
        assert sum(b.nbytes for b in replay.values()) <= 1600
        assert files == sorted(f"{number:06d}-{len(b)}.npz" for number, b in replay.items())
        kept.append({number: len(b) for number, b in replay.items()})

    folder = tmp_path / "whole"
    RunFolder(folder).open(settings, resume=False)
    run = TrainingRun(settings, folder, look)
    whole = run.train(InProcessGrid(client_app(simulated_json(settings), str(folder / "nodes")), 5))
    last = kept[-1]
    assert 12 < sum(last.values()) < whole["samples"] and last.keys() - {0} == {n for n in last if n > 1}
    assert last[max(last)] > 0 and (last.get(0) == 10) == (mode == "release-once")
    for after in (3, 5):
        resumed = interrupted(settings, tmp_path / f"cut-{after}", after)
        assert largest_difference(trained(folder), trained(tmp_path / f"cut-{after}")) == 0.0
        assert resumed["test_loss"] == whole["test_loss"]
    free = simulate(
        small_settings(run={"rounds": 6}, protocol={"mode": mode, "chunk": chunk}, **once), out=tmp_path / "free"
    )
    assert free["test_loss"] != whole["test_loss"]


def test_public_records_that_take_more_than_replay_may_are_refused(tmp_path: Path) -> None:
    settings = small_settings(
        protocol={"mode": "release-once"}, public={"devices": [1], "epochs": 1}, trunk={"replay-mb": 0.0003}
    )
    with pytest.raises(ConfigError, match=r"trunk\.replay-mb must be at least 0\.000\d+, which public records take"):
        simulate(settings, out=tmp_path / "run")


def test_a_checkpoint_survives_two_kills(tmp_path: Path) -> None:
    """Killed between the two renames, and again while the next checkpoint is written."""
    settings = small_settings(run={"rounds": 6})
    whole = simulate(settings, out=tmp_path / "whole")

    def interrupt(metrics: dict[str, object]) -> None:
        if metrics["round"] == 3:
            raise KeyboardInterrupt

    run = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        simulate(settings, out=run, report=interrupt)
    (run / "checkpoint").rename(run / "checkpoint.new")
    (run / "checkpoint.old").mkdir()
    strategy = TrainingRun(settings, run).strategy
    assert load_checkpoint(run / "checkpoint", strategy) is not None
    (run / "checkpoint.new").mkdir(exist_ok=True)
    (run / "checkpoint.new" / "state.pt").write_bytes(b"half")
    assert simulate(settings, out=run, resume=True)["test_loss"] == whole["test_loss"]


def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """One that counts neither who was heard nor time."""

    def interrupt(metrics: dict[str, object]) -> None:
        raise KeyboardInterrupt

    simulate(small_settings(), out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        simulate(small_settings(), out=tmp_path / "cut", report=interrupt)
    path = tmp_path / "cut" / "checkpoint" / "state.pt"
    state = torch.load(path, weights_only=True)
    del state["heard"], state["pace"]
    torch.save(state, path)
    simulate(small_settings(), out=tmp_path / "cut", resume=True)
    assert largest_difference(trained(tmp_path / "cut"), trained(tmp_path / "whole")) == 0


@pytest.mark.parametrize("name", ["state.pt", "trunk.safetensors", "first_layer.safetensors"])
def test_a_damaged_checkpoint_is_named(name: str, tmp_path: Path) -> None:
    settings = small_settings()
    simulate(settings, out=tmp_path / "run")
    path = tmp_path / "run" / "checkpoint" / name
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(RunError, match=r"checkpoint .* is damaged"):
        simulate(settings, out=tmp_path / "run", resume=True)


def test_a_disk_that_is_full_is_told_and_the_run_resumes(tmp_path: Path) -> None:
    """As far as a process can be kept from writing: files may not grow."""
    whole = simulate(small_settings(), out=tmp_path / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(metrics: dict[str, object]) -> None:
        if metrics["round"] == 2:
            most = (tmp_path / "run" / "checkpoint" / "state.pt").stat().st_size // 2  # the nodes' files are smaller
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))

    try:
        told = r"cannot be written \(File too large\): the checkpoint of round 2 is the last"
        with pytest.raises(RunError, match=told):
            simulate(small_settings(), out=tmp_path / "run", report=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert simulate(small_settings(), out=tmp_path / "run", resume=True)["test_loss"] == whole["test_loss"]
