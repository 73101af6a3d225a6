"""Sources whose devices bring their own records: a folder with one file per device, or a user's function."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.common.plugins import resolve_function
from fedsplit.data.records import DeviceData, Records, check_records
from fedsplit.data.source import Source, choose_test
from fedsplit.model.tasks import task_of
from fedsplit.model.tasks.base import Task

_KEYS = ("x", "y", "segments", "x_test", "y_test", "segments_test")


def open_folder(
    folder: str, *, task: str | None, outputs: int | None, count: int | None, test: int | str | tuple[int, ...]
) -> Source:
    """Open a folder of ``.npz`` files, one per device; a device's id is its file's place in the order of names.

    A file holds ``x`` and ``y`` to train with, ``x_test`` and ``y_test`` to test with, or all four; for windows that
    overlap also ``segments`` (``segments_test``), as in :class:`fedsplit.data.Records`.

    Parameters
    ----------
    folder : str
        Path of the folder.
    task, outputs, count, test
        As in :func:`fedsplit.data.open_source`.

    Raises
    ------
    ConfigError
        If a setting is missing or does not fit the folder.
    DataError
        If there are no such files, or the first one cannot be used.
    """
    if not Path(folder).is_dir():
        raise DataError(f"folder {folder!r} does not exist")
    files = tuple(sorted(Path(folder).glob("*.npz"), key=lambda path: path.name))
    if not files:
        raise DataError(f"folder {folder!r} holds no .npz files")
    if count not in (None, len(files)):
        raise ConfigError(f"count must be {len(files)} (the files in {folder!r}) or left out, got {count}")
    places = tuple(f"device {device} ({path.name})" for device, path in enumerate(files))
    return _open(partial(_read_file, files, places), places, task=task, outputs=outputs, test=test)


def open_builder(
    builder: str, *, task: str | None, outputs: int | None, count: int | None, test: int | str | tuple[int, ...]
) -> Source:
    """Take each device's records from a user's ``function(device_id, num_devices) -> DeviceData``.

    Parameters
    ----------
    builder : str
        ``module:function``.
    task, outputs, count, test
        As in :func:`fedsplit.data.open_source`; ``count`` is required.

    Raises
    ------
    ConfigError
        If the function cannot be imported, or a setting is missing or does not fit.
    DataError
        If the records of device 0 cannot be used.
    """
    if count is None or count < 1:
        raise ConfigError(f"count must be at least 1 for builder {builder!r}, got {count}")
    function = resolve_function(builder, "data.builder")
    places = tuple(f"device {device} ({builder})" for device in range(count))
    return _open(partial(_call, function, places), places, task=task, outputs=outputs, test=test)


def describe(
    shape: tuple[int, ...],
    *,
    task: str | None,
    outputs: int | None,
    count: int | None,
    test: int | str | tuple[int, ...],
) -> Source:
    """Return a source that knows what records are like, but holds none: each real node has its own.

    Parameters
    ----------
    shape : tuple of int
        Of one record.
    task, outputs, count, test
        As in :func:`fedsplit.data.open_source`; ``count`` is required, and ``test`` cannot be ``"all"``.

    Raises
    ------
    ConfigError
        If a setting is missing or does not fit.
    """
    if count is None:
        raise ConfigError("devices.count is required with data.shape: nobody else knows how many devices there are")
    if test == "all":
        raise ConfigError("devices.test must be a number or a list of ids with data.shape, got 'all'")
    kind, number = _check_task(task, outputs)
    return Source(kind, number, shape, count, _absent, choose_test(test, count), absent=True)


def _absent(device_id: int) -> DeviceData:
    raise DataError(f"device {device_id}: its records are on its own node (data.shape)")


def open_own(path: str, devices: Sequence[int], like: Source) -> Source:
    """Return a source with the records of a node's own devices.

    Parameters
    ----------
    path : str
        A folder of ``.npz`` files (see :func:`open_folder`), one per device: in the order of their names they are those
        of ``devices`` in ascending order. Or one such file, for a node with one device.
    devices : sequence of int
        The node's devices, ascending.
    like : Source
        The run's: task, outputs, shape and test devices.

    Raises
    ------
    DataError
        If the path does not exist or holds other than one file for each device.
    """
    files = own_files(path, devices)
    places = tuple(f"device {device} ({file.name})" for device, file in zip(devices, files, strict=True))
    load = partial(_load, partial(_read_file, files, places), places, like.task, like.outputs, like.input_shape)
    place = {device: i for i, device in enumerate(devices)}

    def own(device_id: int) -> DeviceData:
        if device_id not in place:
            raise DataError(f"device {device_id} is not on this node")
        return load(place[device_id])

    return replace(like, load=own, absent=False)


def own_files(path: str, devices: Sequence[int]) -> tuple[Path, ...]:
    """Return the files of a node's own devices; see :func:`open_own`."""
    where = Path(path)
    if not where.exists():
        raise DataError(f"data path {path!r} does not exist")
    files = tuple(sorted(where.glob("*.npz"), key=lambda file: file.name)) if where.is_dir() else (where,)
    if len(files) != len(devices):
        raise DataError(f"data path {path!r} holds {len(files)} .npz files, the node has {len(devices)} device(s)")
    return files


