"""A run's options, and what it must remember between rounds."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedsplit.plan.modes import Mode
from fedsplit.server.batches import Batches
from fedsplit.server.pending import Pending
from fedsplit.wire.exchange import Upload
from fedsplit.wire.ledger import Reason


@dataclass(frozen=True)
class ProtocolOptions:
    """How a run exchanges messages; see the settings of the same names.

    Attributes
    ----------
    mode : Mode
    rounds : int
    dtype : str
        Of cut gradients on the wire: ``float16`` or ``float32``.
    max_staleness : int
        Rounds that cut gradients wait for a node that did not answer.
    staleness_weight : float
        Exponent a of the weight (1 + s)^-a of first-layer gradients that come s rounds later than the mode's way.
    replay_bytes : int or None
        The most that releases kept for replay may take. The oldest are forgotten first, within a round at random;
        public ones never.
    min_nodes : int
        The run stops when fewer of the nodes that were asked have answered (all of them, if fewer were asked).
    timeout : float
        Seconds that a message may take; also how long to wait for devices at the start.
    max_offences : int
        Replies that no honest node would send, after which one is asked no more.
    devices : int
        Devices to wait for at the start.
    test_devices : tuple of int
        Devices whose test records are released for evaluation.
    evaluate_every : int
        Rounds between evaluations; 0 evaluates once, after the last round.
    donors : tuple of int
        Devices that have given their records to everybody, and are asked for nothing.
    deadline : float or None
        Seconds after which a round goes on without those that have not answered, on a real clock.
    asks_again : bool
        Whether records whose release has not come are asked for once more, because the same would leave.
    """

    mode: Mode
    rounds: int
    dtype: str
    max_staleness: int
    min_nodes: int
    timeout: float
    max_offences: int
    devices: int
    test_devices: tuple[int, ...]
    evaluate_every: int
    donors: tuple[int, ...] = ()
    staleness_weight: float = 0.0
    replay_bytes: int | None = None
    deadline: float | None = None
    asks_again: bool = False


@dataclass
class Totals:
    """What a run has cost so far.

    ``exchanges`` counts messages to nodes, ``samples`` released training records, ``bytes_up`` and ``bytes_down``
    payloads, ``dense_bytes_up`` the float32 activations of the same records without labels and gradients,
    ``failures`` how often a device sat out. ``exposures_max`` is the largest number of releases of any training
    record, ``ledger`` the most of everything else that has left of any (see :class:`fedsplit.wire.ledger.Ledger`),
    ``refused`` and ``test_refused`` count by reason the records that the guard refused, or would have.
    """

    exchanges: int = 0
    samples: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    dense_bytes_up: int = 0
    exposures_max: int = 0
    test_exposures_max: int = 0
    failures: int = 0
    ledger: dict[str, float] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    test_refused: dict[str, int] = field(default_factory=dict)

    def add(self, upload: Upload, width: int, *, test: bool) -> None:
        """Count an upload.

        Parameters
        ----------
        upload : Upload
        width : int
            Outputs of the first layer.
        test : bool
            Whether its records are test records, which have their own totals.
        """
        self.dense_bytes_up += 4 * width * len(upload.release.targets)
        self.failures += len(upload.failed)
        exposures = int(upload.ledger.exposures)
        if test:
            self.test_exposures_max = max(self.test_exposures_max, exposures)
        else:
            self.exposures_max = max(self.exposures_max, exposures)
            most = self.ledger
            self.ledger = {k: float(np.fmax(v, most.get(k, np.nan))) for k, v in upload.ledger._asdict().items()}
        counts = self.test_refused if test else self.refused
        for _, reason, records in upload.refused.tolist():
            name = Reason(reason).name.lower() if reason in list(Reason) else f"reason {reason}"
            counts[name] = counts.get(name, 0) + records


@dataclass
class Progress:
    """What a run must remember between rounds, besides weights, trunk and first-layer strategy.

    ``replay`` are the releases that the trunk learns from again, by their round; 0 for public ones.
    """

    run: int
    round_number: int = 0
    pending: Pending = field(default_factory=list)
    replay: dict[int, Batches] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    totals: Totals = field(default_factory=Totals)
