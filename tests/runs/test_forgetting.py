"""Forgetting a device: what is left of its records in the files of a run is nothing, or the folder is as it was."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_settings

from fedsplit import simulate
from fedsplit.audit.transcript import Subjects, exchanges
from fedsplit.common.errors import ConfigError, RunError
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings, check_settings
from fedsplit.runs.auditing import audit_run
from fedsplit.runs.folder import Holds, RunFolder
from fedsplit.runs.following import working
from fedsplit.runs.forgetting import Forgotten, forget_device
from fedsplit.server import checkpoint

pytestmark = pytest.mark.slow  # trains and attacks whole runs

DEVICE = 4
LIMITS = "releases = 50\nequations = 1.0\nleverage = 1.0\nrefusals = 10000\n" + (
    "gradients = true\ngradient-records = 2\ngradient-share = 1.0\ngradient-leverage = 1.0\n"
)


def digits(folder: Path, **changes: dict[str, Any]) -> Settings:
    (folder / "limits.toml").write_text(LIMITS)
    raw: dict[str, Any] = {
        "run": {"name": "forgetful", "rounds": 3, "engine": "inline"},
        "data": {"name": "digits"},
        "devices": {"count": 12, "per-node": 3, "partition": "iid", "test": 2},
        "public": {"devices": [0, 1], "epochs": 0},
        "model": {"name": "mlp", "width": 48, "activation": "tanh"},
        "dropping": {"policy": "random", "keep": 0.1},
        "protocol": {"mode": "pipelined", "chunk": 30},
        "guard": {"mode": "enforce", "limits": str(folder / "limits.toml")},
        "audit": {"targets": 40},
    }
    return check_settings({key: {**raw.get(key, {}), **changes.get(key, {})} for key in raw | changes})


def stopped(settings: Settings, folder: Path, after: int) -> None:
    def stop(metrics: dict[str, Any]) -> None:
        if metrics["round"] == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(settings, out=folder, report=stop)


def pipelined(folder: Path) -> Path:
    """A run that was stopped: with pending gradients, its nodes' state, and an audit."""
    stopped(digits(folder), folder / "run", 2)
    audit_run(folder / "run", seed=0, quick=True)
    return folder / "run"


def single_pass(folder: Path) -> Path:
    """A run on a virtual clock that came to its end: with releases for replay and a table of devices."""
    profile = {"uplink": 1.0, "downlink": 1.0, "release-seconds": 1e-3, "gradient-seconds": 1e-3}
    mode = {"mode": "single-pass", "chunk": "spread"}
    observed = {"mode": "observe"}
    simulate(digits(folder, devices={"profile": profile}, protocol=mode, guard=observed), out=folder / "run")
    audit_run(folder / "run", seed=0, quick=True)
    return folder / "run"


# ---------------------------------------------------------------------------- what a device's bytes are