def _open(
    read: Callable[[int], DeviceData],
    places: tuple[str, ...],
    *,
    task: str | None,
    outputs: int | None,
    test: int | str | tuple[int, ...],
) -> Source:
    kind, number = _check_task(task, outputs)
    chosen = choose_test(test, len(places))
    load = partial(_load, read, places, kind, number)
    first = load(None, 0)
    shape = first.train.x.shape[1:]
    return Source(kind, number, shape, len(places), partial(load, shape), chosen)


def _check_task(task: str | None, outputs: int | None) -> tuple[Task, int]:
    found = task_of("classification" if task is None else task)
    return found, found.check_outputs(outputs)


def _load(
    read: Callable[[int], DeviceData],
    places: tuple[str, ...],
    task: Task,
    outputs: int,
    input_shape: tuple[int, ...] | None,
    device_id: int,
) -> DeviceData:
    data, where = read(device_id), places[device_id]
    if data.train.x.size + data.test.x.size == 0:
        raise DataError(f"{where}: holds no records, neither to train nor to test")
    parts = {"train": data.train, "test": data.test}
    shape = input_shape or max(parts.values(), key=lambda part: part.x.size).x.shape[1:]
    checked = {
        name: check_records(part, task=task, outputs=outputs, input_shape=shape, where=f"{where}, {name}")
        for name, part in parts.items()
    }
    task.check_training(checked["train"].y, outputs, f"{where}, train")
    return DeviceData(**checked)


def read_records(file: str, source: Source) -> Records:
    """Read public records from an ``.npz`` file with ``x`` and ``y``, of the same kind as a source's.

    Raises
    ------
    DataError
        If the file cannot be used.
    """
    where = f"public file {file}"
    arrays = _arrays(Path(file), where)
    pair = _pair(arrays, "x", "y", where)
    if pair is None:
        raise DataError(f"{where}: lacks x and y")
    task, outputs = source.task, source.outputs
    found = check_records(pair, task=task, outputs=outputs, input_shape=source.input_shape, where=where)
    task.check_training(found.y, outputs, where)
    return found


def _read_file(files: tuple[Path, ...], places: tuple[str, ...], device_id: int) -> DeviceData:
    where = places[device_id]
    arrays = _arrays(files[device_id], where)
    train, test = _pair(arrays, "x", "y", where), _pair(arrays, "x_test", "y_test", where)
    if train is None and test is None:
        raise DataError(f"{where}: lacks x and y, or x_test and y_test")
    trained = Records(*train, arrays.get("segments")) if train else None
    tested = Records(*test, arrays.get("segments_test")) if test else None
    if trained is None:
        assert tested is not None
        return DeviceData(Records.empty(tested), tested)
    return DeviceData(trained, tested)


def _arrays(path: Path, where: str) -> dict[str, Any]:
    try:
        # opened here, so that it is closed whatever numpy returns; no pickles, since a file may come from anyone
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            return {key: archive[key] for key in _KEYS if key in archive.files}
    except Exception as error:  # damage shows as an error of zipfile, zlib, numpy or the file system
        raise DataError(f"{where}: cannot be read as .npz without pickles ({type(error).__name__})") from None


def _pair(arrays: dict[str, Any], x: str, y: str, where: str) -> tuple[Any, Any] | None:
    lacking = [key for key in (x, y) if key not in arrays]
    if len(lacking) == 1:
        raise DataError(f"{where}: lacks {lacking[0]}, which must come with {x if lacking[0] == y else y}")
    return None if lacking else (arrays[x], arrays[y])


def _call(function: Callable[..., Any], places: tuple[str, ...], device_id: int) -> DeviceData:
    where = places[device_id]
    try:
        data = function(device_id, len(places))
    except Exception as error:  # only its type: its text could hold records
        kind = type(error).__name__
        raise DataError(f"{where}: the function raised {kind}; call it by hand to see why") from None
    if not isinstance(data, DeviceData):
        raise DataError(f"{where}: the function must return DeviceData, got {type(data).__name__}")
    return data
