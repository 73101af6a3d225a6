"""Two small cases, not proofs: is something new noticed in releases of a layer that nobody taught."""

import csv
import io
from typing import Any

import numpy as np
import torch

from fedsplit.common.errors import DataError
from fedsplit.common.seeds import seed_of
from fedsplit.data import packaged
from fedsplit.data.loading import installed_file, verified_bytes
from fedsplit.model.zoo import build_model
from fedsplit.release.policy import Policy
from fedsplit.server.novelty.space import Space
from fedsplit.server.novelty.trunk import auc
from simulations.health.detectors import Releases, neighbours, released


def tumours(dropping: Policy, width: int, seed: int) -> dict[str, Any]:
    """Take malignant tumours for the novelty; half of the benign ones are normal.

    Nothing says who the patients are, so that there is neither a device's own calibration nor an episode.
    """
    pool = packaged.breast_cancer()
    benign = np.random.default_rng(seed).permutation(np.flatnonzero(pool.y == 1))
    half = len(benign) // 2
    rows = np.concatenate([benign, np.flatnonzero(pool.y == 0)])
    torch.manual_seed(seed_of(seed, "model"))
    first = build_model("mlp", pool.x.shape[1:], 2, 4 * width, "relu").first_layer
    nobody = np.zeros(len(rows), np.int64)
    batches = released(first, dropping, pool.x[rows], nobody, nobody, seed)
    dense = batches.dense(np.arange(len(rows)))[0].astype(np.float64)
    space = Space.of(dense[:half], nobody[:half])  # there is nothing to learn: a Mahalanobis distance
    found = np.square((dense[half:] - space.mean) @ space.whitening).sum(axis=1)
    return {"auc": auc(pool.y[rows[half:]] == 0, found)}


BLEEDING = "aeon/datasets/data/KDD-TSAD_135/135_UCR_Anomaly_InternalBleeding16_TEST.csv"
BLEEDING_SHA256 = "fe26577b94896943e8205d04d56bf2511fe05c008df535a1ec3826adff3597e2"
NORMAL, BEAT, HOP = 1200, 200, 4  # samples that are known to be normal, of a window (about a period), and between two


def bleeding(dropping: Policy, width: int, seed: int) -> dict[str, Any] | None:
    """Look for the one anomaly of a pressure curve (UCR anomaly archive, 135: InternalBleeding16) in its releases.

    As the archive does it: found is what scores highest, right if it lies within 100 samples of the anomaly. Scores are
    distances to the nearest of the releases of the first 1,200 samples. None if the package aeon 1.6.0 is not there.
    """
    try:
        path = installed_file("aeon", BLEEDING, missing="the package aeon 1.6.0 is not there")
    except DataError:
        return None
    text = verified_bytes(path, BLEEDING_SHA256).decode("ascii")
    table = np.array([[float(v) for v in row[1:]] for row in list(csv.reader(io.StringIO(text)))[1:]])
    series = (table[:, 0] - table[:NORMAL, 0].mean()) / table[:NORMAL, 0].std()
    x = np.lib.stride_tricks.sliding_window_view(series, BEAT)[::HOP, None].astype(np.float32)
    torch.manual_seed(seed_of(seed, "model"))
    first = build_model("sensor-cnn", x.shape[1:], 2, width, "relu").first_layer
    nobody = np.zeros(len(x), np.int64)
    batches = released(first, dropping, x, nobody, nobody, seed)
    releases = Releases(batches, batches.targets, batches.targets, lambda _: first.layer, first.cut_shape, 1, seed)
    starts, method = np.arange(len(x)) * HOP, neighbours(releases)
    scores = method.normal(np.flatnonzero(starts + BEAT <= NORMAL)).scores(method.rows)
    tested = starts >= NORMAL
    anomalous = np.flatnonzero(table[:, 1])
    new = np.array([(table[s : s + BEAT, 1] > 0).any() for s in starts])
    at = int(starts[tested][np.argmax(scores[tested])]) + BEAT // 2
    right = bool(anomalous[0] - 100 <= at <= anomalous[-1] + 100)
    return {"auc": auc(new[tested], scores[tested]), "right": right}
