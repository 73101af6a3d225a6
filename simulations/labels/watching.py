"""What nodes send in their labels' stead, as the server sees it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import numpy as np

from fedsplit.device.at_home import AtHomeNode
from fedsplit.model.head import Head
from fedsplit.wire.head import HeadDownload, HeadUpload, Rows
from simulations.labels.attacks import Labels, Seen


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
