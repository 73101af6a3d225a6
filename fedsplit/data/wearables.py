"""Smart-watch recordings of shoulder exercises: ten people, each side a device.

Source: D. Burns et al., "Shoulder Physiotherapy Exercise Recognition: Machine Learning the Inertial Signals from a
Smartwatch", arXiv 1802.01489. The recordings ship in the package seglearn 1.2.5.
"""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.data import loading
from fedsplit.data.records import Pool, Scaling, check_records
from fedsplit.model.tasks import task_of

PACKAGE, PATH = "seglearn", "seglearn/data/watch_dataset.npy"
SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
MISSING = "data set 'wearables' needs the package seglearn 1.2.5: pip install 'fedsplit[data]'"

CLASSES = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
WINDOW = 100  # samples: 2 s at 50 Hz
STEP = 50
SIDES = 2
HELD_OUT = (8, 9, 10)  # people, as the file numbers them

# Of each channel over all samples of people 1..7 (166,904 samples, before windowing): constants, because devices
# cannot pool statistics without showing them to each other. The source states no units: acceleration looks like g (its
# length has the median 1.07).
MEAN = np.array(
    [
        -0.01101531,  # ax: mean over people 1..7
        0.38464047,  # ay: likewise
        -0.13901094,  # az: likewise
        0.02085786,  # wx: likewise
        -0.00489245,  # wy: likewise
        0.01626428,  # wz: likewise
    ]
)
STD = np.array(
    [
        0.9337627,  # ax: standard deviation (divided by n) over people 1..7
        0.50430165,  # ay: likewise
        0.56635926,  # az: likewise
        1.04138691,  # wx: likewise
        2.59392847,  # wy: likewise
        1.12077084,  # wz: likewise
    ]
)


def load(overlap: bool = True) -> Pool:
    """Return 4,677 windows of 20 devices: device ``2 * (person - 1) + side``, person 1..10, side 0 (left), 1.

    Parameters
    ----------
    overlap : bool
        Whether windows overlap by half; if not, every second one is left out.

    Returns
    -------
    Pool
        x ``(windows, 6, 100)``: acceleration x, y, z and rotation x, y, z over 2 s, each channel normalised; y: the
        exercise, 0..6 (:data:`CLASSES`). Segments number the pieces of
        50 samples that overlapping windows share. People 8, 9 and 10 are held out.

    Raises
    ------
    DataError
        If seglearn is not installed or its file is damaged.
    """
    recordings = _read()
    stride = 1 if overlap else WINDOW // STEP
    windows = [_windows(series)[::stride] for series in recordings["X"]]
    counts = [len(w) for w in windows]
    person = np.repeat(recordings["subject"].astype(np.int64), counts)
    side = np.repeat(recordings["side"].astype(np.int64), counts)
    labels = np.repeat(recordings["y"], counts)
    raw, task = (np.concatenate(windows), labels), task_of("classification")
    records = check_records(raw, task=task, outputs=len(CLASSES), input_shape=(6, WINDOW), where="data set 'wearables'")
    return Pool(
        records.x,
        records.y,
        task=task,
        outputs=len(CLASSES),
        owners=SIDES * (person - 1) + side,
        people=tuple(p for p in range(1, 11) for _ in range(SIDES)),
        held_out=np.isin(person, HELD_OUT),
        segments=_segments(counts) if overlap else None,
        scaling=Scaling(tuple(MEAN.tolist()), tuple(STD.tolist())),
    )


def _segments(counts: list[int]) -> NDArray[np.int64]:
    """Number the two pieces of every window; the windows of one recording share a piece with the next, no others."""
    first = np.arange(sum(counts)) + np.repeat(np.arange(len(counts)), counts)
    return np.stack([first, first + 1], axis=1)


def _read() -> dict[str, Any]:
    path = loading.installed_file(PACKAGE, PATH, missing=MISSING)
    content = loading.verified_bytes(path, SHA256)
    # a pickle can run any code: only the very bytes whose checksum was right are unpickled
    recordings: dict[str, Any] = np.load(io.BytesIO(content), allow_pickle=True).item()
    return recordings


def _windows(series: NDArray[np.float64]) -> NDArray[np.float32]:
    normal = ((series - MEAN) / STD).astype(np.float32)  # (samples, 6)
    return np.lib.stride_tricks.sliding_window_view(normal, WINDOW, axis=0)[::STEP]  # (windows, 6, WINDOW)
