"""How a pool's records are dealt to devices: pure functions that return each device's record indices, ascending.

Flower's own partitioners (flwr-datasets) are not used: they need the Hugging Face `datasets` package with pyarrow and
pandas, for what is a page of numpy.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.errors import ConfigError
from fedsplit.data.records import IndexArray

PARTITIONS = ("natural", "iid", "dirichlet")
REDRAWS = 10


def natural(owners: NDArray[np.integer[Any]], count: int) -> list[IndexArray]:
    """Give each record to the device it comes from.

    Parameters
    ----------
    owners : int array (records,)
        The device id of each record, in 0..count-1.
    count : int
        Number of devices.

    Raises
    ------
    ConfigError
        If a device gets no record, or an owner is not in 0..count-1.
    """
    if len(owners) and not (0 <= owners.min() and owners.max() < count):
        raise ConfigError(f"partition 'natural': owners must be in 0..{count - 1} (count is {count})")
    return _none_empty("natural", [np.flatnonzero(owners == device) for device in range(count)])


def iid(n: int, count: int, rng: np.random.Generator) -> list[IndexArray]:
    """Deal records to devices at random, in parts that differ by at most one record.

    Parameters
    ----------
    n : int
        The number of records.
    count : int
        The number of devices.
    rng : numpy.random.Generator

    Raises
    ------
    ConfigError
        If a device gets no record.

    Examples
    --------
    >>> [len(part) for part in iid(7, 3, np.random.default_rng(0))]
    [3, 2, 2]
    """
    return _none_empty("iid", [np.sort(part) for part in np.array_split(rng.permutation(n), count)])


def dirichlet(labels: NDArray[Any], count: int, alpha: float, rng: np.random.Generator) -> list[IndexArray]:
    """Deal each class to the devices in proportions from Dirichlet(alpha): the smaller alpha, the more skew.

    Draws that leave a device without records are repeated, up to 10 times.

    Parameters
    ----------
    labels : int array (records,)
        Class labels.
    count : int
        Number of devices.
    alpha : float
        Above 0; the same for every device.
    rng : numpy.random.Generator

    Raises
    ------
    ConfigError
        If the labels are not classes, alpha is not a positive number, or a device gets no record.

    Notes
    -----
    Source: Hsu, Qi and Brown 2019, arXiv 1909.06335, but per class and not per device, as in Li et al. 2021, "Federated
    Learning on Non-IID Data Silos", arXiv 2102.02079: so each record is used exactly once.
    """
    if labels.ndim != 1 or labels.dtype.kind not in "biu":
        raise ConfigError("partition 'dirichlet' needs class labels; regression targets have none")
    if not 0 < alpha < math.inf:
        raise ConfigError(f"alpha must be a number above 0, got {alpha}")
    for _ in range(1 + REDRAWS):
        parts = _deal_classes(labels, count, alpha, rng)
        if all(len(part) for part in parts):
            break
    return _none_empty("dirichlet", parts)


def _deal_classes(labels: NDArray[Any], count: int, alpha: float, rng: np.random.Generator) -> list[IndexArray]:
    pieces: list[list[IndexArray]] = [[np.empty(0, np.int64)] for _ in range(count)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(count, alpha))
        cuts = (np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for device, piece in enumerate(np.split(members, cuts)):
            pieces[device].append(piece)
    return [np.sort(np.concatenate(parts)) for parts in pieces]


def _none_empty(partition: str, parts: list[IndexArray]) -> list[IndexArray]:
    for device, part in enumerate(parts):
        if len(part) == 0:
            remedy = "fewer devices or a larger alpha" if partition == "dirichlet" else "fewer devices"
            raise ConfigError(
                f"partition {partition!r} leaves device {device} of {len(parts)} without records: use {remedy}"
            )
    return parts
