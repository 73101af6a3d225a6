"""SplitStrategy where labels stay at home: between the two halves of a round, features go down and gradients up.

A round has three exchanges: releases without labels; features, gradients at the features and of the head; cut
gradients, gradients of the first layer. An evaluation has two: releases; features, and sums over a node's records.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid

from fedsplit.common.arrays import FloatArray
from fedsplit.common.errors import ConfigError
from fedsplit.model.tasks.targets import Targets, Withheld
from fedsplit.server.batches import Batches
from fedsplit.server.body import Body
from fedsplit.server.rounds import SplitStrategy
from fedsplit.wire.exchange import weights_digest
from fedsplit.wire.head import HeadDownload, HeadUpload, Rows
from fedsplit.wire.release import Release


@dataclass(frozen=True)
class _Question:
    """What a node is asked about: one release of its records."""

    download: HeadDownload
    release: Release


class AtHomeStrategy(SplitStrategy):
    """Split training whose labels stay on the devices; for mode ``synchronous``."""

    trunk: Body
    _grid: Grid
    _tests: Mapping[int, _Question]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the messages with the round's cut gradients, after the two exchanges before them."""
        self._grid = grid
        return super().configure_train(server_round, arrays, config, grid)

    def register(self, grid: Grid, note: Callable[[], None] = lambda: None) -> None:
        """As :meth:`SplitStrategy.register`; raises ConfigError too, if a round can bring more than one batch."""
        super().register(grid, note)
        size, most = self.trunk.options.batch_size, self.schedule.largest_round
        if most > size:
            raise ConfigError(
                f"protocol.batch-size must be at least {most} with labels at home (a round is one batch, and brings so "
                f"many records), got {size}: raise it, or lower protocol.chunk or devices.fraction"
            )

    def _learn(self, releases: Sequence[Release]) -> None:
        """Take one step of body and head on a round's releases and queue their cut gradients."""
        releases, round_number = [r for r in releases if len(r.counts)], self.progress.round_number
        if not releases:
            return
        self.schedule.note_heard(d for r in releases for d in r.devices.tolist())
        batches, began = Batches.join(releases), time.perf_counter()
        self.progress.totals.samples += len(batches)
        features = self.trunk.train_features(batches, round_number)
        questions = self._questions(releases, batches, features)
        messages = self._ask(MessageType.TRAIN, questions)
        replies = self._grid.send_and_receive(messages, timeout=self.options.timeout)
        answers = self._heard(replies, questions, needed=self.options.min_nodes, test=False)
        if not answers:
            return
        gradients, answered = np.zeros_like(features), np.zeros(len(batches), dtype=bool)
        for node, upload in answers.items():
            mine = np.isin(batches.devices, questions[node].release.devices)
            gradients[mine], answered = upload.features.values(), answered | mine
        head, count = np.sum([u.head for u in answers.values()], axis=0), int(answered.sum())
        values = self.trunk.learn(batches, gradients, head, count, round_number)
        loss, accuracy = self._means(answers)
        self.metrics.update(train_loss=loss, trunk_seconds=round(time.perf_counter() - began, 4))
        if accuracy is not None:
            self.metrics["train_accuracy"] = accuracy
        if self.first_layer:
            sent = np.repeat(answered, np.diff(batches.starts))
            self._queue([questions[node].release for node in answers], values[sent])

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the messages with the features of released test records, after the exchange that releases them."""
        self._tests = {}
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        replies = grid.send_and_receive(messages, timeout=self.options.timeout) if messages else []
        releases = [u.release for u in self._receive(replies, needed=0, test=True) if len(u.release.counts)]
        if not releases:
            return []
        batches = Batches.join(releases)
        self._tests = self._questions(releases, batches, self.trunk.test_features(batches))
        return self._ask(MessageType.EVALUATE, self._tests)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Add up the nodes' sums."""
        answers = self._heard(replies, self._tests, needed=0, test=True)
        if not answers:
            return self._note_scores({})
        loss, accuracy = self._means(answers)
        return self._note_scores(self.trunk.task.score_sums(loss, accuracy))

    @property
    def _targets(self) -> Targets:
        return Withheld()

    def _questions(self, releases: Sequence[Release], batches: Batches, features: FloatArray) -> dict[int, _Question]:
        """Sort features, which are in canonical order, back to the nodes that released their records."""
        home = {d: node for node, r in self.nodes.items() for d in r.devices.tolist()}
        digest, questions = weights_digest(self.layer.flatten(self.weights)), {}
        for release in releases:
            if (node := home.get(int(release.devices[0]))) is None:
                continue
            download = HeadDownload(
                run=self.progress.run,
                round_number=self.progress.round_number,
                nonce=secrets.randbits(62),
                digest=digest,
                devices=release.devices,
                records=release.records,
                head=self.trunk.head_parameters,
                features=Rows.pack(features[np.isin(batches.devices, release.devices)], self.options.dtype),
            )
            questions[node] = _Question(download, release)
        return questions

    def _ask(self, kind: str, questions: Mapping[int, _Question]) -> list[Message]:
        return [self._message(kind, node, question.download.to_bytes()) for node, question in questions.items()]

    def _heard(
        self, replies: Iterable[Message], questions: Mapping[int, _Question], *, needed: int, test: bool
    ) -> dict[int, HeadUpload]:
        """Check the replies to questions; return by node what they say, of those that have the records still."""

        def read(payload: bytes, question: _Question) -> HeadUpload:
            return HeadUpload.from_bytes(payload, self.trunk.head, question.download, test=test)

        return {node: u for node, u in self._answers(replies, questions, read, needed).items() if u.records}

    def _means(self, answers: Mapping[int, HeadUpload]) -> tuple[float, float | None]:
        """Return the mean loss over all records and, for classes, the share that is classified right."""
        records = sum(u.records for u in answers.values())
        loss = sum(u.loss for u in answers.values()) / records
        right = sum(u.correct for u in answers.values()) / records
        return loss, right if self.trunk.task.classifies else None
