"""SplitStrategy: a Flower strategy that trains a trunk on what devices release and steps the first layer they share.

One turn of Flower's loop is one round. In ``synchronous`` mode the forward exchange runs inside ``configure_train``,
which then returns the backward messages. In ``pipelined`` and ``single-pass`` the cut gradients of round r travel
with the weights for round r+1, and the last round's are flushed by one backward-only exchange.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsplit.common.arrays import IntArray, sum_groups
from fedsplit.common.errors import FedsplitError, RunError, WireError
from fedsplit.common.seeds import seed_of
from fedsplit.flower.grid import Pauses
from fedsplit.flower.record import to_record
from fedsplit.model.layer import FirstLayer
from fedsplit.model.tasks.targets import Targets
from fedsplit.plan.schedule import Row, Schedule
from fedsplit.server.aggregation import FirstLayerServer
from fedsplit.server.answers import PendingBlock, check_size, check_upload
from fedsplit.server.batches import Batches
from fedsplit.server.progress import Progress, ProtocolOptions
from fedsplit.server.roster import Roster, payload_of, unanswered
from fedsplit.server.trunk import Trunk
from fedsplit.wire.exchange import CutGradients, Download, Registration, Upload, weights_digest
from fedsplit.wire.ledger import Reason
from fedsplit.wire.release import Release

log = logging.getLogger(__name__)
_PATIENCE = 5.0  # seconds after which it is said who is waited for
_COMING_BACK = 10.0  # seconds that a node may take to say that it is there again
Compare = Callable[[Trunk, Batches], dict[str, Any]]
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class SplitStrategy(Strategy):
    """Split training over the nodes of a Grid.

    Parameters
    ----------
    trunk : Trunk
        Never leaves the server.
    first_layer : FirstLayerServer or None
        Steps the shared first layer; None leaves it as it is (frozen), and no cut gradients are sent.
    layer : FirstLayer
        Shapes of the first layer, and its initial weights where it is frozen.
    schedule : Schedule
        Which records each device releases in which round.
    options : ProtocolOptions
    run : int
        A number that names this run in the nodes' state folders.
    compare : callable, optional
        Adds to an evaluation, from the trunk and the released test records: scores of another model.
    roster : Roster, optional
        Who may register which devices; by default whoever comes first.
    """

    def __init__(
        self,
        trunk: Trunk,
        first_layer: FirstLayerServer | None,
        layer: FirstLayer,
        schedule: Schedule,
        options: ProtocolOptions,
        run: int,
        compare: Compare | None = None,
        roster: Roster | None = None,
    ) -> None:
        self.trunk = trunk
        self.first_layer = first_layer
        self.layer = layer
        self.schedule = schedule
        self.options = options
        self.compare = compare
        self.progress = Progress(run)
        self.metrics: dict[str, Any] = {}
        self._resumed_at = 0
        self._started = False
        self.roster = roster or Roster(options.devices, options.max_offences)
        self._sent: dict[int, Download] = {}
        self._on_their_way: Sequence[PendingBlock] = []
        self._wanted: int | None = None
        self._until = float("inf")
        self._keep_from = 0

    @property
    def nodes(self) -> dict[int, Registration]:
        """The nodes that have registered and are there, by Flower's id."""
        return self.roster.nodes

    @property
    def weights(self) -> dict[str, Any]:
        """The first layer's current parameters."""
        return self.first_layer.weights if self.first_layer else self.layer.initial_weights()

    def resume(self, progress: Progress) -> None:
        """Go on after the rounds that ``progress`` has behind it; Flower's loop will count from 1 again."""
        self.progress = progress
        self._resumed_at = progress.round_number

    def clock_state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of a virtual clock; there is none."""
        return {}

    def load_clock(self, state: dict[str, Any]) -> None:
        """Go on at the time of a checkpoint."""

    def summary(self) -> None:
        """Log the strategy's settings."""
        log.info("%s over %d devices, %d rounds", self.options.mode, self.options.devices, self.options.rounds)

    # ------------------------------------------------------------------ training

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the round's messages; in synchronous mode after the forward exchange."""
        round_number = self._begin_round(server_round, grid)
        rows = self._cohort(round_number)
        if self.options.mode != "synchronous":
            return self._messages(MessageType.TRAIN, rows, self.progress.pending)
        messages = self._messages(MessageType.TRAIN, rows, [])
        replies = grid.send_and_receive(messages, timeout=self.options.timeout)
        uploads = self._receive(replies, needed=self.options.min_nodes)
        self._learn([u.release for u in uploads])
        return self._messages(MessageType.TRAIN, {}, self.progress.pending)

    def _begin_round(self, server_round: int, grid: Grid) -> int:
        """Look who is there and what has waited too long; return the round's number."""
        round_number = self.progress.round_number = self._resumed_at + server_round
        self.metrics = {"round": round_number}
        self._drop_stale(round_number)
        self._weigh_stale(round_number)
        self._keep_from = min([b.cut.round_number for b in self.progress.pending], default=round_number)
        self.register(grid)
        if len(self.nodes) < self.options.min_nodes:
            raise RunError(f"{len(self.nodes)} nodes are connected, protocol.min-nodes is {self.options.min_nodes}")
        return round_number

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Step the first layer, and (but for synchronous mode, where it is done) train the trunk."""
        uploads = self._receive(replies, needed=self.options.min_nodes)
        if self.options.mode != "synchronous":
            self._learn([u.release for u in uploads])  # before the step: these were released by the old weights
        self._step_first_layer(uploads)
        return None, None  # weights are kept here, since evaluation may come after a flush

    def _learn(self, releases: Sequence[Release]) -> None:
        """Train the trunk on a round's releases and queue their cut gradients."""
        progress, round_number = self.progress, self.progress.round_number
        releases = [r for r in releases if len(r.targets)]
        self.schedule.note_heard(d for r in releases for d in r.devices.tolist())
        new = [Batches.join(releases)] if releases else []
        progress.totals.samples += sum(len(b) for b in new)
        replay = list(progress.replay.values()) if self.options.replays else []
        if not new and not replay:
            return
        fresh = sum(len(b) for b in replay)
        began = time.perf_counter()
        values, metrics = self.trunk.train(Batches.concat([*replay, *new]), fresh, round_number)
        self.metrics.update(metrics, trunk_seconds=round(time.perf_counter() - began, 4))
        if self.options.replays and new:
            progress.replay[round_number] = new[0]
            self._forget_oldest()
        if self.first_layer and new:
            self._queue(releases, values)

    def _forget_oldest(self) -> None:
        """Keep what is replayed within its limit: of the newest rounds as much as fits beside the public records."""
        replay, room = self.progress.replay, self.options.replay_bytes
        if room is None:
            return
        for number in sorted(replay, key=lambda n: (n > 0, -n)):  # public ones first, who fit, then the newest
            seed = seed_of(self.schedule.seed, "replay", self.progress.round_number, number)
            kept = replay[number].part(max(0, room), np.random.default_rng(seed))
            room -= kept.nbytes
            if len(kept):
                replay[number] = kept
            else:
                del replay[number]

    def _queue(self, releases: Sequence[Release], values: Any) -> None:
        """Sort cut gradients, which are in canonical order, back to the nodes that wait for them."""
        devices = np.concatenate([r.devices for r in releases])
        lengths = np.concatenate([sum_groups(r.counts, r.records) for r in releases])
        order = np.argsort(devices)
        stops = np.cumsum(lengths[order])
        where = {d: slice(stop - n, stop) for d, n, stop in zip(devices[order], lengths[order], stops, strict=True)}
        digest = weights_digest(self.layer.flatten(self.weights))
        for release in releases:
            mine = np.concatenate([values[where[d]] for d in release.devices])
            own = sum_groups(release.counts, release.records)
            cut = CutGradients.pack(self.progress.round_number, digest, release.devices, own, mine, self.options.dtype)
            self.progress.pending.append(PendingBlock(cut, release.records))

    def _step_first_layer(self, uploads: Sequence[Upload], stream: str = "first-layer") -> None:
        if self.first_layer is None:
            return
        contributions = []
        for upload in uploads:
            sums = upload.gradients
            for total, count in zip(sums.sums, sums.records.tolist(), strict=True):
                contributions.append((self.layer.unflatten(total), count))
        self.first_layer.step(self.progress.round_number, contributions, stream)

    def _drop_stale(self, round_number: int) -> None:
        delay = 0 if self.options.mode == "synchronous" else 1  # which is the other modes' way
        oldest = round_number - delay - self.options.max_staleness
        self.progress.pending = [b for b in self.progress.pending if b.cut.round_number >= oldest]

    def _weigh_stale(self, round_number: int) -> None:
        """Weigh down cut gradients that are sent once more, for a round: their sums of dW come back smaller by as much.

        A step that is (1 + s)^-a as long is FedAsync's polynomial weighting (Xie, Koyejo and Gupta, arXiv 1903.03934).
        The sum of a node's blocks is weighed block by block so, since dW is linear in them; counts stay what they are.
        To a device's guard a sum that is asked for again, and is smaller, is another sum, and it may refuse that.
        """
        if not self.options.staleness_weight:
            return
        delay = 0 if self.options.mode == "synchronous" else 1
        pending = self.progress.pending
        for i, block in enumerate(pending):
            if (late := round_number - delay - block.cut.round_number) > 0:  # s - 1 was weighed in the round before
                pending[i] = block.scaled((late / (1 + late)) ** self.options.staleness_weight, self.options.dtype)

    # ---------------------------------------------------------------- evaluation

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Flush the last round's cut gradients, then ask the test devices if an evaluation is due."""
        round_number, every = self.progress.round_number, self.options.evaluate_every
        last = round_number == self.options.rounds
        if last and self.progress.pending:
            self._weigh_stale(round_number + 1)
            self._flush(grid)
        if last:
            self._gather(grid)
        if not last and (every == 0 or round_number % every):
            return []
        rows: dict[int, list[tuple[int, int, int, int]]] = {}
        for node, registration in self.nodes.items():
            for device, count in zip(registration.devices.tolist(), registration.test.tolist(), strict=True):
                if device in self.options.test_devices and count:
                    rows.setdefault(node, []).append((device, 0, 0, count))
        return self._messages(MessageType.EVALUATE, rows, [])

    def _flush(self, grid: Grid) -> None:
        """Have the last round's cut gradients answered."""
        messages = self._messages(MessageType.TRAIN, {}, self.progress.pending)
        replies = grid.send_and_receive(messages, timeout=self.options.timeout)
        self._step_first_layer(self._receive(replies, needed=0), "flush")

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Score the trunk on the released test records."""
        releases = [u.release for u in self._receive(replies, needed=0, test=True) if len(u.release.targets)]
        if not releases:
            return self._note_scores({})
        test = Batches.join(releases)
        compared = self.compare(self.trunk, test) if self.compare is not None else {}
        return self._note_scores({**self.trunk.evaluate(test), **compared})

    def _note_scores(self, scores: dict[str, Any]) -> MetricRecord | None:
        if not scores:
            if self.progress.round_number == self.options.rounds and self.options.test_devices:
                log.warning("no test record was released: the accuracy of the end is not known")
                self.progress.evaluation = {}  # an earlier round's is not that of the end
            return None
        self.progress.evaluation = scores
        self.metrics.update(scores)
        return MetricRecord({k: v for k, v in scores.items() if isinstance(v, float)})

    # ------------------------------------------------------------------- messages

    def register(self, grid: Grid, note: Callable[[], None] = lambda: None) -> None:
        """List the nodes anew; before the first round wait for all devices, later as long as there is no node at all.

        ``note`` is called whenever another number of devices is there, or of nodes refused.

        Raises
        ------
        RunError
            If there are more nodes than devices, or no device has come within the timeout.
        """
        timeout, expected, roster = self.options.timeout, self.options.devices, self.roster
        began, pauses, told, before = time.monotonic(), Pauses(0.02, 0.5), False, (-1, 0)
        while True:
            self._look(grid)
            if not self._started and len(roster.present) > expected:
                raise RunError(f"{len(roster.present)} nodes for {expected} devices: lower the number of nodes")
            known = sum(len(r.devices) for r in roster.nodes.values())
            if (heard := (known, len(roster.refusals))) != before:
                note()
                before, told = heard, False
            if known >= expected or (self._started and roster.nodes):
                break
            if roster.hopeless:
                raise RunError(f"a node could not register: {next(iter(roster.refusals.values()))}")
            if time.monotonic() - began > timeout:
                if roster.nodes:
                    log.warning("only %d of %d devices have registered", known, expected)
                    break
                raise RunError(f"no node has registered within {timeout:g} s")
            if not told and time.monotonic() - began > _PATIENCE:
                log.warning(
                    "%d of %d devices are there: waiting for the others, at most %g s", known, expected, timeout
                )
                told = True
            time.sleep(pauses.next())
        self._started = True
        counts = {d: n for r in self.nodes.values() for d, n in zip(r.devices.tolist(), r.train, strict=True)}
        self.schedule.set_counts({d: n for d, n in counts.items() if d not in self.options.donors})

    def _look(self, grid: Grid) -> None:
        asked, heard = self.roster.look(grid, self.options.timeout)
        self.progress.totals.exchanges += asked
        self.progress.totals.bytes_up += heard

    def _gather(self, grid: Grid) -> None:
        """Look for nodes before the evaluation at the end, and wait a little for those that are coming back."""
        began, pauses = time.monotonic(), Pauses(0.02, 0.5)
        self._look(grid)
        while self.roster.waiting and time.monotonic() - began < min(self.options.timeout, _COMING_BACK):
            time.sleep(pauses.next())
            self._look(grid)

    def _cohort(self, round_number: int) -> dict[int, list[tuple[int, int, int, int]]]:
        """Return the schedule rows of the devices that take part, by node."""
        rows = self.schedule.rows(round_number)
        by_node = {}
        for node, registration in self.nodes.items():
            if mine := [rows[d] for d in registration.devices.tolist() if d in rows]:
                by_node[node] = mine
        return by_node

    def _messages(
        self, kind: str, rows: dict[int, list[tuple[int, int, int, int]]], pending: Sequence[PendingBlock]
    ) -> list[Message]:
        """Build one message per node that has rows or pending blocks, and remember what was asked."""
        home = {d: node for node, r in self.nodes.items() for d in r.devices.tolist()}
        blocks: dict[int, list[CutGradients]] = {}
        self._on_their_way = pending
        training = kind == MessageType.TRAIN
        self._wanted = self.schedule.enough(sum(map(len, rows.values()))) if training else None
        for block in pending:
            nodes = {home.get(d) for d in block.cut.devices.tolist()}
            if len(nodes) == 1 and (node := nodes.pop()) is not None:
                blocks.setdefault(node, []).append(block.cut)
        weights = self.layer.flatten(self.weights)
        per_device = self.first_layer is not None and self.first_layer.per_device
        self._sent, messages = {}, []
        for node in sorted({*rows, *blocks}, key=lambda n: int(self.nodes[n].devices[0])):
            download = Download(
                run=self.progress.run,
                round_number=self.progress.round_number,
                keep_from=self._keep_from,
                per_device=per_device,
                nonce=secrets.randbits(62),
                weights=weights,
                schedule=np.array(rows.get(node, []), dtype=np.int64).reshape(-1, 4),
                pending=blocks.get(node, []),
            )
            self._sent[node] = download
            messages.append(self._message(kind, node, download.to_bytes()))
        return messages

    def _message(self, kind: str, node: int, payload: bytes) -> Message:
        """Return a message to a node, and count it; one of training has until the deadline from now on."""
        self.progress.totals.bytes_down += len(payload)
        self.progress.totals.exchanges += 1
        self.roster.sent(node, len(payload))
        timeout, deadline = self.options.timeout, self.options.deadline
        if kind != MessageType.TRAIN or deadline is None:
            return Message(to_record(payload), node, kind, ttl=timeout)
        self._until = time.monotonic() + deadline
        return Message(to_record(payload), node, kind, ttl=min(timeout, deadline))

    def over(self, replies: Iterable[Message]) -> bool:
        """Whether a round goes on with these replies to its messages: the deadline has passed, or there are enough."""
        nodes = {reply.metadata.src_node_id for reply in replies if not reply.has_error()}
        honest = [node for node in nodes if not self.roster.account(node).offences]  # as far as one can see
        return self._is_late or self._are_enough(honest, self._sent)

    @property
    def _is_late(self) -> bool:
        return time.monotonic() > self._until

    def _are_enough(self, nodes: Iterable[int], asked: Mapping[int, Any]) -> bool:
        """Whether the devices of some nodes, of those that were asked, are as many as are wanted."""
        if self._wanted is None:
            return False
        return sum(len(asked[node].schedule) for node in nodes if node in asked) >= self._wanted

    def _receive(self, replies: Iterable[Message], *, needed: int, test: bool = False) -> list[Upload]:
        """Check the replies to :meth:`_messages` and return the good ones in the order of their devices.

        ``needed`` is how many nodes must answer well (all of them, if fewer were asked).

        Raises
        ------
        RunError
            If fewer nodes answered well than the run needs.
        """
        asked, self._sent = self._sent, {}
        found = self._answers(replies, asked, self._checked, needed)
        for node, upload in found.items():
            self.roster.account(node).refused += int(upload.refused[:, 2].sum())
            if len(upload.lost):
                log.warning("%s has lost its pending chunk of round %s", self.roster.name(node), upload.lost.tolist())
            self._account(upload, test=test)
            self._note_failures(upload, asked[node], test=test)
        self._settle(asked, found)
        self._wanted = None
        if not test:
            self._ask_again([row for node in asked if node not in found for row in asked[node].schedule.tolist()])
        return list(found.values())

    def _ask_again(self, rows: Iterable[Row]) -> None:
        """Note which of the schedule's rows have brought nothing."""
        if self.options.asks_again:
            for device, _, start, _ in rows:
                self.schedule.not_released(device, start)

    def _answers(
        self,
        replies: Iterable[Message],
        asked: Mapping[int, Asked],
        read: Callable[[bytes, Asked], Answer],
        needed: int,
    ) -> dict[int, Answer]:
        """Read the replies to what was asked; return the good ones by node, in the order of ``asked``.

        ``read`` raises WireError for a payload that no honest node would send. Raises as :meth:`_receive`.
        """
        good: dict[int, Answer] = {}
        reasons: dict[int, str] = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            if node not in asked and reply.has_error():
                continue  # Flower's own word that a node has not answered
            if node not in asked or node in good or node in reasons:
                log.warning("round %d: a reply that nobody asked for", self.progress.round_number)
                continue
            try:
                payload = payload_of(reply)
                good[node] = read(payload, asked[node])
            except WireError as error:
                reasons[node] = str(error)
                self.roster.offend(node, str(error))
                continue
            except FedsplitError as error:
                reasons[node], gone = str(error), unanswered(reply)
                self.roster.miss(node, gone=gone)
                what = "has not answered" if gone else f"is left out: {error}"
                log.warning("round %d: %s %s", self.progress.round_number, self.roster.name(node), what)
                continue
            self.roster.seen(node, len(payload))
            self.progress.totals.bytes_up += len(payload)
        spare, late = self._are_enough(good, asked), self._is_late
        self._until = float("inf")
        for node in asked.keys() - good.keys() - reasons.keys():
            self.roster.miss(node, gone=not spare and not late)
            if spare:  # it is only slower than others
                continue
            log.warning("round %d: %s has not answered", self.progress.round_number, self.roster.name(node))
        if len(good) < min(needed, len(asked)) and not self._can_do_without:
            why = f"; first reason: {next(iter(reasons.values()))}" if reasons else ""
            raise RunError(
                f"round {self.progress.round_number}: {len(good)} of {len(asked)} nodes answered, "
                f"protocol.min-nodes is {self.options.min_nodes}{why}"
            )
        return {node: good[node] for node in asked if node in good}

    @property
    def _targets(self) -> Targets:
        """Which targets come with releases: those of the task."""
        return self.trunk.task.targets(self.trunk.outputs)

    def _checked(self, payload: bytes, asked: Download) -> Upload:
        """Read an upload that answers ``asked``; raises WireError."""
        pending = self._on_their_way
        check_size(len(payload), asked, self.layer.width, self.layer.size, self._targets)
        upload = Upload.from_bytes(payload, parameters=self.layer.size)
        check_upload(upload, asked, pending, self.layer.width, self._targets)
        return upload

    @property
    def _can_do_without(self) -> bool:
        """Whether a round may bring nothing new: the trunk learns from earlier releases, and perhaps few were asked."""
        return self.options.replays and bool(self.progress.replay)

    def _settle(self, asked: dict[int, Download], uploads: Iterable[int]) -> None:
        """Forget the cut gradients that nodes have answered, so that none is applied twice."""
        answered: dict[int, list[IntArray]] = {}
        for cut in (cut for node in uploads for cut in asked[node].pending):
            answered.setdefault(cut.round_number, []).append(cut.devices)
        for number, devices in answered.items():
            gone = np.concatenate(devices)
            left = [b.without(gone) if b.cut.round_number == number else b for b in self.progress.pending]
            self.progress.pending = [block for block in left if len(block.records)]

    def _account(self, upload: Upload, *, test: bool) -> None:
        totals = self.progress.totals
        totals.dense_bytes_up += 4 * self.layer.width * len(upload.release.targets)
        exposures = int(upload.ledger.exposures)
        if test:
            totals.test_exposures_max = max(totals.test_exposures_max, exposures)
        else:
            totals.exposures_max = max(totals.exposures_max, exposures)
            most = totals.ledger
            totals.ledger = {k: float(np.fmax(v, most.get(k, np.nan))) for k, v in upload.ledger._asdict().items()}
        counts = totals.test_refused if test else totals.refused
        for _, reason, records in upload.refused.tolist():
            name = Reason(reason).name.lower() if reason in list(Reason) else f"reason {reason}"
            counts[name] = counts.get(name, 0) + records

    def _note_failures(self, upload: Upload, asked: Download, *, test: bool) -> None:
        failed = upload.failed.tolist()
        if not failed:
            return
        log.warning("round %d: devices %s sat out", self.progress.round_number, failed)
        self.progress.totals.failures += len(failed)
        for device, _, start, _ in asked.schedule.tolist():
            if device in failed and not test:
                self.schedule.not_released(device, start)
