"""The sections of a settings file that say how it learns: protocol, first layer, trunk, public records, tuning."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from fedsplit.common.figures import OBJECTIVES, figure
from fedsplit.common.tables import Section
from fedsplit.plan.modes import MODES, Mode
from fedsplit.plan.strategies import STRATEGIES

if TYPE_CHECKING:
    Objective = str
else:
    Objective = Literal[OBJECTIVES]
from fedsplit.plan.values import LearningSchedule, Positive, Rate, Seconds, one_of


class ProtocolSettings(Section):
    """``[protocol]``: what a round exchanges, how the trunk learns from it, and how long anybody waits.

    Attributes
    ----------
    mode
        ``synchronous``: two exchanges per round, with this round's gradients. ``pipelined``: one exchange, gradients
        one round late. ``single-pass``: every record leaves once, over all rounds. ``release-once``: every record
        leaves once, and the first layer learns from public records alone.
    chunk
        Records per device and round: a number, all of them, or (in single-pass) an even share of them in each round.
    batch_size
        Records in one mini-batch of the trunk.
    trunk_epochs
        How often the trunk goes through a round's releases.
    labels
        Whether labels travel with releases. With ``at-home`` devices compute the trunk's last layer.
    dtype
        The type of the values on the wire.
    max_staleness
        Rounds for which a device's cut gradients wait until it is heard again.
    staleness_weight
        First-layer gradients that are s rounds late count (1 + s)^-a, where a is this number.
    min_nodes
        A round with fewer answers stops the run. With a profile it counts devices.
    timeout
        Seconds for which a message is good.
    deadline
        Seconds after which a round goes on without the missing answers, in the profile's time or on real nodes.
    max_offences
        A node is left out for good after this many replies that no honest node would send.
    pace
        ``module:Class`` of your own, which decides who takes part in an exchange and when it is over; see
        :class:`fedsplit.server.pace.Pace`.
    """

    mode: Literal["synchronous", "pipelined", "single-pass", "release-once"]
    chunk: Positive | Literal["epoch", "spread"] = "epoch"
    batch_size: Positive = 64
    trunk_epochs: Positive = 1
    labels: Literal["shared", "at-home"] = "shared"
    dtype: Literal["float16", "float32"] = "float16"
    max_staleness: Annotated[int, Field(ge=0)] = 1
    staleness_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    min_nodes: Positive = 1
    timeout: Seconds = 600.0
    deadline: Seconds | None = None
    pace: Annotated[str, Field(pattern=r"^[^\s:]+:[^\s:]+$")] | None = None
    max_offences: Positive = 3

    @property
    def at_home(self) -> bool:
        """Whether labels never leave their devices."""
        return self.labels == "at-home"

    @property
    def facts(self) -> Mode:
        """What the mode is."""
        return MODES[self.mode]


class FirstLayerSettings(Section):
    """``[first-layer]``: how the server aggregates the first layer's gradients.

    Attributes
    ----------
    strategy
        ``frozen`` (the layer stays as it is), the name of a Flower strategy, or ``module:Class`` for your own.
    lr
        The learning rate.
    schedule
        How the learning rate changes over the rounds; see :func:`fedsplit.common.seeds.scheduled`.
    args
        Further arguments of the strategy.
    """

    strategy: Annotated[str, one_of("frozen", *STRATEGIES, own="Class")] = "FedAdam"
    lr: Rate = 0.003
    schedule: LearningSchedule = "constant"
    args: dict[str, Any] = Field(default_factory=dict)


class TrunkSettings(Section):
    """``[trunk]``: how the server trains all layers after the first.

    Attributes
    ----------
    optimizer
        A name, or ``module:Class`` of your own: a subclass of ``torch.optim.Optimizer``.
    lr
        The learning rate.
    momentum
        The momentum, for ``sgd``.
    weight_decay
        The weight decay.
    schedule
        How the learning rate changes over the rounds; see :func:`fedsplit.common.seeds.scheduled`.
    args
        Further arguments of the optimizer.
    thinning
        In each training step the trunk also drops up to this share of a record's outputs, drawn anew.
    replay_mb
        The most megabytes of releases kept for replay; the oldest are forgotten first. Without it all are kept.
    """

    optimizer: Annotated[str, one_of("sgd", "adam", "adamw", own="Class")] = "adam"
    lr: Rate = 0.001
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    args: dict[str, Any] = Field(default_factory=dict)
    schedule: LearningSchedule = "constant"
    thinning: Annotated[float, Field(ge=0, lt=1)] = 0.0
    replay_mb: Rate | None = None

    @model_validator(mode="after")
    def _momentum(self) -> "TrunkSettings":
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum is for optimizer 'sgd', not {self.optimizer!r}")
        if self.weight_decay and ":" in self.optimizer:
            raise ValueError(f"weight-decay is not for {self.optimizer!r}: give it what it takes in args")
        return self


class PublicSettings(Section):
    """``[public]``: labelled records that need no protection. Give ``devices`` or a ``file``.

    Both halves of the network learn from them before any device is asked. Attackers are assumed to know them.

    Attributes
    ----------
    devices
        The ids of the devices that give their records to everybody.
    file
        An ``.npz`` file with ``x`` and ``y``.
    epochs
        Epochs of learning from public records.
    lr
        Adam's learning rate for them.
    penalty
        The weight of :func:`fedsplit.server.warmup.covariance_penalty`, which makes releases harder to invert.
    """

    devices: list[Annotated[int, Field(ge=0)]] | None = None
    file: str | None = None
    epochs: Annotated[int, Field(ge=0)] = 20
    lr: Rate = 0.002
    penalty: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _one_source(self) -> "PublicSettings":
        if (self.devices is None) == (self.file is None) or self.devices == []:
            raise ValueError("public needs either devices or a file")
        return self


class TuneSettings(Section):
    """``[tune]``: what ``fedsplit tune`` searches for.

    Attributes
    ----------
    trials
        The number of trials.
    seeds
        Seeds per trial, from ``run.seed`` on. Objectives are averaged over them.
    objectives
        Up to three figures to improve together.
    constraints
        By objective, the most that a run may have (of ``test_accuracy`` and ``test_auc``: the least).
    space
        The settings to search; see :class:`fedsplit.tuning.space.Space`. Without it, policies, budgets and learning
        rates around those that are set.
    """

    trials: Positive = 40
    seeds: Positive = 1
    objectives: Annotated[list[Objective], Field(min_length=1, max_length=3)] = Field(
        default=["test_accuracy", "strongest_psnr"]
    )
    constraints: dict[Objective, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)
    space: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _feasible(self) -> "TuneSettings":
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError("objectives: none may come twice")
        for name, bound in self.constraints.items():
            known = figure(name)
            if not known.least <= bound <= known.most:
                possible = f"{known.least:g}..{known.most:g}"
                raise ValueError(f"constraints.{name}: no run can have at {known.bound} {bound:g}, it is in {possible}")
        return self
