"""SplitStrategy: a Flower strategy that trains a trunk on what devices release and steps the first layer they share.

One turn of Flower's loop is one round. Its exchanges with the nodes, of which labels at home and a virtual clock need
more than one, all happen here: the loop itself has no messages to send. With a delay of 0 the cut gradients of a
round are answered in it; else they travel with the weights for the next round, and the last round's are flushed.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsplit.common.errors import RunError
from fedsplit.server.attendance import Attendance
from fedsplit.server.learning import Learned, Learner
from fedsplit.server.pace import Pace
from fedsplit.server.parts import Parts
from fedsplit.server.pending import packed, weighed
from fedsplit.server.progress import Progress
from fedsplit.server.round import Round
from fedsplit.wire.exchange import Gradients, Registration, weights_digest
from fedsplit.wire.release import Release

log = logging.getLogger(__name__)


class SplitStrategy(Strategy):
    """Split training over the nodes of a Grid.

    Parameters
    ----------
    parts : Parts
    pace : Pace
        Real time or a virtual clock.
    learner : Learner
        How the trunk learns: where labels are.
    """

    def __init__(self, parts: Parts, pace: Pace, learner: Learner) -> None:
        self.parts = parts
        self.pace = pace
        self.learner = learner
        self.trunk, self.first_layer, self.layer = parts.trunk, parts.first_layer, parts.layer
        self.schedule, self.roster, self.options, self.progress = (
            parts.schedule,
            parts.roster,
            parts.options,
            parts.progress,
        )
        self._attendance = Attendance(parts)
        self._resumed_at = 0
        self._round: Round | None = None

    @property
    def nodes(self) -> dict[int, Registration]:
        """The nodes that have registered and are there, by Flower's id."""
        return self.roster.nodes

    @property
    def metrics(self) -> dict[str, Any]:
        """What the round has brought."""
        return self._round.metrics if self._round else {}

    def resume(self, progress: Progress) -> None:
        """Go on after the rounds that ``progress`` has behind it; Flower's loop will count from 1 again."""
        vars(self.progress).update(vars(progress))
        self._resumed_at = progress.round_number

    def summary(self) -> None:
        """Log the strategy's settings."""
        log.info("%s over %d devices, %d rounds", self.options.mode.name, self.options.devices, self.options.rounds)

    def register(self, grid: Grid, note: Callable[[], None] = lambda: None) -> None:
        """Wait for nodes, as :meth:`Attendance.wait` says, and look whether their rounds can be.

        Raises
        ------
        RunError
            If there are more nodes than devices, or no device has come within the timeout.
        ConfigError
            If the learner cannot take as many records as a round can bring.
        """
        self._attendance.wait(grid, note)
        counts = {d: n for r in self.nodes.values() for d, n in zip(r.devices.tolist(), r.train, strict=True)}
        self.schedule.set_counts({d: n for d, n in counts.items() if d not in self.options.donors})
        self.learner.check(self.schedule.largest_round)

    def over(self, replies: Iterable[Message]) -> bool:
        """Whether an exchange is over with these replies."""
        return self._round is not None and self._round.over(replies)

    # ------------------------------------------------------------------ training

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Begin a round: drop pending chunks that are too old, and register the nodes that are connected.

        Parameters
        ----------
        server_round : int
            Counts from 1, since the run was started or resumed.
        arrays, config : ArrayRecord, ConfigRecord
            Flower's; not used.
        grid : Grid
            Reaches the nodes.

        Raises
        ------
        RunError
            If too few nodes are connected.
        """
        number = self.progress.round_number = self._resumed_at + server_round
        mode, options = self.options.mode, self.options
        oldest = number - mode.delay - options.max_staleness
        self.progress.pending = [b for b in self.progress.pending if b.cut.round_number >= oldest]
        self._weigh_stale(number)
        self._round = Round(self.parts, grid, number)
        self.register(grid)
        if len(self.nodes) < options.min_nodes:
            raise RunError(f"{len(self.nodes)} nodes are connected, protocol.min-nodes is {options.min_nodes}")
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Hold the round: have records released, train the trunk on them, step the first layer."""
        now = self._now
        rows, delay = self.pace.cohort(now), self.options.mode.delay
        heard = self.pace.exchange(now, rows, self.progress.pending if delay else [])
        self._learn(now, heard.releases)  # before the step: these were released by the old weights
        if not delay:
            heard = self.pace.exchange(now, {}, self.progress.pending)
        self._step(now, heard.gradients)
        return None, None  # weights are kept here, since evaluation may come after a flush

    @property
    def _now(self) -> Round:
        assert self._round is not None
        return self._round

    def _learn(self, now: Round, releases: Sequence[Release]) -> None:
        """Train the trunk on a round's releases and queue their cut gradients."""
        releases = [r for r in releases if len(r.targets)]
        self.schedule.note_heard(d for r in releases for d in r.devices.tolist())
        self.progress.totals.samples += sum(len(r.targets) for r in releases)
        learned = self.learner.learn(now, releases)
        if learned is not None and self.first_layer.teaches:
            self._queue(now, learned)

    def _queue(self, now: Round, learned: Learned) -> None:
        digest = weights_digest(self.layer.flatten(self.first_layer.weights))
        self.progress.pending += packed(learned.releases, learned.values, now.number, digest, self.options.dtype)

    def _step(self, now: Round, gradients: Sequence[Gradients], stream: str = "first-layer") -> None:
        contributions = [
            (self.layer.unflatten(total), count)
            for sums in gradients
            for total, count in zip(sums.sums, sums.records.tolist(), strict=True)
        ]
        self.first_layer.step(now.number, contributions, stream)
        now.metrics.update(self.pace.report())

    def _weigh_stale(self, number: int) -> None:
        due, options = number - self.options.mode.delay, self.options
        self.progress.pending = weighed(self.progress.pending, due, options.staleness_weight, options.dtype)

    # ---------------------------------------------------------------- evaluation

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """After the last round answer the pending cut gradients, and register the nodes that are connected.

        Parameters
        ----------
        server_round, arrays, config, grid : int, ArrayRecord, ConfigRecord, Grid
            As in :meth:`configure_train`.
        """
        if self._is_last:
            if self.progress.pending:
                self._flush(self._now)
            self._attendance.gather(grid)
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Score the trunk on test records, which are released now, if an evaluation is due."""
        scores = self._scores(self._now) if self._is_due else {}
        if not scores:
            if self._is_last and self.options.test_devices:
                log.warning("no test record was released: the accuracy of the end is not known")
                self.progress.evaluation = {}  # an earlier round's is not that of the end
            return None
        self.progress.evaluation = scores
        self.metrics.update(scores)
        return MetricRecord({k: v for k, v in scores.items() if isinstance(v, float)})

    @property
    def _is_last(self) -> bool:
        return self.progress.round_number == self.options.rounds

    @property
    def _is_due(self) -> bool:
        every = self.options.evaluate_every
        return self._is_last or (every > 0 and self.progress.round_number % every == 0)

    def _flush(self, now: Round) -> None:
        """Have the last round's cut gradients answered."""
        self._weigh_stale(now.number + 1)
        self._step(now, self.pace.exchange(now, {}, self.progress.pending, needed=0).gradients, "flush")

    def _scores(self, now: Round) -> dict[str, Any]:
        tested = {
            device: (device, 0, 0, count)
            for registration in self.nodes.values()
            for device, count in zip(registration.devices.tolist(), registration.test.tolist(), strict=True)
            if device in self.options.test_devices and count
        }
        releases = [u.release for u in now.test(now.by_node(tested)) if len(u.release.targets)]
        return self.learner.evaluate(now, releases)
