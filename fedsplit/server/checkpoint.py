"""Checkpoints: everything that a run needs to go on exactly where it was, written in one step.

``first_layer.safetensors`` and ``trunk.safetensors`` hold the weights alone, for use elsewhere; ``state.pt`` holds
the rest as plain tensors and numbers (read back with ``weights_only``, so nothing in it can run). Replayed releases
change only where they are forgotten, so each round's go into a file of their own, beside the checkpoint, which is named
by the round and the number of records.
"""

import os
import shutil
from dataclasses import asdict, fields
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save as save_arrays
from safetensors.torch import load_file as load_tensors

from fedsplit.common.errors import RunError
from fedsplit.common.files import replacing
from fedsplit.server.answers import PendingBlock
from fedsplit.server.batches import Batches
from fedsplit.server.progress import Progress, Totals
from fedsplit.server.rounds import SplitStrategy
from fedsplit.wire.exchange import CutGradients

NEW, OLD, RELEASES = "checkpoint.new", "checkpoint.old", "releases"
"""Folders beside a checkpoint."""
STATE = "state.pt"
"""The file of a checkpoint with all that are no weights."""
_DAMAGE = (SafetensorError, UnpicklingError, BadZipFile)


def save_checkpoint(folder: Path, strategy: SplitStrategy, seconds: float) -> None:
    """Write ``folder`` anew; a process killed at any moment leaves a whole one behind.

    Parameters
    ----------
    folder : Path
        The run's ``checkpoint`` folder.
    strategy : SplitStrategy
        Between two rounds.
    seconds : float
        Time spent in training so far.
    """
    progress = strategy.progress
    sizes = _save_replay(_replay_folder(folder), progress.replay)
    new, old = folder.with_name(NEW), folder.with_name(OLD)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    (new / "first_layer.safetensors").write_bytes(save_arrays(strategy.first_layer.weights))
    for name, content in strategy.trunk.files().items():
        (new / name).write_bytes(content)
    state = {
        "run": progress.run,
        "round": progress.round_number,
        "replayed": sizes,
        "evaluation": progress.evaluation,
        "totals": asdict(progress.totals),
        "position": strategy.schedule.position,
        "heard": strategy.schedule.heard,
        "pace": strategy.pace.state(),
        "pending": [_plain(block) for block in progress.pending],
        "trunk": strategy.trunk.state(),
        "first_layer": strategy.first_layer.state(),
        "offences": strategy.roster.offences,
        "seconds": seconds,
    }
    (new / STATE).write_bytes(_saved(state))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)
    _remove_others(_replay_folder(folder), sizes)


def load_checkpoint(folder: Path, strategy: SplitStrategy) -> float | None:
    """Restore a strategy as it was; return the seconds spent in training, or None if there is no checkpoint.

    Raises
    ------
    RunError
        If the checkpoint is damaged.
    """
    if (whole := _whole(folder)) is None:
        shutil.rmtree(_replay_folder(folder), ignore_errors=True)
        return None
    if whole != folder:
        os.replace(whole, folder)
    try:
        return _restore(folder, strategy)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, *_DAMAGE) as error:
        raise RunError(f"checkpoint {folder} is damaged: {type(error).__name__}") from None


def _whole(folder: Path) -> Path | None:
    """Return where the checkpoint is; of a process killed between the two renames the new one is whole, or the old."""
    new, old = folder.with_name(NEW), folder.with_name(OLD)
    if folder.exists():
        return folder
    return (new if new.exists() else old) if old.exists() else None


class Forgetting:
    """What a checkpoint holds of a device; nothing changes before :meth:`remove`.

    Parameters
    ----------
    folder : Path
        The run's ``checkpoint`` folder.
    device : int

    Attributes
    ----------
    records : int
        Releases of the device's records that are kept for replay.
    gradients : int
        Of the device's records, those that still wait for a gradient.
    leftovers : list of Path
        Files that a killed process has left, which may hold the device's releases and are of no use.

    Raises
    ------
    RunError
        If there is no checkpoint, or it is damaged.
    """

    def __init__(self, folder: Path, device: int) -> None:
        whole, self._folder, self._releases = _whole(folder), folder, _replay_folder(folder)
        if whole is None or not (whole / STATE).exists():
            raise RunError(f"{folder.parent} holds no checkpoint")
        self._whole = whole
        try:
            self._state = _from_tensors(torch.load(whole / STATE, weights_only=True))
            replay = _read_replay(self._releases, self._state["replayed"])
            pending = [_pending_block(block) for block in self._state["pending"]]
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, *_DAMAGE) as error:
            raise RunError(f"checkpoint {folder} is damaged: {type(error).__name__}") from None
        self._kept = {number: batches.without(device) for number, batches in replay.items()}
        self._pending = [block.without(np.array([device])) for block in pending]
        self.records = sum(map(len, replay.values())) - sum(map(len, self._kept.values()))
        self.gradients = int(sum(b.records.sum() for b in pending) - sum(b.records.sum() for b in self._pending))
        beside = [folder, folder.with_name(NEW), folder.with_name(OLD)]
        halves = [path for path in beside if path.exists() and path != whole]
        self.leftovers = halves + sorted(_others(self._releases, self._state["replayed"]))

    def remove(self) -> None:
        """Write the checkpoint anew, without anything of the device."""
        if self._whole != self._folder:
            os.replace(self._whole, self._folder)
        state = self._state
        state["replayed"] = _save_replay(self._releases, self._kept)
        state["pending"] = [_plain(block) for block in self._pending if len(block.records)]
        with replacing(self._folder / STATE) as new:
            new.write_bytes(_saved(state))
        _remove_others(self._releases, state["replayed"])
        for path in self.leftovers:
            shutil.rmtree(path, ignore_errors=True)


