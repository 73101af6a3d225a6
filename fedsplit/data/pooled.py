"""Sources that deal one shared pool of records, a data set with a name, to devices."""

import difflib
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np

from fedsplit.common.errors import ConfigError
from fedsplit.data import packaged, partition, pigs, wearables
from fedsplit.data.records import DeviceData, IndexArray, Pool, Records
from fedsplit.data.source import Source, choose_test
from fedsplit.model.tasks import task_of

POOLS: dict[str, Callable[..., Pool]] = {
    "wearables": wearables.load,
    "pig-cvp": pigs.load,
    "mnist": packaged.mnist,
    "digits": packaged.digits,
    "breast-cancer": packaged.breast_cancer,
}
_STREAM = 0xDA7A  # a stream of random numbers that no other use of the run's seed shares


def open_pool(
    name: str,
    *,
    count: int | None,
    test: int | str | tuple[int, ...],
    method: str,
    alpha: float,
    seed: int,
    overlap: bool = True,
    novel: int | None = None,
) -> Source:
    """Deal the data set ``name`` to devices; test devices hold only test records, the others only train records.

    Parameters
    ----------
    name : str
        A key of :data:`POOLS`.
    count : int or None
        Number of devices, those that test included; None only if the data set has natural devices.
    test : int or tuple of int
        At least one device.
    method : str
        One of :data:`fedsplit.data.partition.PARTITIONS`; ``natural`` only if the data set has natural devices.
    alpha : float
        Of ``dirichlet``.
    seed : int
        At least 0; equal arguments, equal devices.
    overlap : bool
        False only for ``wearables``: windows that share no sample.
    novel : int or None
        A class of which nobody trains: a task ``novelty``, in which a device's records of another class are one
        recording.

    Raises
    ------
    ConfigError
        If the data set is unknown or a setting does not fit it.
    DataError
        If the data set's package is missing or its file damaged.
    """
    pool = load_pool(name, overlap)
    if method == "natural":
        owners = _natural_owners(pool, name, count)
        total = int(owners.max()) + 1
        chosen = _test_devices(test, total)
        _check_people(pool, chosen)
        indices = partition.natural(owners, total)
    else:
        total = _count(count, method, len(pool.x))
        chosen = _test_devices(test, total)
        indices = _deal(pool, total, chosen, method, alpha, np.random.default_rng([seed, _STREAM]))
    task, outputs, labels = pool.task, pool.outputs, pool.y
    if novel is not None:
        if task.targets(outputs).classes != outputs or not 0 <= novel < outputs:
            raise ConfigError(f"novel must be a class of a data set with several, 0..{outputs - 1} here, got {novel}")
        task, outputs, labels = task_of("novelty"), outputs - 1, _recordings(pool.y, novel, outputs - 1)
        indices = [rows if d in chosen else rows[labels[rows] < outputs] for d, rows in enumerate(indices)]
    load = partial(_slice, Records(pool.x, labels, pool.segments), tuple(indices), chosen)
    return Source(task, outputs, pool.x.shape[1:], total, load, chosen, scaling=pool.scaling)


def _recordings(classes: IndexArray, novel: int, others: int) -> IndexArray:
    """Number the classes anew, the novel one last."""
    return np.where(classes == novel, others, classes - (classes > novel))


@lru_cache
def load_pool(name: str, overlap: bool = True) -> Pool:
    """Return the data set ``name``, which stays in memory for the life of the process.

    Raises
    ------
    ConfigError
        If there is no such data set.
    DataError
        If the data set's package is missing or its file damaged.
    """
    if name not in POOLS:
        near = difflib.get_close_matches(name, POOLS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"name must be one of {', '.join(POOLS)}, got {name!r}: did you mean {near!r}?")
    if overlap:
        return POOLS[name]()
    if name != "wearables":
        raise ConfigError(f"overlap = false is for data set 'wearables', whose records are windows, not for {name!r}")
    return wearables.load(overlap=False)


def _natural_owners(pool: Pool, name: str, count: int | None) -> IndexArray:
    if pool.owners is None:
        raise ConfigError(f"data set {name!r} has no natural devices: partition must be iid or dirichlet")
    owners = int(pool.owners.max()) + 1
    if count not in (None, owners):
        raise ConfigError(f"count must be {owners}, the natural devices of data set {name!r}, or left out, got {count}")
    return pool.owners


def _count(count: int | None, method: str, records: int) -> int:
    if count is None or count < 2:
        raise ConfigError(f"count must be at least 2 for partition {method!r}, got {count}")
    if count > records:  # said at once: a server may name any number, and dealing takes time and memory for each
        raise ConfigError(f"partition {method!r} leaves device {records} of {count} without records: use fewer devices")
    return count


def _test_devices(test: int | str | tuple[int, ...], count: int) -> tuple[int, ...]:
    chosen = choose_test(test, count)
    if chosen is None:
        raise ConfigError("test = 'all' needs devices with test records of their own: give a number or a list of ids")
    if not chosen:
        raise ConfigError("test must name at least one device, got none")
    if len(chosen) == count:
        raise ConfigError(f"test takes all {count} devices: none is left to train")
    return chosen


def _check_people(pool: Pool, chosen: tuple[int, ...]) -> None:
    """Refuse a person with one device in training and one in test: results are those of people held out."""
    for person in sorted(set(pool.people)):
        own = [device for device, owner in enumerate(pool.people) if owner == person]
        if 0 < len(set(own) & set(chosen)) < len(own):
            devices = " and ".join(map(str, own))
            raise ConfigError(f"test splits person {person}: name both or neither of the devices {devices}")


def _deal(
    pool: Pool, count: int, chosen: tuple[int, ...], method: str, alpha: float, rng: np.random.Generator
) -> list[IndexArray]:
    """Return the record indices of each device: test records iid over ``chosen``, the others by ``method``."""
    n = len(pool.x)
    if pool.held_out is None:
        share = rng.permutation(n)[: round(n * len(chosen) / count)]
        held_out = np.isin(np.arange(n), share)
    else:
        held_out = pool.held_out
    test, train = np.flatnonzero(held_out), np.flatnonzero(~held_out)
    trainers = [device for device in range(count) if device not in chosen]
    tested = partition.iid(len(test), len(chosen), rng)
    if method == "iid":
        trained = partition.iid(len(train), len(trainers), rng)
    else:
        trained = partition.dirichlet(pool.y[train], len(trainers), alpha, rng)
    dealt = {device: test[part] for device, part in zip(chosen, tested, strict=True)}
    dealt |= {device: train[part] for device, part in zip(trainers, trained, strict=True)}
    return [dealt[device] for device in range(count)]


def _slice(records: Records, indices: tuple[IndexArray, ...], chosen: tuple[int, ...], device_id: int) -> DeviceData:
    own, none = records.take(indices[device_id]), Records.empty(records)
    return DeviceData(none, own) if device_id in chosen else DeviceData(own, none)
