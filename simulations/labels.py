"""What labels at home keep from the server: label inference from all that is sent in their stead.

    python simulations/labels.py configs/wearables.toml configs/digits.toml --seeds 1 2 3

Each configuration is trained with mode `synchronous` and labels shared, then at home, then with Gaussian noise on what
the devices send in their labels' stead. The attackers read the messages alone:

- `head`: an honest-but-curious server. It knows features and head, and tries every class: the gradient at a record's
  features is W'(softmax(Wh + b) - onehot(y)). `linked`: it adds up what all rounds tell of the same record.
- `sum`: the same server, from the head's gradient alone, which is summed over a node's records: as many equations as
  there are features (and one), for one unknown per record and class.
- `clusters`: somebody who does not know the head, and groups a round's gradients by their direction (k-means; clusters
  are given the names that fit best, so this is a bound). `features`: the same with the features, which is what
  releases without any labels tell.

Chance is the share of the largest class. Writes a table and `labels.json` to `simulations/results/labels`.
"""

import argparse
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment

from fedsplit import simulate
from fedsplit.device.at_home import AtHomeNode
from fedsplit.model.head import Head
from fedsplit.plan.settings import load_settings
from fedsplit.wire.head import HeadDownload, HeadUpload, Rows

RESULTS = Path(__file__).parent / "results" / "labels"
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


@contextmanager
def watched(seen: list[Seen], noise: float, rng: np.random.Generator) -> Iterator[None]:
    """Note what nodes send in their labels' stead, after adding noise to it."""
    honest = AtHomeNode.apply_head

    def apply(self: AtHomeNode, download: HeadDownload, *, test: bool) -> HeadUpload:
        upload = honest(self, download, test=test)
        if test or not upload.records:
            return upload
        upload = _noisy(upload, download, self.head, noise, rng)
        pending = self._state(download.run).load_pending(download.round_number)
        y = self._targets(pending, download, test=False)
        assert pending is not None and y is not None
        records = (np.repeat(pending.devices, pending.records) << 32) | pending.index
        seen.append(_seen(upload, download, self.head, y, records))
        return upload

    with patch.object(AtHomeNode, "apply_head", apply):
        yield


def _noisy(
    upload: HeadUpload, download: HeadDownload, head: Head, noise: float, rng: np.random.Generator
) -> HeadUpload:
    """Add noise of so many times the numbers' own size, and stay within what labels can give: else they are refused."""
    if not noise:
        return upload
    at_features, at_head = upload.features.values(), upload.head
    at_features = at_features + rng.normal(size=at_features.shape) * noise * np.sqrt(np.mean(at_features**2))
    at_head = at_head + rng.normal(size=at_head.shape) * noise * np.sqrt(np.mean(at_head**2))
    most = 2 * np.abs(head.weight(download.head)).max(axis=0)
    columns = np.abs(download.features.values()).sum(axis=0)
    bounds = np.concatenate([np.tile(columns, head.outputs), np.full(head.outputs * head.bias, upload.records)])
    rows = np.clip(at_features, -most, most).astype(np.float32)
    dtype = upload.features.codes.dtype.name
    return replace(upload, features=Rows.pack(rows, dtype), head=np.clip(at_head, -bounds, bounds))


def _seen(upload: HeadUpload, download: HeadDownload, head: Head, y: Labels, records: Labels) -> Seen:
    h, parameters = download.features.values().astype(np.float64), download.head.astype(np.float64)
    weight = head.weight(parameters)
    outputs = h @ weight.T + parameters[weight.size :]
    p = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return Seen(h, weight, p, upload.features.values().astype(np.float64), upload.head, y, records)


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
        directions = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
        classes = len(seen[0].weight)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty cluster is a bad try: another is better
            tries = [kmeans2(directions, classes, minit="++", rng=rng) for _ in range(5)]
        cost = [np.square(directions - centres[names]).sum() for centres, names in tries]
        names = tries[int(np.argmin(cost))][1]
        counts = np.zeros((classes, classes), dtype=np.int64)
        np.add.at(counts, (names, y), 1)
        right += counts[linear_sum_assignment(-counts)].sum()
        total += len(y)
    return float(right / total)


