"""From what the server saw to what an attacker can compute with: equations, inequalities, sums of gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.audit.transcript import Exchange, Subjects, exchanges
from fedsplit.common.arrays import FloatArray, IntArray, unpack_bitmap
from fedsplit.data import Records
from fedsplit.guard.criterion import LayerMap
from fedsplit.guard.releaser import Releaser
from fedsplit.model.activations import Preimage
from fedsplit.model.layer import FirstLayer
from fedsplit.release.making import Chunk
from fedsplit.release.policy import Policy
from fedsplit.release.streams import simulation_secret
from fedsplit.wire.release import Release

Array = NDArray[np.float64]
_ROUNDING = 1e-6  # of a device's own pre-activations
_SURE = 4.0  # standard deviations of noise that a bound is apart from what was sent


@dataclass(frozen=True)
class Seen:
    """One release of some of the targets.

    Attributes
    ----------
    weights : float32 array (parameters,)
    targets : int64 array (records,)
        Places among the targets.
    pattern : bool array (records, width)
    values : float32 array (records, width)
        Zero where nothing was sent.
    """

    weights: FloatArray
    targets: IntArray
    pattern: NDArray[np.bool_]
    values: FloatArray


@dataclass(frozen=True)
class GradientGroup:
    """All sums of first-layer gradients over the records of one node, or of one device.

    Attributes
    ----------
    deltas : sequence of float32 arrays (records, width)
        Per sum: gradients at the pre-activations, which the server knows.
    sums : sequence of float64 arrays (parameters,)
    places : int64 array (records,)
        Each record's place among the targets, -1 for others.
    targets : NDArray
        The records' labels.
    """

    deltas: Sequence[FloatArray]
    sums: Sequence[Array]
    places: IntArray
    labels: NDArray[Any]


@dataclass(frozen=True)
class Evidence:
    """Everything that an audit attacks with."""

    layer: FirstLayer
    dropping: Policy
    dtype: str
    subjects: Subjects
    seen: Sequence[Seen]
    groups: Sequence[GradientGroup]

    def map(self, weights: FloatArray) -> LayerMap:
        """Return the linear map of some weights."""
        return LayerMap(self.layer, self.layer.unflatten(weights))

    def bias(self, weights: FloatArray) -> Array:
        """Return what the layer adds to each output, float64 ``(width,)``."""
        nothing = np.zeros((1, *self.layer.input_shape), dtype=np.float32)
        return self.layer.pre_activations(self.layer.unflatten(weights), nothing).flatten().numpy().astype(np.float64)


def recorded(folder: Path, layer: FirstLayer, dropping: Policy, dtype: str) -> Evidence:
    """Read what a finished run has recorded.

    Parameters
    ----------
    folder : Path
        Where the run recorded its exchanges and subjects.
    layer : FirstLayer
    dropping : Policy
    dtype : str
        ``float16`` or ``float32``, of the values on the wire.

    Raises
    ------
    DataError
        If a file is missing or damaged.
    """
    subjects = Subjects.load(folder)
    place = {(d, i): t for t, (d, i) in enumerate(zip(subjects.device.tolist(), subjects.index.tolist(), strict=True))}
    seen: list[Seen] = []
    sums = _Sums(layer)
    for exchange in exchanges(folder, layer.size):
        names = list(zip(exchange.owners.tolist(), exchange.index.tolist(), strict=True))
        rows = np.array([i for i, name in enumerate(names) if name in place], dtype=np.int64)
        if len(rows):
            pattern, values = dense(exchange.upload.release)
            targets = np.array([place[names[i]] for i in rows], dtype=np.int64)
            seen.append(Seen(exchange.download.weights, targets, pattern[rows], values[rows]))
        sums.add(exchange, names)
    return Evidence(layer, dropping, dtype, subjects, seen, sums.groups(place))


def rehearsed(layer: FirstLayer, dropping: Policy, dtype: str, subjects: Subjects, seed: int) -> Evidence:
    """Return what one release of the targets would show before any training, under the layer's own weights.

    Parameters
    ----------
    layer : FirstLayer
    dropping : Policy
    dtype : str
        ``float16`` or ``float32``, of the values on the wire.
    subjects : Subjects
    seed : int
        Of the simulated device's secret.
    """
    weights = layer.flatten(layer.initial_weights())
    pattern, values = released(layer, dropping, dtype, weights, subjects.x, seed)
    seen = Seen(weights, np.arange(len(subjects.x)), pattern, values)
    return Evidence(layer, dropping, dtype, subjects, [seen], [])


def released(
    layer: FirstLayer, dropping: Policy, dtype: str, weights: FloatArray, x: FloatArray, seed: int
) -> tuple[NDArray[np.bool_], FloatArray]:
    """Return which outputs some records would release, and their values.

    Parameters
    ----------
    layer : FirstLayer
    dropping : Policy
    dtype : str
        ``float16`` or ``float32``, of the values on the wire.
    weights : float32 array
        The layer's, flat.
    x : float32 array (records, *input_shape)
    seed : int
        Of the simulated device's secret.

    Returns
    -------
    pattern : bool array (records, width)
    values : float32 array (records, width)
        0 where nothing is sent.
    """
    chunk = Chunk.of(0, Records(x, np.zeros(len(x), dtype=np.int64)))
    return dense(_release(layer, dropping, dtype, weights, chunk, simulation_secret(seed, 0)))


def released_bytes(layer: FirstLayer, dropping: Policy, dtype: str, chunk: Chunk, secret: bytes) -> tuple[bytes, int]:
    """Return a device's release as it would stand on the wire, under the layer's own weights.

    Parameters
    ----------
    layer : FirstLayer
    dropping : Policy
    dtype : str
        ``float16`` or ``float32``, of the values on the wire.
    chunk : Chunk
        The device's records.
    secret : bytes
        The device's.

    Returns
    -------
    bytes
        The release.
    int
        The number of outputs in it.
    """
    release = _release(layer, dropping, dtype, layer.flatten(layer.initial_weights()), chunk, secret)
    return b"".join(np.ascontiguousarray(array).tobytes() for array in release.arrays()), int(release.counts.sum())


def _release(
    layer: FirstLayer, dropping: Policy, dtype: str, weights: FloatArray, chunk: Chunk, secret: bytes
) -> Release:
    return Releaser(layer, dropping, dtype, lambda _: secret).unguarded(chunk, weights, "audit")


def dense(release: Release) -> tuple[NDArray[np.bool_], FloatArray]:
    """Return pattern and values ``(records, width)`` of a release."""
    pattern = unpack_bitmap(release.bitmap, release.width)
    values = np.zeros(pattern.shape, dtype=np.float32)
    values[pattern] = release.values()
    return pattern, values


class _Sums:
    """Puts sums of gradients together with the releases that they are about."""

    def __init__(self, layer: FirstLayer) -> None:
        self._layer = layer
        self._released: dict[tuple[int, int], tuple[list[tuple[int, int]], Release]] = {}
        self._found: dict[tuple[int, int], list[tuple[dict[tuple[int, int], FloatArray], Array]]] = {}
        self._labels: dict[tuple[int, int], Any] = {}

    def add(self, exchange: Exchange, names: list[tuple[int, int]]) -> None:
        """Note an exchange's release, and its sums."""
        node, lost = exchange.node, set(exchange.upload.lost.tolist())
        for group, total in zip(exchange.upload.gradients.devices, exchange.upload.gradients.sums, strict=True):
            deltas: dict[tuple[int, int], FloatArray] = {}
            for block in exchange.download.pending:
                if block.round_number not in lost and (node, block.round_number) in self._released:
                    of, release = self._released[node, block.round_number]
                    part = release.among(block.devices)
                    those = set(block.devices.tolist())
                    of = [name for name in of if name[0] in those]
                    for name, row in zip(of, self._delta(part, block.values()), strict=True):
                        if group in (-1, name[0]):
                            deltas[name] = deltas.get(name, 0) + row
            self._found.setdefault((node, int(group)), []).append((deltas, total))
        if len(names):
            self._released[node, exchange.download.round_number] = (names, exchange.upload.release)
            self._labels.update(zip(names, exchange.upload.release.targets, strict=True))

    def _delta(self, release: Release, cut: FloatArray) -> FloatArray:
        pattern, values = dense(release)
        delta = np.zeros(pattern.shape, dtype=np.float32)
        delta[pattern] = cut
        if not self._layer.unit_slope:
            before = self._layer.nonlinearity.inverse(values[pattern].astype(np.float64))
            delta[pattern] *= self._layer.derivative(before.astype(np.float32))
        return delta

    def groups(self, place: dict[tuple[int, int], int]) -> list[GradientGroup]:
        """Return the groups that some target is in."""
        groups = []
        for sums in self._found.values():
            names = sorted({name for deltas, _ in sums for name in deltas})
            places = np.array([place.get(name, -1) for name in names], dtype=np.int64)
            if (places >= 0).any():
                nothing = np.zeros(self._layer.width, dtype=np.float32)
                deltas = [np.stack([d.get(name, nothing) for name in names]) for d, _ in sums]
                labels = np.array([self._labels[name] for name in names])
                groups.append(GradientGroup(deltas, [total for _, total in sums], places, labels))
        return groups


