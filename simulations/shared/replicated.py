"""Many devices from few recordings: the smart-watch windows dealt again and again, for measuring speed and size."""

import os
from functools import lru_cache

import numpy as np

from fedsplit.data import DeviceData, Records, wearables
from fedsplit.data.records import Pool

RECORDS = "REPLICATED_RECORDS"  # environment variable: training records of all devices together
TESTED = 100  # test records, of device 0
BUILDER = f"{__name__}:device"
DATA = {"builder": BUILDER, "task": "classification", "outputs": 7}
"""The section ``data`` of settings whose devices these are."""


@lru_cache(maxsize=1)
def windows() -> Pool:
    """Return the 2,346 windows that share no sample."""
    return wearables.load(overlap=False)


def device(device_id: int, num_devices: int) -> DeviceData:
    """Return a device's even share of the records."""
    total = int(os.environ[RECORDS])
    start, stop = (total * i // num_devices for i in (device_id, device_id + 1))
    pool = windows()
    rows = np.arange(start, stop) % len(pool.x)
    test = np.arange(TESTED if device_id == 0 else 0)
    return DeviceData(Records(pool.x[rows], pool.y[rows]), Records(pool.x[test], pool.y[test]))
