"""A data set that is dealt to devices, whatever it came from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.data.records import DeviceData, Scaling
from fedsplit.model.tasks.base import Task


@dataclass(frozen=True)
class Source:
    """The records of all devices, loaded device by device.

    Attributes
    ----------
    task : Task
    outputs : int
        Number of classes; 1 for binary; the targets' width for regression; the most recordings of a device for novelty.
    input_shape : tuple of int
        Shape of one record.
    count : int
        Number of devices, those that only test included; ids are 0..count-1.
    load : callable
        Returns one device's checked records by its id; nothing is cached here.
    chosen : tuple of int or None
        The test devices' ids; None: all devices that hold test records.
    absent : bool
        Whether there are no records here: real nodes have them.
    scaling : Scaling
        How records were made of raw numbers, as far as that is known here.
    """

    task: Task
    outputs: int
    input_shape: tuple[int, ...]
    count: int
    load: Callable[[int], DeviceData] = field(repr=False)
    chosen: tuple[int, ...] | None
    absent: bool = False
    scaling: Scaling = field(default_factory=Scaling)

    @cached_property
    def test_devices(self) -> tuple[int, ...]:
        """Ids of the devices whose test records count, ascending.

        For ``test = "all"`` the first use loads every device once.

        Raises
        ------
        DataError
            If no device holds test records.
        """
        if self.chosen is not None:
            return self.chosen
        found = tuple(device for device in range(self.count) if len(self.load(device).test))
        if not found:
            raise DataError(f"test = 'all': none of the {self.count} devices holds test records")
        return found

    def device(self, device_id: int) -> DeviceData:
        """Return one device's checked records; it holds at least one.

        Raises
        ------
        DataError
            Naming the device and its file or function, if the records are missing or cannot be used, or if it is one
            of the chosen test devices and holds no test records.
        """
        if not 0 <= device_id < self.count:
            raise DataError(f"device {device_id} does not exist: ids are 0..{self.count - 1}")
        data = self.load(device_id)
        if self.chosen and device_id in self.chosen and not len(data.test):
            raise DataError(f"device {device_id} is chosen to test, but holds no test records")
        return data


def choose_test(test: int | str | tuple[int, ...], count: int) -> tuple[int, ...] | None:
    """Return the ids of the test devices, ascending, or None for all that hold test records.

    Parameters
    ----------
    test : int, tuple of int or "all"
        A number means the last devices, a tuple their ids.
    count : int
        Number of devices.

    Raises
    ------
    ConfigError
        If there are not so many devices, or an id is repeated or not in 0..count-1.
    """
    if test == "all":
        return None
    if isinstance(test, str):
        raise ConfigError(f"test must be a number of devices, a list of ids or 'all', got {test!r}")
    if isinstance(test, int):
        if not 0 <= test <= count:
            raise ConfigError(f"test must be in 0..{count} (there are {count} devices), got {test}")
        return tuple(range(count - test, count))
    wrong = [device for device in test if not 0 <= device < count]
    if wrong:
        raise ConfigError(f"test names device {wrong[0]}, but ids are 0..{count - 1}")
    if len(set(test)) < len(test):
        raise ConfigError(f"test names a device twice: {', '.join(map(str, test))}")
    return tuple(sorted(test))
