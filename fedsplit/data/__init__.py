"""Records of devices: data sets with a name, a user's own files or function, and how records are dealt to devices."""

from fedsplit.common.errors import ConfigError
from fedsplit.common.plugins import resolve_function
from fedsplit.data.devices import describe, open_builder, open_folder, open_own, read_records
from fedsplit.data.partition import PARTITIONS
from fedsplit.data.pooled import POOLS, open_pool
from fedsplit.data.records import DeviceData, Records, Scaling, check_records
from fedsplit.data.source import Source

__all__ = [
    "PARTITIONS",
    "POOLS",
    "DeviceData",
    "Records",
    "Scaling",
    "Source",
    "check_records",
    "open_own",
    "open_source",
    "read_records",
    "resolve_function",
]


def open_source(
    *,
    name: str | None,
    folder: str | None,
    builder: str | None,
    task: str | None,
    outputs: int | None,
    count: int | None,
    test: int | str | tuple[int, ...],
    partition: str,
    alpha: float,
    seed: int,
    overlap: bool = True,
    novel: int | None = None,
    shape: tuple[int, ...] | None = None,
) -> Source:
    """Open the data of a run.

    Parameters
    ----------
    name, folder, builder : str or None
        Exactly one, or ``shape``: a data set of :data:`POOLS`; a folder of ``.npz`` files, one per device; or a
        function ``module:function`` that returns a device's :class:`DeviceData`.
    task : str or None
        As in :func:`fedsplit.model.tasks.task_of`; for a folder or builder None means classification. A data set knows
        its own.
    outputs : int or None
        Number of classes, required for classification; 1 or None for binary; the targets' width for regression, None
        means 1. A data set knows its own.
    count : int or None
        Number of devices, those that test included. None only if the source knows: a folder, or natural devices.
    test : int, "all" or tuple of int
        The devices that test: the last so many, all that hold test records (not for a data set), or their ids. In a
        data set they hold nothing but test records, and there must be one.
    partition : str
        How a data set is dealt, one of :data:`PARTITIONS`; ``natural`` for a folder or builder.
    alpha : float
        Above 0, only for ``dirichlet``: the smaller, the more the devices' classes differ.
    seed : int
        Of the partition, at least 0: equal arguments, equal devices.
    overlap : bool
        False only for the data set ``wearables``: windows that share no sample.
    novel : int or None
        Only for data sets with classes: the one of which nobody trains, for a task ``novelty``.
    shape : tuple of int, optional
        In place of ``name``, ``folder`` and ``builder``: of one record; the records are on the real nodes.

    Raises
    ------
    ConfigError
        If a setting is missing, unknown or does not fit the others.
    DataError
        If a package, folder or file is missing or damaged, or the first device's records cannot be used.
    """
    sources = {"name": name, "folder": folder, "builder": builder, "shape": shape}
    given = [key for key, value in sources.items() if value is not None]
    if len(given) != 1:
        raise ConfigError(f"exactly one of {', '.join(sources)} must be given, got {' and '.join(given) or 'none'}")
    if partition not in PARTITIONS:
        raise ConfigError(f"partition must be one of {', '.join(PARTITIONS)}, got {partition!r}")
    if name is not None:
        source = open_pool(
            name, count=count, test=test, method=partition, alpha=alpha, seed=seed, overlap=overlap, novel=novel
        )
        if task not in (None, source.task.name) or outputs not in (None, source.outputs):
            known = f"a {source.task.name} task with outputs = {source.outputs}"
            raise ConfigError(f"data set {name!r} is {known}, got task {task!r} and outputs {outputs}")
        return source
    if novel is not None:
        raise ConfigError(f"novel is for data sets with classes, not for a {given[0]}: label what is new with outputs")
    if not overlap:
        raise ConfigError(f"overlap = false is for the data set 'wearables', not for a {given[0]}")
    if partition != "natural":
        raise ConfigError(f"partition must be 'natural' for a {given[0]}, which has its own devices, got {partition!r}")
    if shape is not None:
        return describe(shape, task=task, outputs=outputs, count=count, test=test)
    if folder is not None:
        return open_folder(folder, task=task, outputs=outputs, count=count, test=test)
    return open_builder(str(builder), task=task, outputs=outputs, count=count, test=test)