def contents(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes, and of an archive those of its members."""
    found = path.read_bytes()
    yield found
    if zipfile.is_zipfile(BytesIO(found)):
        with zipfile.ZipFile(BytesIO(found)) as archive:
            yield from (archive.read(name) for name in archive.namelist())


def needles(run: Path) -> set[bytes]:
    """Bytes of the device's records, and of all that was computed of one alone; none shorter than 6."""
    folder, records = RunFolder(run), Experiment(RunFolder(run).settings()).source.device(DEVICE).train
    found = [row.tobytes() for row in records.x]
    for path in folder.releases.glob("*.npz"):
        with np.load(path) as file:
            starts, values = file["starts"], file["values"]
            for i in np.flatnonzero(file["devices"] == DEVICE):
                mine = values[starts[i] : starts[i + 1]]
                found += [mine.tobytes(), mine.astype(np.float16).tobytes()]
    for block in torch.load(folder.checkpoint / checkpoint.STATE, weights_only=True)["pending"]:
        devices, lengths, codes = (block[name]["__array__"].numpy() for name in ("devices", "lengths", "codes"))
        found.append(codes[np.repeat(devices == DEVICE, lengths)].tobytes())
    for path in folder.states.rglob("pending-*.npz"):
        with np.load(path) as file:
            of_values = np.repeat(np.repeat(file["devices"] == DEVICE, file["records"]), file["counts"])
            found.append(file["slopes"][of_values].tobytes())
    layer = Experiment(RunFolder(run).settings()).model.first_layer
    for exchange in exchanges(folder.recordings, layer.size):
        release = exchange.upload.release
        ends = np.cumsum(release.counts)
        for i in np.flatnonzero(exchange.owners == DEVICE):
            found.append(release.codes[ends[i] - release.counts[i] : ends[i]].tobytes())
    return {needle for needle in found if len(needle) >= 6}


def holding(run: Path, sought: set[bytes]) -> set[str]:
    """Return the files in which any of the bytes are, by the name of what they are in."""
    paths = [path for path in run.rglob("*") if path.is_file()]
    return {
        path.relative_to(run).parts[0]
        for path in paths
        if any(needle in content for content in contents(path) for needle in sought)
    }


def numbering(run: Path) -> set[str]:
    """Return the files in which a number names one of the device's records: ledgers, and what is kept beside them."""
    found = set()
    for path in RunFolder(run).states.rglob("*.npz"):
        with np.load(path) as file:
            arrays = [file[name] for name in file.files]
        numbers = [a["record"] if a.dtype.names else a for a in arrays if a.dtype.names or a.dtype == np.int64]
        if any((array >> 32 == DEVICE).any() for array in numbers):
            found.add(path.parent.name if path.parent.suffix else path.name)
    return found


def has_row(run: Path) -> set[str]:
    folder = RunFolder(run)
    found = {"nodes.json" for row in folder.node_rows() if DEVICE in range_of(row["devices"])}
    if folder.devices.exists() and any(line.startswith(f"{DEVICE},") for line in folder.devices.read_text().split()):
        found.add("devices.csv")
    return found


def range_of(devices: str) -> list[int]:
    ends = [part.split("-") for part in devices.split(", ")]
    return [i for each in ends for i in range(int(each[0]), int(each[-1]) + 1)]


def state_of(run: Path) -> dict[str, str]:
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in sorted(run.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(
    ("filled", "held"),
    [
        (pipelined, {"audit", "checkpoint", "nodes"}),
        (single_pass, {"audit", "releases"}),
    ],
)
def test_no_file_holds_anything_of_a_forgotten_device(
    filled: Callable[[Path], Path], held: set[str], tmp_path: Path
) -> None:
    run = filled(tmp_path)
    folder, sought = RunFolder(run), needles(run)
    (run / ".audit.html.4711").write_text("half of a page, of a process that was killed")
    (run / "notes.txt").write_text("mine")
    assert holding(run, sought) == held
    rows = has_row(run)
    assert rows == {"nodes.json"} | ({"devices.csv"} if "releases" in held else set())
    ledgers = {"ledger-train.npz", "ledger-train.history"} if "nodes" in held else set()
    assert numbering(run) == ledgers
    gone = forget_device(run, DEVICE)
    assert holding(run, sought) == set() and has_row(run) == set() and numbering(run) == set()
    assert not any(path.exists() for path in (folder.recordings, folder.report, folder.page, run / ".audit.html.4711"))
    assert gone.unknown == ("notes.txt",) and {"audit/", "audit.json", "audit.html"} <= set(gone.others)
    assert {f"its row in {name}" for name in rows} <= set(gone.others)
    with pytest.raises(ConfigError, match=f"holds nothing of device {DEVICE}: nothing was changed"):
        forget_device(run, DEVICE)


def test_the_others_stay_and_the_run_goes_on(tmp_path: Path) -> None:
    run = pipelined(tmp_path)
    folder = RunFolder(run)

    def pending() -> dict[int, int]:
        blocks = torch.load(folder.checkpoint / checkpoint.STATE, weights_only=True)["pending"]
        pairs = [(b["devices"]["__array__"].tolist(), b["records"]["__array__"].tolist()) for b in blocks]
        return {d: n for devices, records in pairs for d, n in zip(devices, records, strict=True)}

    before = pending()
    assert DEVICE in before and len(before) > 3
    gone = forget_device(run, DEVICE)
    assert pending() == {d: n for d, n in before.items() if d != DEVICE}
    assert f"gradients that {before[DEVICE]} records wait for" in gone.others
    assert "the simulated device's ledger" in gone.others and "the simulated device's pending chunks" in gone.others
    result = simulate(digits(tmp_path), out=run, resume=True)
    assert result["rounds"] == 3 and result["failures"] == 0


def test_a_device_that_has_nothing_changes_nothing(refused: Callable[..., str], tmp_path: Path) -> None:
    run = pipelined(tmp_path)
    before = state_of(run)
    assert "holds nothing of device 99: nothing was changed" in refused("forget", 99, run)
    assert state_of(run) == before


def test_all_is_said_in_few_lines(
    main: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = single_pass(tmp_path)
    capsys.readouterr()
    main("forget", DEVICE, run)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("removed ") and "records of device 4 from" in said[0]
    assert said[1] == "removed, too: audit/, audit.json, audit.html, its row in nodes.json, its row in devices.csv"
    assert len(said) == 2


def test_a_damaged_file_is_told_and_nothing_changes(tmp_path: Path) -> None:
    run = pipelined(tmp_path)
    ledger = next(iter(RunFolder(run).states.glob("*/1/ledger-train.npz")))
    ledger.write_bytes(ledger.read_bytes()[:-1])
    before = state_of(run)
    with pytest.raises(RunError, match=r"ledger-train.npz, or the history beside it, is damaged"):
        forget_device(run, DEVICE)
    assert state_of(run) == before


def test_nobody_is_forgotten_while_a_process_works_there(tmp_path: Path) -> None:
    simulate(small_settings(), out=tmp_path / "run")
    with working(tmp_path / "run"):
        command = [sys.executable, "-m", "fedsplit.cli", "forget", "1", str(tmp_path / "run")]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "999"}
        )
    assert done.returncode == 2 and "another process works in" in done.stderr


@pytest.mark.parametrize("whole", ["checkpoint.new", "checkpoint.old"])
def test_a_checkpoint_between_two_renames_is_found(whole: str, tmp_path: Path) -> None:
    stopped(digits(tmp_path), tmp_path / "run", 2)
    folder = RunFolder(tmp_path / "run")
    folder.checkpoint.rename(folder.checkpoint_old)
    if whole == "checkpoint.new":
        folder.checkpoint_old.rename(folder.checkpoint_new)
        folder.checkpoint_old.mkdir()
    sought = {needle for needle in (row for row in _pending_bytes(folder.path / whole)) if needle}
    assert holding(folder.path, sought) == {whole}
    assert isinstance(forget_device(folder.path, DEVICE), Forgotten)
    assert holding(folder.path, sought) == set() and folder.checkpoint.exists()
    assert not folder.checkpoint_new.exists() and not folder.checkpoint_old.exists()


def _pending_bytes(folder: Path) -> Iterator[bytes]:
    for block in torch.load(folder / checkpoint.STATE, weights_only=True)["pending"]:
        devices, lengths, codes = (block[name]["__array__"].numpy() for name in ("devices", "lengths", "codes"))
        yield codes[np.repeat(devices == DEVICE, lengths)].tobytes()


def test_recordings_of_earlier_versions_say_nobody_and_go(tmp_path: Path) -> None:
    """They do not say whose they are: what may hold a device's records goes with them."""
    run = pipelined(tmp_path)
    folder = RunFolder(run)
    report = json.loads(folder.report.read_text())
    del report["devices"]
    folder.report.write_text(json.dumps(report))
    forget_device(run, 99)
    assert not folder.report.exists() and not folder.page.exists() and folder.recordings.exists()


def test_the_devices_of_recordings_are_all_whose_records_are_there(tmp_path: Path) -> None:
    run = pipelined(tmp_path)
    assert Subjects.load(RunFolder(run).recordings).devices.tolist() == [*range(10)]  # donors and private ones


def test_every_file_that_a_run_writes_is_listed(tmp_path: Path) -> None:
    names = {entry.name for entry in RunFolder.files().values()}
    for filled in (pipelined, single_pass):
        place = tmp_path / filled.__name__
        place.mkdir()
        assert {path.name for path in filled(place).iterdir()} <= names
    told = (
        (Path(__file__).parents[2] / "docs" / "design" / "privacy.md")
        .read_text()
        .partition("## What forgetting removes")[2]
    )
    held = {entry.name for entry in RunFolder.files().values() if entry.holds in (Holds.RECORDS, Holds.ROWS)}
    assert all(f"`{name}" in told for name in held)
    beside = {checkpoint.NEW, checkpoint.OLD, checkpoint.RELEASES}
    assert beside <= {entry.name for entry in RunFolder.files().values() if entry.holds is Holds.RECORDS}
