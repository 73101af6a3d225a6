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
    new, old = folder.with_name("checkpoint.new"), folder.with_name("checkpoint.old")
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
        "pending": [{**vars(b.cut), "records": b.records} for b in progress.pending],
        "trunk": strategy.trunk.state(),
        "first_layer": strategy.first_layer.state(),
        "offences": strategy.roster.offences,
        "seconds": seconds,
    }
    (new / "state.pt").write_bytes(_saved(state))
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
    if not folder.exists():
        # killed between the two renames: the new one is whole, or else the old one is
        new, old = folder.with_name("checkpoint.new"), folder.with_name("checkpoint.old")
        if not old.exists():
            shutil.rmtree(_replay_folder(folder), ignore_errors=True)
            return None
        os.replace(new if new.exists() else old, folder)
    try:
        return _restore(folder, strategy)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, *_DAMAGE) as error:
        raise RunError(f"checkpoint {folder} is damaged: {type(error).__name__}") from None


def forget_device(folder: Path, device: int) -> int:
    """Remove a device's releases and pending gradients from a checkpoint; return how many records were removed.

    Recordings for an audit are deleted, since they hold its releases, too. What the weights have learned from them
    stays.

    Raises
    ------
    RunError
        If there is no checkpoint, or it is damaged.
    """
    checkpoint = folder / "checkpoint"
    try:
        state = _from_tensors(torch.load(checkpoint / "state.pt", weights_only=True))
        replay = _load_replay(_replay_folder(checkpoint), state["replayed"])
    except FileNotFoundError:
        raise RunError(f"{folder} holds no checkpoint") from None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, *_DAMAGE) as error:
        raise RunError(f"checkpoint {checkpoint} is damaged: {type(error).__name__}") from None
    kept = {number: batches.without(device) for number, batches in replay.items()}
    removed = sum(map(len, replay.values())) - sum(map(len, kept.values()))
    state["replayed"] = _save_replay(_replay_folder(checkpoint), kept)
    state["pending"] = [block for block in state["pending"] if device not in block["devices"]]
    with replacing(checkpoint / "state.pt") as new:
        new.write_bytes(_saved(state))
    _remove_others(_replay_folder(checkpoint), state["replayed"])
    shutil.rmtree(folder / "audit", ignore_errors=True)
    return removed


def _saved(state: dict[str, Any]) -> bytes:
    """Return a state as bytes, so that it is this process that writes: torch does not say that a disk is full."""
    buffer = BytesIO()
    torch.save(_to_tensors(state), buffer)
    return buffer.getvalue()


def _restore(folder: Path, strategy: SplitStrategy) -> float:
    state = _from_tensors(torch.load(folder / "state.pt", weights_only=True))
    strategy.trunk.load_state(load_tensors(folder / "trunk.safetensors"), state["trunk"])
    weights = load_arrays(folder / "first_layer.safetensors")
    replay = _load_replay(_replay_folder(folder), state["replayed"])
    strategy.first_layer.load_state(weights, state["first_layer"])
    strategy.schedule.position = state["position"]
    strategy.schedule.heard = state["heard"]
    strategy.pace.load_state(state["pace"])
    pending = []
    for block in state["pending"]:
        records = block.pop("records")
        pending.append(PendingBlock(CutGradients(**block), records))
    strategy.roster.offences = state["offences"]
    strategy.resume(
        Progress(state["run"], state["round"], pending, replay, state["evaluation"], Totals(**state["totals"]))
    )
    return float(state["seconds"])


def _replay_folder(folder: Path) -> Path:
    return folder.with_name("releases")


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
    replay = {}
    for number, size in sizes.items():
        with np.load(_replay_path(folder, number, size), allow_pickle=False) as file:
            loaded = {f.name: file[f.name] for f in fields(Batches)}
        replay[number] = Batches(**{**loaded, "width": int(loaded["width"])})
    return replay


def _remove_others(folder: Path, sizes: dict[int, int]) -> None:
    """Delete what the checkpoint does not have: of rounds after it, and what was forgotten."""
    for path in set(folder.glob("*.npz")) - {_replay_path(folder, *named) for named in sizes.items()}:
        path.unlink()


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
