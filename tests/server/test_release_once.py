"""Mode release-once after a warm-up: what is exposed, what is learnt, and going on after an interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from digit_runs import Watched, digits, released, sizes, watch
from references import largest_difference, moved, trained

from fedsplit import simulate
from fedsplit.model.tasks import task_of
from fedsplit.plan.experiment import Experiment
from fedsplit.runs import observing
from fedsplit.server.warmup import (
    WarmUp,
    warm_up,
)

pytestmark = pytest.mark.usefixtures("quick")


# --- what is exposed and learnt --------------------------------------------------------------------------------


def exposures(folder: Path, ledger: str) -> list[int]:
    """How often each record that left has left, from the nodes' own files."""
    counts: list[int] = []
    for path in sorted((folder / "nodes").glob(f"*/*/ledger-{ledger}.npz")):
        with np.load(path) as file:
            counts += np.unique(file["sent"][:, 0], return_counts=True)[1].tolist()
    return counts


@pytest.mark.parametrize("policy", [{"policy": "top-k", "k": 6}, {"policy": "random", "keep": 0.3, "k": None}])
def test_release_once_exposes_every_record_once_and_then_is_silent(policy: dict[str, Any], out: Path) -> None:
    run, grid, exchanges = watch(digits(dropping=policy), out)
    assert run.result is not None
    private = sizes(run, range(2, 8))
    assert released(grid) == private
    assert run.result["samples"] == sum(private.values())
    assert run.result["exposures_max"] == run.result["test_exposures_max"] == 1
    assert exposures(out, "train") == [1] * sum(private.values())
    tested = sum(len(run.source.device(d).test) for d in (8, 9))
    assert exposures(out, "test") == [1] * tested
    # ten registrations and six messages, then nothing until the two test devices are asked
    assert exchanges == [16, 16, 16, 16, 18]
    assert [p for kind, p, _ in grid.sent if kind == "train"] == [2, 3, 4, 5, 6, 7]
    assert [p for kind, p, _ in grid.sent if kind == "evaluate"] == [8, 9]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["FedAdam", "frozen"])
def test_release_once_moves_no_first_layer_and_sends_no_gradients(strategy: str, out: Path) -> None:
    chosen = digits(first_layer={"strategy": strategy, "lr": 0.1}, protocol={"chunk": 40})
    run, grid, _ = watch(chosen, out)
    model = Experiment(chosen).model
    assert run.public is not None
    warm_up(
        model,
        run.public,
        task_of("classification"),
        Experiment(chosen).policy,
        WarmUp(4, 0.005, 64, 0.0),
        chosen.run.seed,
    )
    weights = model.first_layer.flatten(model.first_layer.initial_weights())
    assert len(grid.sent) > 20
    for _, _, download in grid.sent:
        assert np.array_equal(download.weights, weights)
        assert download.pending == ()
    assert all(len(upload.gradients.devices) == 0 for _, _, upload in grid.received)
    assert moved(chosen, trained(out)) > 0.01  # by the warm-up


@pytest.mark.parametrize("bits", [1, 3])
def test_bits_are_what_is_sent(bits: int, out: Path) -> None:
    run, grid, _ = watch(digits(dropping={"policy": "bits", "bits": bits, "k": None}), out)
    assert run.result is not None
    assert len(grid.received) == 8
    for _, _, upload in grid.received:
        assert upload.release.bits == bits
        assert 0 < upload.release.codes.min() <= upload.release.codes.max() < 2**bits
    # a bit of the pattern for each of 32 outputs, and codes that one bit does not need
    assert 32 < run.result["ledger"]["bits"] <= 32 + 32 * bits if bits > 1 else run.result["ledger"]["bits"] == 32


def test_release_once_in_chunks_is_silent_once_all_is_released(out: Path) -> None:
    run, grid, exchanges = watch(digits(run={"rounds": 7}, protocol={"chunk": 50}), out)
    private = sizes(run, range(2, 8))
    assert all(150 < n <= 200 for n in private.values())  # so that four rounds it takes
    assert released(grid) == private
    assert np.diff([10, *exchanges]).tolist() == [6, 6, 6, 6, 0, 0, 2]
    assert set(exposures(out, "train")) == {1}


@pytest.mark.slow
def test_release_once_learns_more_than_the_public_records_teach(out: Path) -> None:
    chosen = digits(
        run={"rounds": 20},
        devices={"count": 20, "per-node": 5, "test": 4},
        public={"devices": [0], "epochs": 10},
        trunk={"lr": 0.01},
    )
    result = simulate(chosen, out=out)
    assert result["test_accuracy"] > 0.7
    assert result["gain_over_public"] == pytest.approx(result["test_accuracy"] - result["public_only_accuracy"])
    assert result["gain_over_public"] > result["gain_interval"] > 0
    assert json.loads((out / "result.json").read_text())["public_only_accuracy"] == result["public_only_accuracy"]


