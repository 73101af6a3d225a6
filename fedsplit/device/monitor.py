"""The device's side of being watched: it says what is normal for it, and asks how new what it does is.

Records stay here; what leaves of them passes the guard and is the same whenever it is asked about, so that an episode's
records, which are sent again with every new one, release nothing twice.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import IntArray
from fedsplit.common.errors import ConfigError, DataError, RunError
from fedsplit.device.predictor import Predictor
from fedsplit.device.remote import Remote
from fedsplit.wire.ledger import Reason
from fedsplit.wire.query import EPISODE, LONGEST, MOST_RECORDS, SHORTEST, WATCHED_NAME

log = logging.getLogger(__name__)


class WithheldError(RunError):
    """The guard lets records not leave.

    Parameters
    ----------
    refused : int64 array (records,)
        0, or why one may not.
    """

    def __init__(self, refused: IntArray) -> None:
        self.refused = refused
        why = ", ".join(sorted({Reason(code).name.lower() for code in refused[refused != 0].tolist()}))
        super().__init__(
            f"{np.count_nonzero(refused)} of {len(refused)} records may not leave, for the limits on {why}"
        )


@dataclass(frozen=True)
class Verdict:
    """How new an episode is.

    Attributes
    ----------
    scores : float64 array (:data:`EPISODE`,)
        Of its records.
    episode, threshold : float
    alarm : bool
        Whether the episode's score is above the threshold.
    """

    scores: NDArray[np.float64]
    episode: float
    threshold: float
    alarm: bool


class Monitor:
    """A device that a service watches.

    Parameters
    ----------
    predictor : Predictor
        Of a task that watches; releases records as far as the owner's limits allow.
    remote : Remote
        The service.
    device : str
        What the device is called there; with a token, the token's name.

    Raises
    ------
    ConfigError
        If nothing can be called so.
    """

    def __init__(self, predictor: Predictor, remote: Remote, device: str) -> None:
        if not WATCHED_NAME.fullmatch(device):
            raise ConfigError(f"a device's name must be 1..64 letters, digits, '_', '.' and '-', got {device!r}")
        self._predictor, self._remote, self._device = predictor, remote, device
        self._last: list[NDArray[Any]] = []

    def calibrate(self, recordings: Sequence[NDArray[Any]], seconds: float) -> float:
        """Say what is normal, in place of what was said before, and return the threshold for episodes.

        Records that the guard lets not leave are left out.

        Parameters
        ----------
        recordings : sequence of arrays (records, *input_shape)
            Raw, each of one stretch of something normal.
        seconds : float
            From one record to the next.

        Raises
        ------
        DataError
            If there are too many or no records, or they or the time cannot be used; see :meth:`Predictor.release`.
        WithheldError
            If none may leave.
        RunError
            If the service refuses, or answers what is no answer.
        """
        if not SHORTEST <= seconds <= LONGEST:
            raise DataError(f"from one record to the next must be {SHORTEST:g} to {LONGEST:g} s, got {seconds:g}")
        counts = [len(recording) for recording in recordings if np.ndim(recording)]
        if not (counts and all(counts) and sum(counts) <= MOST_RECORDS):
            raise DataError(f"to calibrate takes 1..{MOST_RECORDS} records, some of each recording, got {counts}")
        try:
            raw = np.concatenate(recordings)
        except (TypeError, ValueError):
            raise DataError("recordings must have records of one shape") from None
        query, refused = self._predictor.release(raw)
        if refused.all():
            raise WithheldError(refused)
        if refused.any():
            log.warning("%s", WithheldError(refused))
        left = [int((part == 0).sum()) for part in np.split(refused, np.cumsum(counts)[:-1])]
        asked = f"normal?recordings={','.join(str(n) for n in left if n)}&seconds={float(seconds)!r}"
        return _number(self._ask(asked, query.to_bytes()), "threshold")

    def take(self, record: NDArray[Any]) -> Verdict | None:
        """Return how new a record is together with those taken before, or None as long as they are too few.

        Raises as :meth:`judge`; a record that may not leave is then as if it had not been.
        """
        self._last = [*self._last, record][-EPISODE:]
        if len(self._last) < EPISODE:
            return None
        try:
            return self.judge(np.stack(self._last))
        except WithheldError as error:
            self._last = [each for each, reason in zip(self._last, error.refused, strict=True) if not reason]
            raise

    def begin(self) -> None:
        """Begin a new episode: the next record does not follow the last."""
        self._last = []

    def judge(self, records: NDArray[Any]) -> Verdict:
        """Return how new :data:`EPISODE` consecutive records are.

        Raises as :meth:`calibrate`; WithheldError if one of them may not leave.
        """
        query, refused = self._predictor.release(records)
        if refused.any():
            raise WithheldError(refused)
        answer = self._ask("episode", query.to_bytes())
        try:
            scores = np.asarray(answer["scores"], dtype=np.float64)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise RunError("the answer is no verdict") from None
        if scores.shape != (EPISODE,) or not np.isfinite(scores).all():
            raise RunError("the answer is no verdict")
        score, threshold = _number(answer, "episode"), _number(answer, "threshold")
        return Verdict(scores, score, threshold, score > threshold)

    def _ask(self, what: str, payload: bytes) -> Any:
        return self._remote.ask(f"devices/{self._device}/{what}", payload)


def _number(answer: Any, name: str) -> float:
    try:
        found = float(answer[name])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise RunError("the answer is no verdict") from None
    if not np.isfinite(found):
        raise RunError("the answer is no verdict")
    return found
