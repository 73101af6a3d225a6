"""The device's side of a prediction: first layer, dropping and guard here, the rest wherever the trunk is.

A record is known by its content, as float32: the same one always keeps the same outputs, and asking again releases
nothing new. One that differs in a single bit is another record.
"""

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray, IntArray
from fedsplit.common.errors import DataError, RunError
from fedsplit.device.bundle import Bundle
from fedsplit.device.home import ASKED, Home
from fedsplit.guard.releaser import Releaser
from fedsplit.model.tasks.base import Task
from fedsplit.release.making import Chunk
from fedsplit.release.streams import KEYED_ROUND
from fedsplit.wire.exchange import weights_digest
from fedsplit.wire.ledger import Reason
from fedsplit.wire.query import MOST_RECORDS, Query

Ask = Callable[[bytes], FloatArray]
_LARGEST = 1e30
_LEDGER = "test"  # what leaves for predictions is counted where test records are


@dataclass(frozen=True)
class Predictions:
    """What came back.

    Attributes
    ----------
    outputs : float32 array (records, outputs)
        The trunk's; NaN for records that did not leave.
    refused : int64 array (records,)
        0, or why the guard let a record not leave (:class:`fedsplit.wire.ledger.Reason`).
    task : Task
    """

    outputs: FloatArray
    refused: IntArray
    task: Task

    def values(self) -> list[Any]:
        """Return what the task decides, such as a class or a list of numbers; None for one that did not leave."""
        found = self.task.decide(self.outputs).tolist()
        return [None if reason else value for value, reason in zip(found, self.refused.tolist(), strict=True)]

    def why(self) -> dict[str, int]:
        """Return how many records were refused for which reason."""
        reasons, counts = np.unique(self.refused[self.refused != 0], return_counts=True)
        return {Reason(r).name.lower(): n for r, n in zip(reasons.tolist(), counts.tolist(), strict=True)}


class Predictor:
    """Asks for predictions of records that stay here.

    Parameters
    ----------
    bundle : Bundle
        The device's half of the model.
    home : Home
        The device's own folder: its secret, its limits, its ledgers.
    ask : callable
        Sends a packed :class:`fedsplit.wire.query.Query` and returns the trunk's outputs ``(records, outputs)``.
    """

    def __init__(self, bundle: Bundle, home: Home, ask: Ask) -> None:
        self._bundle, self._home, self._ask = bundle, home, ask
        self._weights = bundle.weights
        self._device = home.devices[0]
        self._releaser = Releaser(bundle.layer, bundle.dropping, bundle.dtype, home.device_secret)

    @classmethod
    def connect(
        cls,
        server: str,
        *,
        device: Path | str,
        home: Path | str,
        token: str | None = None,
        authority: Path | str | None = None,
    ) -> "Predictor":
        """Return one that asks a service.

        Parameters
        ----------
        server : str
            ``https://HOST:PORT``.
        device : Path or str
            The folder that ``fedsplit export`` wrote.
        home : Path or str
            The device's own folder.
        token : str, optional
        authority : Path or str, optional
            The certificate that the server's must be signed by; default: the system's.

        Raises
        ------
        FedsplitError
            If a folder is missing or damaged, or the address or the token cannot be used.
        """
        from fedsplit.device.remote import Remote

        own = Home(Path(home))
        bundle = Bundle.load(Path(device), own.allowed)
        own.check()
        return cls(bundle, own, Remote(server, bundle.model, token, Path(authority) if authority else None))

    def predict(self, raw: NDArray[Any]) -> Predictions:
        """Return predictions for raw records ``(records, *input_shape)``, in their units of before the scaling.

        Many records are asked about in several queries.

        Raises
        ------
        DataError
            If they have another shape or units, or hold anything but finite numbers.
        StateError
            If the device's own folder is damaged: nothing leaves.
        RunError
            If no answer comes, or one that fits nothing.
        """
        numbers = self._checked(raw)
        starts = range(0, len(numbers), MOST_RECORDS)
        parts = [self._predict(numbers[start : start + MOST_RECORDS]) for start in starts]
        outputs, refused = (np.concatenate(each) for each in zip(*parts, strict=True))
        return Predictions(outputs, refused, self._bundle.task)

    def _predict(self, raw: NDArray[np.float64]) -> tuple[FloatArray, IntArray]:
        query, refused = self.release(raw)
        outputs = np.full((len(refused), self._bundle.outputs), np.nan, dtype=np.float32)
        left = refused == 0
        if left.any():
            found = self._ask(query.to_bytes())
            if found.shape != outputs[left].shape or not np.isfinite(found).all():
                raise RunError(f"the answer must be finite numbers of shape {outputs[left].shape}, got {found.shape}")
            outputs[left] = found
        return outputs, refused

    def release(self, raw: NDArray[Any]) -> tuple[Query, IntArray]:
        """Return what may leave of some records, written down already, and why others may not; see :meth:`predict`."""
        bundle, chunk = self._bundle, self._chunk(raw)
        guard = self._home.guard(_LEDGER, bundle.layer)
        made = self._releaser.make(chunk, self._weights, KEYED_ROUND, f"predict {bundle.scaling}")
        leaving = self._releaser.admit(guard, made)
        release = self._releaser.pack(leaving, np.zeros(len(leaving.chunk.index), dtype=np.int64))
        refused = leaving.codes if guard.enforce else np.zeros_like(leaving.codes)
        return Query(weights_digest(self._weights), release), refused

    def _chunk(self, raw: NDArray[Any]) -> Chunk:
        """Return the scaled records, known by their content."""
        # by the raw numbers: whoever made the scaling has no say in which record is which
        content = np.ascontiguousarray(self._checked(raw), dtype="<f4") + np.float32(0.0)  # -0.0 is 0.0
        # and of nothing else: what float32 cannot tell apart would leave again and again as one record
        x = self._bundle.scaling.apply(content.astype(np.float64)).astype(np.float64)
        if not np.isfinite(x).all():
            raise DataError("records must be in the model's units: these are too large")
        hashes = [hmac.digest(self._home.secret, row.tobytes(), "sha256")[:8] for row in content]
        words = np.frombuffer(b"".join(hashes), dtype="<u8")
        names = (words >> 3).astype(np.int64) | ASKED
        # summed up in float64: another order of the sum, as in another runtime, changes no bit of what is sent
        index = (words & 0xFFFFFFFF).astype(np.int64)
        device = np.array([self._device])
        return Chunk(device, np.array([len(x)]), index, names[:, None], x, np.zeros(len(x)), names)

    def _checked(self, raw: NDArray[Any]) -> NDArray[np.float64]:
        shape, scaling = self._bundle.layer.input_shape, self._bundle.scaling
        try:
            numbers = np.asarray(raw, dtype=np.float64)
        except (TypeError, ValueError):
            raise DataError("records must be numbers") from None
        if numbers.shape[1:] != shape or not len(numbers):
            raise DataError(f"records must have shape (records, {', '.join(map(str, shape))}), got {numbers.shape}")
        if not np.isfinite(numbers).all():
            raise DataError("records must be finite, got NaN or infinity")
        if np.abs(numbers).max() > _LARGEST:
            raise DataError("records must be in the model's units: these are too large")
        if numbers.min() < scaling.low or numbers.max() > scaling.high:
            raise DataError(f"records must be in the model's units, {scaling.low:g} to {scaling.high:g}")
        if scaling.looks_scaled(numbers):
            raise DataError(f"records must be raw, up to {scaling.high:g}: these look scaled already")
        return numbers
