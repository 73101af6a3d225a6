"""What attackers make of the messages that are sent in the labels' stead."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment

Float = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Seen:
    """One answer: what the server knows of it, and for scoring alone the labels and which records they are of."""

    features: Float
    weight: Float
    probabilities: Float
    gradients: Float
    head: Float
    y: Labels
    records: Labels


def residuals(seen: Seen) -> Float:
    """Return how far each record's gradient is from that of each class ``(records, classes)``, over its own size."""
    expected = (seen.probabilities @ seen.weight)[:, None] - seen.weight  # (records, classes, features)
    distances = np.square(seen.gradients[:, None] - expected).sum(axis=2)
    return np.asarray(distances / np.mean(np.square(expected)))


def from_head(seen: list[Seen]) -> float:
    """Return the share of labels that the closest class gives, each time that a record is sent."""
    return float(np.mean(np.concatenate([residuals(s).argmin(axis=1) == s.y for s in seen])))


def from_linked(seen: list[Seen]) -> float:
    """Return the share of records whose label all their gradients together give."""
    records, where = np.unique(np.concatenate([s.records for s in seen]), return_inverse=True)
    total = np.zeros((len(records), len(seen[0].weight)))
    np.add.at(total, where, np.concatenate([residuals(s) for s in seen]))
    y = np.zeros(len(records), dtype=np.int64)
    y[where] = np.concatenate([s.y for s in seen])
    return float(np.mean(total.argmin(axis=1) == y))


def from_sums(seen: list[Seen]) -> float:
    """Return the share of labels that least squares give, of the equations that sums over a node's records are."""

    def guessed(s: Seen) -> Labels:
        classes, features = s.weight.shape
        known, sums = s.features, s.head[: s.weight.size].reshape(classes, features).T
        if len(s.head) > s.weight.size:
            known = np.concatenate([known, np.ones((len(known), 1))], axis=1)
            sums = np.concatenate([sums, s.head[None, s.weight.size :]])
        # of the wanted onehot = softmax - gradient at the outputs; what no equation tells stays as the softmax has it
        at_outputs = np.linalg.lstsq(known.T, sums, rcond=1e-6)[0]
        return np.asarray((s.probabilities - at_outputs).argmax(axis=1))

    return float(np.mean(np.concatenate([guessed(s) == s.y for s in seen])))


def from_clusters(rounds: list[list[Seen]], part: Callable[[Seen], Float], rng: np.random.Generator) -> float:
    """Return the share of labels that clusters of directions give, by round, if every cluster had the best name."""
    right = total = 0
    for seen in rounds:
        rows, y = np.concatenate([part(s) for s in seen]), np.concatenate([s.y for s in seen])
        classes = len(seen[0].weight)
        counts = np.zeros((classes, classes), dtype=np.int64)
        np.add.at(counts, (_clusters(rows, classes, rng), y), 1)
        right += counts[linear_sum_assignment(-counts)].sum()
        total += len(y)
    return float(right / total)


def _clusters(rows: Float, classes: int, rng: np.random.Generator) -> Labels:
    """Return the cluster of each row by its direction, the best of five tries of k-means."""
    directions = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty cluster is a bad try: another is better
        tries = [kmeans2(directions, classes, minit="++", rng=rng) for _ in range(5)]
    cost = [np.square(directions - centres[names]).sum() for centres, names in tries]
    return np.asarray(tries[int(np.argmin(cost))][1])
