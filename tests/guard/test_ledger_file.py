"""A ledger on disk counts too much at worst, and is refused when it is not the owner's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import OWNER, Step, costs, histories, ledgers, name_of, new_ledger, play, windows

from fedsplit.common.errors import StateError
from fedsplit.guard.accountant import Cost, ExposureAccountant
from fedsplit.guard.sealed import load_sealed, save_sealed


@settings(deadline=None, max_examples=40)
@given(histories(), st.integers(0, 2**62), st.integers(0, 2**32 - 1))
def test_the_file_brings_everything_back(history: tuple[np.ndarray, list[Step]], run: int, round_number: int) -> None:
    segments, steps = history
    with new_ledger() as accountant:
        play(accountant, segments, steps)
        accountant.note(run, round_number)
        accountant.note(run, 0)  # never back
        accountant.refused += 17
        accountant.add_gradient(name_of(5), segments, np.full(len(segments), 0.1))
        accountant.save()
        again = ExposureAccountant(accountant.path, OWNER)
        assert ledgers(again) == ledgers(accountant)
        assert (again.refused, again.sums, again.last_round(run)) == (17, (name_of(5),), round_number)
        assert again.last_round(run + 1) == 0
        for rows, name, _ in steps:
            assert not again.is_new(rows, name_of(name)).any()
        records = np.arange(len(segments))
        for one, other in zip(again.earlier(records), accountant.earlier(records), strict=True):
            assert one[0] == other[0] and (one[1] == other[1]).all()
        again.save()
        assert again.path.read_bytes() == accountant.path.read_bytes()


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """A ledger of eight records of which something has left."""
    accountant = ExposureAccountant.create(tmp_path / "ledger.npz", OWNER)
    segments = windows(8, 2)
    accountant.step(np.arange(8), segments, name_of(1), costs(np.random.default_rng(0), 8))
    accountant.note(3, 4)
    accountant.save()
    return accountant.path


def refuses(path: Path, said: str, owner: bytes = OWNER) -> None:
    """Opening and beginning anew are both refused, in one line, and what is there is left as it is."""
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StateError, match=said) as caught:
        ExposureAccountant(path, owner)
    assert "\n" not in str(caught.value)
    if path.exists():
        with pytest.raises(StateError, match="exists already"):
            ExposureAccountant.create(path, owner)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_missing_ledger_is_refused(tmp_path: Path) -> None:
    refuses(tmp_path / "ledger.npz", "is missing: what has left cannot be known")
    assert not list(tmp_path.iterdir())


def test_another_owners_ledger_is_refused(ledger: Path) -> None:
    refuses(ledger, "belongs to other devices", b"p" * 32)


def test_a_truncated_ledger_is_refused(ledger: Path) -> None:
    content = ledger.read_bytes()
    for length in [*range(0, len(content), 61), 31, 32, 33, len(content) - 32, len(content) - 1]:
        ledger.write_bytes(content[:length])
        refuses(ledger, "is damaged: what has left cannot be known")
    ledger.write_bytes(content + b"\0")
    refuses(ledger, "is damaged")
    ledger.write_bytes(content)
    assert ExposureAccountant(ledger, OWNER).most().releases == 2


def test_a_single_flipped_bit_is_refused(ledger: Path) -> None:
    """Also in numpy's headers, where a shape of (100,) can become (000,) with the zip's checksum never looked at."""
    content = ledger.read_bytes()
    headers = [i for i in range(len(content)) if content[i : i + 6] == b"\x93NUMPY"]
    assert len(headers) >= 10
    rng = np.random.default_rng(0)
    places = {
        *rng.integers(0, 8 * len(content), 100).tolist(),
        *(8 * (h + i) + b for h in headers for i in range(60, 76) for b in (0, 4)),
    }
    for place in sorted(places):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        ledger.write_bytes(damaged)
        with pytest.raises(StateError, match="is damaged"):
            ExposureAccountant(ledger, OWNER)


@pytest.mark.parametrize("content", ["folder", "text", "array", "other arrays"])
def test_what_is_no_ledger_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.npz"
    if content == "folder":
        path.mkdir()
    elif content == "text":
        path.write_text("nothing has left")
    elif content == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        save_sealed(path, owner=np.frombuffer(OWNER, np.uint8), names=np.zeros(0, np.int64))
    refuses(path, "is damaged")


def test_beginning_never_replaces(ledger: Path) -> None:
    before = ledger.read_bytes()
    for owner in (OWNER, b"p" * 32):
        with pytest.raises(StateError, match="exists already"):
            ExposureAccountant.create(ledger, owner)
    assert ledger.read_bytes() == before


def test_only_the_owner_can_read_it(ledger: Path) -> None:
    assert ledger.stat().st_mode & 0o777 == 0o600


def test_of_two_processes_the_second_to_write_is_refused(ledger: Path) -> None:
    """Or what the first let out would be forgotten."""
    one, other = (ExposureAccountant(ledger, OWNER) for _ in range(2))
    one.step(np.array([50]), np.array([[50]]), name_of(2), Cost.of(1, equations=5))
    other.step(np.array([60]), np.array([[60]]), name_of(3), Cost.of(1, equations=6))
    one.save()
    with pytest.raises(StateError, match="changed by another process"):
        other.save()
    kept = dict(ExposureAccountant(ledger, OWNER).rows())
    assert 50 in kept and 60 not in kept
    one.save()  # its own writing is no other's


def test_a_ledger_that_was_taken_away_is_not_written_anew(ledger: Path) -> None:
    accountant = ExposureAccountant(ledger, OWNER)
    ledger.unlink()
    with pytest.raises(StateError, match="changed by another process"):
        accountant.save()
    assert not ledger.exists()


def test_a_ledger_that_was_put_back_is_not_written_over(ledger: Path) -> None:
    old = ledger.read_bytes()
    accountant = ExposureAccountant(ledger, OWNER)
    accountant.save()
    accountant.note(3, 9)
    accountant.save()
    ledger.write_bytes(old)
    with pytest.raises(StateError, match="changed by another process"):
        accountant.save()


def test_a_failed_write_leaves_the_old_file(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ledger.read_bytes()
    accountant = ExposureAccountant(ledger, OWNER)
    accountant.step(np.array([50]), np.array([[50]]), name_of(2), Cost.of(1))

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            accountant.save()
    assert ledger.read_bytes() == before
    accountant.save()
    assert 50 in dict(ExposureAccountant(ledger, OWNER).rows())


def test_sealed_files_bring_arrays_back(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros((0, 4), np.float32), "c": np.int64(7)}
    digest = save_sealed(tmp_path / "x", **arrays)
    found, stored = load_sealed(tmp_path / "x")
    assert digest == stored == (tmp_path / "x").read_bytes()[-32:]
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    with pytest.raises(FileNotFoundError):
        load_sealed(tmp_path / "y")


# Forks children that let records leave one by one and report each on a pipe, and kills them at random moments. Says
# what was reported and what the ledger then holds, by child; each child goes on with the same ledger. Nothing is
# computed before the forks, or the libraries' threads would be missing after them.
KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import numpy as np
from torch import nn
from fedsplit.guard.guard import Guard
from fedsplit.guard.proposal import Proposal, release_name
from fedsplit.model.layer import FirstLayer
from fedsplit.guard.accountant import Cost, ExposureAccountant
from fedsplit.guard.limits import Limits

path, owner = Path(sys.argv[1]), b"o" * 32
layer = FirstLayer(nn.Linear(16, 8), nn.ReLU(), (16,))
weights = np.random.default_rng(0).normal(size=layer.size).astype(np.float32)

def release(record, path=path):
    guard = Guard(Limits(), ExposureAccountant(path, owner), layer, enforce=True)
    records = np.array([record])
    proposal = Proposal(1, record + 1, weights, release_name(layer, weights, "p", 0), np.zeros(1, np.int64), records,
                        records[:, None], np.array([[3]], np.uint8), np.array([0.5]), Cost.of(1, equations=2), True)
    return guard.admit(proposal)[0] == 0

def live(record, writer):
    trial = path.with_name(f"trial-{os.getpid()}.npz")
    ExposureAccountant.create(trial, owner)
    release(0, trial)
    os.write(writer, b"\\xff" * 4)  # ready
    while True:
        if release(record):
            os.write(writer, record.to_bytes(4, "little"))
        record += 1

ExposureAccountant.create(path, owner)
record, children = 0, []
for trial in range(12):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        live(record, writer)
    os.close(writer)
    told = b""
    for _ in range(1 + trial % 4):
        told += os.read(reader, 4)
    time.sleep(random.random() * 0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while part := os.read(reader, 65536):
        told += part
    os.close(reader)
    reported = [int.from_bytes(told[i:i + 4], "little") for i in range(4, len(told), 4)]
    held = {name: spent.equations for name, spent in ExposureAccountant(path, owner).rows()}
    children.append({"reported": reported, "held": sorted(held), "equations": sorted(set(held.values()))})
    record = max(held, default=-1) + 1
print(json.dumps(children))
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_never_counts_too_little(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "ledger.npz")]
    children = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    reported: set[int] = set()
    for child in children:
        reported.update(child["reported"])
        assert reported <= set(child["held"])
        assert child["equations"] in ([], [2])  # and none was counted twice
    assert len(reported) >= 18
    assert len(set(children[-1]["held"]) - reported) <= len(children)  # killed before they could report