@pytest.mark.slow
def test_without_private_records_the_gain_is_nothing(out: Path) -> None:
    """An independent run of the public-only model: no device that trains is there."""
    run, _, _ = watch(digits(protocol={"timeout": 0.1}), out, hidden=range(2, 8))
    assert run.result is not None and run.result["samples"] == 0
    assert (run.result["gain_over_public"], run.result["gain_interval"]) == (0.0, 0.0)
    alone = run.result["test_accuracy"]
    assert run.result["public_only_accuracy"] == alone
    other, _, _ = watch(digits(), out.with_name("whole"))
    assert other.result is not None
    assert other.result["public_only_accuracy"] == alone != other.result["test_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", ["epoch", 70])
def test_a_device_that_joins_late_is_welcome(chunk: int | str, out: Path) -> None:
    def join(round_number: int, grid: Watched) -> None:
        if round_number == 2:
            grid.hidden.clear()

    chosen = digits(run={"rounds": 6}, protocol={"timeout": 0.1, "chunk": chunk})
    run, grid, _ = watch(chosen, out, hidden=[5], after=join)
    assert run.result is not None
    rounds = {p: [d.round_number for kind, q, d in grid.sent if (kind, q) == ("train", p)] for p in range(10)}
    assert rounds[5] == ([3] if chunk == "epoch" else [3, 4, 5])
    assert rounds[4] == ([1] if chunk == "epoch" else [1, 2, 3])  # nobody is asked again because of it
    private = sizes(run, range(2, 8))
    assert released(grid) == private
    assert run.result["samples"] == sum(private.values())
    assert run.result["exposures_max"] == 1
    assert exposures(out, "train") == [1] * sum(private.values())


# --- going on after an interruption ----------------------------------------------------------------------------


COMPARED = (
    *("test_accuracy", "test_loss", "public_only_accuracy", "gain_over_public", "gain_interval"),
    *("exposures_max", "test_exposures_max", "samples", "rounds", "ledger", "guard"),
)


def assert_same_end(
    whole: dict[str, Any], resumed: dict[str, Any], folder: Path, names: Sequence[str] = COMPARED
) -> None:
    assert {name: resumed[name] for name in names} == {name: whole[name] for name in names}
    assert largest_difference(trained(folder / "whole"), trained(folder / "cut")) == 0.0


INTERRUPTED = [
    ({"mode": "release-once", "chunk": "epoch"}, {"policy": "top-k", "k": 6}),
    ({"mode": "release-once", "chunk": 50}, {"policy": "random", "keep": 0.3, "k": None}),
    ({"mode": "release-once", "chunk": 50}, {"policy": "none", "clip": 2.0, "noise": 2.0, "k": None}),
    ({"mode": "pipelined", "chunk": 50}, {"policy": "bits", "bits": 2, "k": None}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "policy"), INTERRUPTED)
def test_an_interrupted_run_resumes_exactly(protocol: dict[str, Any], policy: dict[str, Any], tmp_path: Path) -> None:
    chosen = digits(protocol=protocol, dropping=policy, first_layer={"strategy": "FedAdam", "lr": 0.01})
    whole = simulate(chosen, out=tmp_path / "whole")

    def interrupt(metrics: dict[str, Any]) -> None:
        if metrics["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(chosen, out=tmp_path / "cut", report=interrupt)
    resumed = simulate(chosen, out=tmp_path / "cut", resume=True)
    assert_same_end(whole, resumed, tmp_path)
    assert moved(chosen, trained(tmp_path / "cut")) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("killed_in", [1, 2, 5])
def test_what_left_before_its_round_was_saved_leaves_as_the_same_bytes(
    killed_in: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the devices' answers and before the checkpoint: asked again, they have nothing new to say."""
    chosen = digits(protocol={"chunk": 50}, dropping={"policy": "random", "keep": 0.3, "k": None})
    whole = simulate(chosen, out=tmp_path / "whole")
    saved = []

    def kill(*args: Any) -> None:
        saved.append(args)
        if len(saved) == killed_in:
            raise KeyboardInterrupt
        save(*args)

    save = observing.save_checkpoint
    monkeypatch.setattr(observing, "save_checkpoint", kill)
    with pytest.raises(KeyboardInterrupt):
        simulate(chosen, out=tmp_path / "cut")
    monkeypatch.setattr(observing, "save_checkpoint", save)
    resumed = simulate(chosen, out=tmp_path / "cut", resume=True)
    # what is nothing new is not refused a second time, so that its refusals are in no answer that was kept
    assert_same_end(whole, resumed, tmp_path, [name for name in COMPARED if name != "guard"])


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(tmp_path: Path) -> None:
    file = tmp_path / "digits.toml"
    file.write_text(digits(run={"rounds": 24}, protocol={"chunk": 8}).to_toml())
    command = [sys.executable, "-m", "fedsplit.cli", "simulate", str(file), "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    process = subprocess.Popen([*command, str(tmp_path / "cut")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, deadline = tmp_path / "cut" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "result.json").exists()
    subprocess.run([*command, str(tmp_path / "cut"), "--resume"], check=True, capture_output=True)
    whole, cut = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "cut"))
    assert_same_end(whole, cut, tmp_path)
