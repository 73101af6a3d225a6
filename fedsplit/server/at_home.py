"""What the trunk makes of a round's releases, where labels stay at home: features go down and gradients come up.

Each step of the trunk takes an exchange of its own. An evaluation takes one, too, in which sums over a node's records
come back.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedsplit.common.arrays import FloatArray
from fedsplit.common.errors import ConfigError
from fedsplit.server.batches import Batches
from fedsplit.server.body import Body
from fedsplit.server.learning import Compare, Learned
from fedsplit.server.pace import Pace
from fedsplit.server.parts import Parts
from fedsplit.server.round import Round
from fedsplit.wire.exchange import weights_digest
from fedsplit.wire.head import FEWEST, HeadDownload, HeadUpload, Rows
from fedsplit.wire.release import Release


class LabelsAtHome:
    """Body and head of the trunk learn in steps of one batch, each from all records of a round.

    Parameters
    ----------
    parts : Parts
    body : Body
        The trunk.
    pace : Pace
        Says whose answers come.
    """

    compare: Compare | None = None  # which is not asked: it would need the labels

    def __init__(self, parts: Parts, body: Body, pace: Pace) -> None:
        self.parts = parts
        self.body = body
        self.pace = pace

    def check(self, records: int) -> None:
        """Refuse more records than one batch has; raises ConfigError."""
        size = self.body.options.batch_size
        if records > size:
            raise ConfigError(
                f"protocol.batch-size must be at least {records} with labels at home (a round is one batch, and brings "
                f"so many records), got {size}: raise it, or lower protocol.chunk or devices.fraction"
            )

    def learn(self, now: Round, releases: Sequence[Release]) -> Learned | None:
        """Take a step of body and head in each pass; cut gradients are those of the last."""
        releases = _answerable(releases)
        if not releases:
            return None
        batches, began = Batches.join(releases), time.perf_counter()
        steps = [self._step(now, releases, batches, epoch) for epoch in range(self.body.options.epochs)]
        now.metrics["trunk_seconds"] = round(time.perf_counter() - began, 4)
        return steps[-1]

    def evaluate(self, now: Round, releases: Sequence[Release]) -> dict[str, Any]:
        """Add up the nodes' sums of loss and of records classified right."""
        releases = _answerable(releases)
        if not releases:
            return {}
        batches = Batches.join(releases)
        downloads = self._downloads(now, releases, batches, self.body.test_features(batches))
        answers = self._ask(now, downloads, needed=0, test=True)
        if not answers:
            return {}
        loss, accuracy = self._means(answers)
        return self.body.task.score_sums(loss, accuracy)

    def _step(self, now: Round, releases: Sequence[Release], batches: Batches, epoch: int) -> Learned | None:
        """Take a step over the records whose devices answer; None, if there are none."""
        features = self.body.train_features(batches, now.number, epoch)
        heard = self.pace.answering(now, releases, self.body.head)
        downloads = self._downloads(now, heard, batches, features)
        answers = self._ask(now, downloads, needed=self.parts.options.min_nodes, test=False)
        if not answers:
            return None
        gradients, answered = np.zeros_like(features), np.zeros(len(batches), dtype=bool)
        for node, upload in answers.items():
            mine = np.isin(batches.devices, downloads[node].devices)
            gradients[mine], answered = upload.features.values(), answered | mine
        head = np.sum([u.head for u in answers.values()], axis=0)
        values = self.body.learn(batches, gradients, head, int(answered.sum()), now.number)
        loss, accuracy = self._means(answers)
        now.metrics.update({"train_loss": loss} | ({} if accuracy is None else {"train_accuracy": accuracy}))
        sent = np.repeat(answered, np.diff(batches.starts))
        return Learned([r for r in heard if np.isin(r.devices, batches.devices[answered]).all()], values[sent])

    def _downloads(
        self, now: Round, releases: Sequence[Release], batches: Batches, features: FloatArray
    ) -> dict[int, HeadDownload]:
        """Sort features, which are in canonical order, back to the nodes that released their records."""
        parts, home = self.parts, now.home
        digest, downloads = weights_digest(parts.layer.flatten(parts.first_layer.weights)), {}
        for release in releases:
            if (node := home.get(int(release.devices[0]))) is None:
                continue
            downloads[node] = HeadDownload(
                run=parts.progress.run,
                round_number=now.number,
                nonce=secrets.randbits(62),
                digest=digest,
                devices=release.devices,
                records=release.records,
                head=self.body.head_parameters,
                features=Rows.pack(features[np.isin(batches.devices, release.devices)], parts.options.dtype),
            )
        return downloads

    def _ask(
        self, now: Round, downloads: Mapping[int, HeadDownload], *, needed: int, test: bool
    ) -> dict[int, HeadUpload]:
        """Return by node what they say, of those that have the records still."""

        def read(payload: bytes, download: HeadDownload) -> HeadUpload:
            return HeadUpload.from_bytes(payload, self.body.head, download, test=test)

        return {node: u for node, u in now.question(downloads, read, needed, test=test).items() if u.records}

    def _means(self, answers: Mapping[int, HeadUpload]) -> tuple[float, float | None]:
        """Return the mean loss over all records and, for classes, the share that is classified right."""
        records = sum(u.records for u in answers.values())
        loss = sum(u.loss for u in answers.values()) / records
        right = sum(u.correct for u in answers.values()) / records
        return loss, right if self.body.task.classifies else None


def _answerable(releases: Sequence[Release]) -> list[Release]:
    """Return the parts of devices that answer for their labels: none does about fewer than :data:`FEWEST` records."""
    return [part for r in releases if len((part := r.among(r.devices[r.records >= FEWEST])).devices)]
