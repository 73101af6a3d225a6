"""Forgetting a device: nothing in a run folder, or derived from what is there, that is of its records."""

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedsplit.audit.transcript import may_hold
from fedsplit.common.errors import ConfigError, RunError
from fedsplit.common.files import put
from fedsplit.device.pending import NodeState
from fedsplit.guard import forgetting as ledgers
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.following import check_idle
from fedsplit.server.checkpoint import Forgetting
from fedsplit.server.roster import id_ranges, ids_in

_HALF_WRITTEN = re.compile(r"\..+\.\d+")  # see fedsplit.common.files.replacing


@dataclass(frozen=True)
class Forgotten:
    """What was removed.

    Attributes
    ----------
    records : int
        Releases that were kept for replay.
    others : tuple of str
        What else, for people.
    unknown : tuple of str
        Files in the folder that are none of a run's, which were left alone.
    """

    records: int
    others: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class _Part:
    """A part of what the folder holds of a device, and what removes it."""

    said: str
    remove: Callable[[], object]


def forget_device(folder: Path, device: int) -> Forgotten:
    """Remove everything of a device's records from a run folder.

    What the weights have learned from them stays, and with them sums over all devices and what a run must know to go
    on: how far the device's records have been asked for, and how often it was heard. A device that has nothing there
    changes nothing.

    Raises
    ------
    ConfigError
        If the folder holds nothing of the device, or a process works there; nothing has changed then.
    RunError
        If there is no checkpoint, or a file is damaged; nothing has changed then.
    """
    check_idle(folder)
    run = RunFolder(folder)
    checkpoint = Forgetting(run.checkpoint, device)
    found = list(_found(run, checkpoint, device))
    if not found and not checkpoint.records:
        raise ConfigError(f"{folder} holds nothing of device {device}: nothing was changed")
    checkpoint.remove()
    for part in found:
        part.remove()
    known = {entry.name for entry in RunFolder.files().values()}
    unknown = sorted(path.name for path in folder.iterdir() if path.name not in known)
    return Forgotten(checkpoint.records, tuple(dict.fromkeys(part.said for part in found)), tuple(unknown))


def _found(run: RunFolder, checkpoint: Forgetting, device: int) -> Iterator[_Part]:
    """Yield what there is besides releases kept for replay, without changing anything."""
    if checkpoint.gradients:
        yield _Part(f"gradients that {checkpoint.gradients} records wait for", lambda: None)
    if checkpoint.leftovers:
        yield _Part("what a killed process has left", lambda: None)
    for path in run.path.rglob(".*"):
        if _HALF_WRITTEN.fullmatch(path.name) and path not in checkpoint.leftovers:
            yield _Part("what a killed process has left", partial(path.unlink, missing_ok=True))
    yield from _of_an_audit(run, device)
    yield from _of_simulated_nodes(run, device)
    yield from _rows(run, device)


def _of_an_audit(run: RunFolder, device: int) -> Iterator[_Part]:
    recorded = may_hold(run.recordings, device)
    if recorded:
        yield _Part(f"{run.recordings.name}/", partial(shutil.rmtree, run.recordings))
    reported = _reports(run.report, device)
    for path in (run.report, run.page):  # the page shows what the report is about
        if path.exists() and (recorded or reported):
            yield _Part(path.name, path.unlink)


def _reports(path: Path, device: int) -> bool:
    """Whether an audit is, or may be, about a device's records."""
    try:
        return device in json.loads(path.read_text(encoding="utf-8"))["devices"]
    except (OSError, ValueError, KeyError, TypeError):  # gone, damaged, or of a version that did not say
        return True


def _of_simulated_nodes(run: RunFolder, device: int) -> Iterator[_Part]:
    for folder in sorted(path for path in run.states.glob("*/**") if path.is_dir() and path.suffix != ".history"):
        if (state := NodeState(folder)).rounds_of(device):
            yield _Part("the simulated device's pending chunks", partial(state.forget, device))
    for ledger in sorted(run.states.glob("*/*/ledger-*.npz")):
        try:
            held = ledgers.holding(ledger, device)
        except (OSError, ValueError):
            raise RunError(f"{ledger}, or the history beside it, is damaged") from None
        for path in held:
            yield _Part("the simulated device's ledger", partial(ledgers.forget_device, path, device))


def _rows(run: RunFolder, device: int) -> Iterator[_Part]:
    """Yield the tables with a row of the device's own."""
    if run.nodes.exists():
        before = run.node_rows()
        after = [row for row in (_without(row, device) for row in before) if row is not None]
        if after != before:
            text = json.dumps(after, indent=2) + "\n"
            yield _Part(f"its row in {run.nodes.name}", partial(put, run.nodes, text))
    if run.devices.exists():
        lines = run.devices.read_text(encoding="utf-8").splitlines(keepends=True)
        others = [line for row, line in zip(csv.reader(lines), lines, strict=True) if row[0] != str(device)]
        if others != lines:
            yield _Part(f"its row in {run.devices.name}", partial(put, run.devices, "".join(others)))


def _without(row: dict[str, Any], device: int) -> dict[str, Any] | None:
    """Return a node's row without a device; None if the node has no other."""
    ids = ids_in(row["devices"])
    if device not in ids:
        return row
    left = [i for i in ids if i != device]
    return {**row, "devices": id_ranges(left)} if left else None