@dataclass(frozen=True)
class Equations:
    """What each of some targets is known to satisfy: ``rows @ x = rhs`` within ``noise``, and ``left @ x <= right``."""

    rows: list[Array]
    rhs: list[Array]
    noise: list[Array]
    inequalities: list[tuple[Array, Array]]

    @property
    def any(self) -> bool:
        """Whether there is anything to solve."""
        return any(len(r) for r in self.rhs) or any(len(r) for _, r in self.inequalities)


def equations(evidence: Evidence, targets: IntArray) -> Equations:
    """Gather the equations of some targets over all their releases.

    A value sent is an equation where it tells the output, and that its pre-activation, within an error; else it bounds
    this. So does what was not sent, where the policy tells why.
    """
    n = int(np.prod(evidence.layer.input_shape))
    found: dict[int, list[tuple[Array, Array, Array, Array, Array]]] = {t: [] for t in targets.tolist()}
    for seen in evidence.seen:
        rows, bias = evidence.map(seen.weights).rows(np.arange(evidence.layer.width)), evidence.bias(seen.weights)
        for i, target in enumerate(seen.targets.tolist()):
            if target in found:
                found[target].append(_one(evidence, rows, bias, seen.pattern[i], seen.values[i]))
    empty = (np.zeros((0, n)), np.zeros(0), np.zeros(0), np.zeros((0, n)), np.zeros(0))
    parts = [[np.concatenate(p) for p in zip(empty, *found[t], strict=True)] for t in targets.tolist()]
    return Equations([p[0] for p in parts], [p[1] for p in parts], [p[2] for p in parts], [(p[3], p[4]) for p in parts])