def _run(config: str, seed: int, rounds: int, chunk: int, labels: str) -> dict[str, Any]:
    settings = load_settings(
        config,
        [
            f"run.seed={seed}",
            f"run.rounds={rounds}",
            "run.engine=inline",
            "protocol.mode=synchronous",
            f"protocol.labels={labels}",
            f"protocol.chunk={chunk}",
            "protocol.batch-size=1000000",
        ],
    )
    with TemporaryDirectory() as folder:
        return simulate(settings, out=Path(folder) / "run")


def study(config: str, seed: int, rounds: int, chunk: int, noises: list[float]) -> list[dict[str, Any]]:
    """Train with labels shared, at home, and at home with noise; attack the latter."""
    shared = _run(config, seed, rounds, chunk, "shared")
    name = Path(config).stem
    rows = [
        {"data": name, "seed": seed, "labels": "shared", "noise": 0.0, "accuracy": shared["test_accuracy"], "head": 1.0}
    ]
    for noise in (0.0, *noises):
        seen: list[Seen] = []
        rng = np.random.default_rng([seed, round(1000 * noise)])
        with watched(seen, noise, rng):
            result = _run(config, seed, rounds, chunk, "at-home")
        nodes = len(seen) // rounds
        by_round = [seen[i : i + nodes] for i in range(0, len(seen), nodes)]
        some = by_round[:: max(1, rounds // 20)]  # clusters of twenty rounds, from the first to the last
        y = np.concatenate([s.y for s in seen])
        rows.append(
            {
                "data": name,
                "seed": seed,
                "labels": "at-home",
                "noise": noise,
                "accuracy": result["test_accuracy"],
                "chance": float(np.bincount(y).max() / len(y)),
                "head": from_head(seen),
                "linked": from_linked(seen),
                "sum": from_sums(seen),
                "clusters": from_clusters(some, lambda s: s.gradients, rng),
                "features": from_clusters(some, lambda s: s.features, rng),
                "records_of_a_node": float(np.mean([len(s.y) for s in seen])),
                "numbers_of_the_head": int(seen[0].head.size),
                "bytes": {
                    labels: r["bytes_up"] + r["bytes_down"] for labels, r in (("shared", shared), ("at-home", result))
                },
                "exchanges": {"shared": shared["exchanges"], "at-home": result["exchanges"]},
                "refused": result["failures"],
            }
        )
    return rows


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="labels found out, share of all (means over seeds)", title_justify="left")
    attacks = ("chance", "head", "linked", "sum", "clusters", "features")
    for name in ("data", "labels", "noise", "accuracy", *attacks):
        table.add_column(name, justify="left" if name in ("data", "labels") else "right")
    for key in dict.fromkeys((r["data"], r["labels"], r["noise"]) for r in rows):
        of = [r for r in rows if (r["data"], r["labels"], r["noise"]) == key]
        cells = [
            f"{np.mean([r[a] for r in of]):.3f}" if a in of[0] else "1.000" if a == "head" else "" for a in attacks
        ]
        table.add_row(key[0], key[1], f"{key[2]:g}", f"{np.mean([r['accuracy'] for r in of]):.3f}", *cells)
    return table


def main() -> None:
    """Train, attack, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--chunk", type=int, default=16, help="records of each device in a round")
    parser.add_argument("--noise", type=float, nargs="*", default=[1.0, 4.0], help="over the gradients' own size")
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    rows: list[dict[str, Any]] = []
    for config in arguments.configs:
        for seed in arguments.seeds:
            rows += study(config, seed, arguments.rounds, arguments.chunk, arguments.noise)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "labels.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    Console(width=130).print(_table(rows))


if __name__ == "__main__":
    main()