def _pending_block(block: dict[str, Any]) -> PendingBlock:
    cut = {name: value for name, value in block.items() if name != "records"}
    return PendingBlock(CutGradients(**cut), block["records"])


def _plain(block: PendingBlock) -> dict[str, Any]:
    return {**vars(block.cut), "records": block.records}


def _saved(state: dict[str, Any]) -> bytes:
    """Return a state as bytes, so that it is this process that writes: torch does not say that a disk is full."""
    buffer = BytesIO()
    torch.save(_to_tensors(state), buffer)
    return buffer.getvalue()


def _restore(folder: Path, strategy: SplitStrategy) -> float:
    state = _from_tensors(torch.load(folder / STATE, weights_only=True))
    strategy.trunk.load_state(load_tensors(folder / "trunk.safetensors"), state["trunk"])
    weights = load_arrays(folder / "first_layer.safetensors")
    replay = _load_replay(_replay_folder(folder), state["replayed"])
    strategy.first_layer.load_state(weights, state["first_layer"])
    strategy.schedule.position = state["position"]
    strategy.schedule.heard = state.get("heard", {})  # which earlier versions did not count
    strategy.pace.load_state(state.get("pace", state.get("clock", {})))  # as earlier versions call it
    pending = [_pending_block(block) for block in state["pending"]]
    strategy.roster.offences = state["offences"]
    strategy.resume(
        Progress(state["run"], state["round"], pending, replay, state["evaluation"], Totals(**state["totals"]))
    )
    return float(state["seconds"])


def _replay_folder(folder: Path) -> Path:
    return folder.with_name(RELEASES)


def _replay_path(folder: Path, number: int, size: int) -> Path:
    return folder / f"{number:06d}-{size}.npz"


def _save_replay(folder: Path, replay: dict[int, Batches]) -> dict[int, int]:
    """Write what is not there yet; return how many records there are of each round."""
    for number, batches in replay.items():
        path = _replay_path(folder, number, len(batches))
        if not path.exists():
            folder.mkdir(exist_ok=True)
            with replacing(path) as new, new.open("wb") as file:
                np.savez(file, **vars(batches))
    return {number: len(batches) for number, batches in replay.items()}


def _load_replay(folder: Path, sizes: dict[int, int]) -> dict[int, Batches]:
    _remove_others(folder, sizes)
    return _read_replay(folder, sizes)


def _read_replay(folder: Path, sizes: dict[int, int]) -> dict[int, Batches]:
    replay = {}
    for number, size in sizes.items():
        with np.load(_replay_path(folder, number, size), allow_pickle=False) as file:
            loaded = {f.name: file[f.name] for f in fields(Batches)}
        replay[number] = Batches(**{**loaded, "width": int(loaded["width"])})
    return replay


def _remove_others(folder: Path, sizes: dict[int, int]) -> None:
    """Delete what the checkpoint does not have."""
    for path in _others(folder, sizes):
        path.unlink()


def _others(folder: Path, sizes: dict[int, int]) -> set[Path]:
    """Return what the checkpoint does not have: of rounds after it, what was forgotten, what is half written."""
    return set(folder.glob("*")) - {_replay_path(folder, *named) for named in sizes.items()}


def _to_tensors(value: Any) -> Any:
    """Turn numpy arrays, which weights_only refuses, into tensors marked as arrays."""
    if isinstance(value, np.ndarray):
        return {"__array__": torch.from_numpy(np.array(value))}
    if isinstance(value, dict):
        return {k: _to_tensors(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_to_tensors(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


def _from_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        if "__array__" in value:
            return value["__array__"].numpy()
        return {k: _from_tensors(v) for k, v in value.items()}
    return [_from_tensors(v) for v in value] if isinstance(value, list) else value