def _one(
    evidence: Evidence, rows: Array, bias: Array, pattern: NDArray[np.bool_], values: FloatArray
) -> tuple[Array, Array, Array, Array, Array]:
    """Return a release's equations with their noise, and its inequalities."""
    sent, least, most = _preimage(evidence, values[pattern]), np.full(len(bias), -np.inf), np.full(len(bias), np.inf)
    known = np.isfinite(sent.deviation)
    least[pattern], most[pattern] = np.where(known, -np.inf, sent.low), np.where(known, np.inf, sent.high)
    limit = evidence.dropping.silence(evidence.layer).limit(pattern, values)
    silent = ~pattern & np.isfinite(limit)
    least[silent], most[silent] = evidence.layer.nonlinearity.within(limit[silent])
    above, below = np.isfinite(least), np.isfinite(most)
    left, right = (
        np.concatenate([rows[below], -rows[above]]),
        np.concatenate([(most - bias)[below], (bias - least)[above]]),
    )
    exact = np.flatnonzero(pattern)[known]
    return rows[exact], sent.point[known] - bias[exact], sent.deviation[known] + _ROUNDING, left, right


def _preimage(evidence: Evidence, values: FloatArray) -> Preimage:
    """Return what a record's values as sent tell of its pre-activations."""
    code, noisy, sent = evidence.dropping.code, evidence.dropping.noisy, values.astype(np.float64)
    deviation = 0.0 if noisy is None else noisy.deviation
    error, (least, most) = np.hypot(code.error(sent, evidence.dtype), deviation), code.bounds(sent, evidence.dtype)
    apart = _SURE * deviation
    return evidence.layer.nonlinearity.preimage(code.centre(sent), error, least - apart, most + apart)
