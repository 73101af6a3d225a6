"""The one place where settings are defined, checked and documented: a TOML file as frozen pydantic models.

An unknown key or a bad value is refused with the key, the value and what is allowed.
"""

import time
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from fedsplit.common.errors import ConfigError
from fedsplit.common.tables import Section, one_line
from fedsplit.model.tasks import TASKS
from fedsplit.plan.combinations import refusal
from fedsplit.plan.modes import MODES, Mode
from fedsplit.plan.strategies import STRATEGIES
from fedsplit.release.chosen import built_in, from_outside, takes, with_noise
from fedsplit.release.policies import BUILT_IN
from fedsplit.release.policy import Policy

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=1e9)]
Turn = Annotated[float, Field(ge=0.1, le=1e9)]


def one_of(*known: str, own: str) -> AfterValidator:
    """Allow some names, and one from outside: ``module:Class`` or ``module:function``."""

    def check(name: str) -> str:
        if name not in known and not all(name.partition(":")):
            raise ValueError(f"should be one of {', '.join(map(repr, known))} or 'module:{own}', got {name!r}")
        return name

    return AfterValidator(check)


LearningSchedule = Annotated[str, one_of("constant", "cosine", "step", own="function")]


class RunSettings(Section):
    """``[run]``: one run's name, seed, length and engine.

    Attributes
    ----------
    name
        The name of the run folder, ``runs/NAME-TIMESTAMP``.
    seed
        Every random choice of a run follows from it, except those from the devices' own secrets.
    rounds
        The number of rounds.
    engine
        ``ray`` runs the devices in Ray's processes, ``inline`` all in one process. The weights are the same.
    ray_address
        HOST:PORT of a Ray cluster that already runs, for the engine ``ray``. Without it a run starts a private one.
    evaluate_every
        Rounds between two evaluations on the test devices. 0 evaluates once, at the end.
    """

    name: str = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    rounds: Positive
    engine: Literal["ray", "inline"] = "ray"
    ray_address: Annotated[str, Field(pattern=r"^[^\s/:]+:[0-9]{1,5}$")] | None = None
    evaluate_every: Annotated[int, Field(ge=0)] = 0


class DataSettings(Section):
    """``[data]``: where the records come from. Give one of ``name``, ``folder``, ``builder`` and ``shape``.

    Attributes
    ----------
    name
        A packaged data set: ``digits``, ``mnist``, ``wearables``, ``breast-cancer`` or ``pig-cvp``.
    folder
        A folder with one ``.npz`` file per device, in the order of their names.
    builder
        ``module:function``, which returns the :class:`fedsplit.data.DeviceData` of one device.
    shape
        The shape of one record, for a server whose nodes hold all records.
    overlap
        Whether the windows of ``wearables`` overlap by half. Only ``wearables`` takes ``false``.
    novel
        The class that nobody trains with. It turns a packaged data set into a ``novelty`` task.
    task
        The task of your own data: ``classification`` (the default), ``binary``, ``regression``, ``novelty``, or
        ``module:Name`` of your own. A packaged data set knows its own.
    outputs
        Classes, columns of a regression's target, or for ``novelty`` the most recordings that one device has.
    """

    name: str | None = None
    folder: str | None = None
    builder: str | None = None
    shape: Annotated[list[Positive], Field(min_length=1)] | None = None
    overlap: bool = True
    novel: Annotated[int, Field(ge=0)] | None = None
    task: Annotated[str, one_of(*TASKS, own="Name")] | None = None
    outputs: Positive | None = None


class LogNormal(Section):
    """A lognormal distribution over devices: exp(ln median + sigma z), with z normal."""

    median: Rate
    sigma: Annotated[float, Field(ge=0, le=10)]


class OnOff(Section):
    """Times, in mean seconds and exponentially distributed, for which a device is there and away by turns."""

    on: Turn
    off: Turn


class ProfileSettings(Section):
    """``[devices.profile]``: what each device can do, on a virtual clock. In simulation only.

    A lognormal quantity is a table ``{ median = m, sigma = s }``; each device draws its own value.

    Attributes
    ----------
    preset
        Typical figures for all keys below. A key that is given wins over the preset's.
    compute
        Speed, relative to one core of this machine.
    uplink
        Mbit/s (10^6 bits) from the device.
    downlink
        Mbit/s (10^6 bits) to the device.
    latency
        Seconds of a round trip, once per exchange.
    availability
        The probability that a device is there in a round, or the mean seconds for which it is on and off by turns.
    dropout
        The probability that a device is lost during an exchange.
    trace
        A CSV file of what devices could do at which time; see :class:`fedsplit.server.virtual.trace.Trace`.
    trace_period
        Seconds after which the trace begins again.
    release_seconds
        Seconds that one core of this machine needs to release one record. Measured, anew for each run, if absent.
    gradient_seconds
        Seconds that one core of this machine needs for one record's gradient. Measured if absent.
    """

    preset: Literal["phones-4g", "wearables-ble", "hospital-lan"] | None = None
    compute: Rate | LogNormal | None = None
    uplink: Rate | LogNormal | None = None
    downlink: Rate | LogNormal | None = None
    latency: Annotated[float, Field(ge=0, allow_inf_nan=False)] | LogNormal | None = None
    availability: Annotated[float, Field(gt=0, le=1)] | OnOff | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    trace: str | None = None
    trace_period: Seconds | None = None
    release_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    gradient_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    def filled(self) -> "ProfileSettings":
        """Return the profile with the preset's figures in place of those that are not given, or an ideal device's."""
        ideal = {"compute": 1.0, "latency": 0.0, "availability": 1.0, "dropout": 0.0}
        given = self.model_dump(by_alias=True, exclude_none=True)
        return ProfileSettings.model_validate({**ideal, **presets().get(self.preset or "", {}), **given})

    @model_validator(mode="after")
    def _period(self) -> "ProfileSettings":
        if self.trace_period is not None and self.trace is None:
            raise ValueError("trace-period is for a trace")
        return self


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Return the typical figures of some kinds of devices; the file says where they come from."""
    return tomllib.loads((Path(__file__).parent / "presets.toml").read_text(encoding="utf-8"))


class DeviceSettings(Section):
    """``[devices]``: how many devices there are, who holds which records, and who takes part in a round.

    Attributes
    ----------
    count
        The number of devices, test devices included. Optional where the data know it.
    per_node
        Devices that one node hosts. It changes the speed, never the weights.
    partition
        How records are dealt: as the data have it, at random in equal parts, or by a Dirichlet draw of classes.
    alpha
        The Dirichlet distribution's parameter. The smaller it is, the more the devices' classes differ.
    fraction
        The share of the training devices that a round asks: its cohort.
    sampling
        How the cohort is drawn: by chance, in proportion to the devices' records, or those first that were heard least.
    over_sampling
        A round asks this many times the cohort and ends as soon as the cohort's number has answered.
    test
        The devices that test: a list of ids, a number (the last ones), or every device that has test records.
    profile
        What each device can do on a virtual clock; see below.
    """

    count: Positive | None = None
    per_node: Positive = 1
    partition: Literal["natural", "iid", "dirichlet"] = "natural"
    alpha: Rate = 0.5
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    sampling: Literal["uniform", "size", "fair"] = "uniform"
    over_sampling: Annotated[float, Field(ge=1, le=10)] = 1.0
    test: Literal["all"] | Positive | list[Annotated[int, Field(ge=0)]]
    profile: ProfileSettings | None = None

    @model_validator(mode="after")
    def _others(self) -> "DeviceSettings":
        if self.over_sampling > 1 and self.fraction == 1:
            raise ValueError(f"over-sampling {self.over_sampling:g} needs a fraction below 1: all are asked already")
        return self


class ModelSettings(Section):
    """``[model]``: the network. Give a built-in ``name`` or a ``builder``.

    Attributes
    ----------
    name
        A built-in network.
    builder
        ``module:function``, which takes nothing and returns a :class:`fedsplit.model.split.SplitModel`.
    width
        The first layer's units or output channels, for a built-in network.
    activation
        The activation after the first layer, for a built-in network.
    """

    name: Literal["sensor-cnn", "image-cnn", "mlp"] | None = None
    builder: str | None = None
    width: Positive = 32
    activation: Literal["relu", "leaky_relu", "tanh", "sigmoid", "gelu", "identity"] = "relu"


class DroppingSettings(Section):
    """``[dropping]``: which of the first layer's outputs leave a device; see :mod:`fedsplit.release.policies`.

    Attributes
    ----------
    policy
        ``none`` sends every output, ``random`` each with probability ``keep``, ``at-most`` up to ``k`` drawn at random,
        ``top-k`` the ``k`` largest, ``units`` all outputs of a layer of ``k``, ``bits`` all outputs as short codes.
        Or ``module:Name``, a policy of your own, whose fields are then keys of this section.
    keep
        The probability that an output is kept, for ``random``.
    k
        Outputs per record, for ``at-most``, ``top-k`` and ``units``.
    bits
        Bits per output, for ``bits``.
    clip
        The largest Euclidean norm of a record's outputs; larger ones are scaled down. Goes with ``noise``.
    noise
        The standard deviation of the Gaussian noise on every output, in multiples of ``clip``.
    mask
        ``fresh`` draws new masks in each round, ``keyed`` keeps a record's mask. Predictions are always keyed.
    """

    model_config = ConfigDict(extra="allow")

    policy: Literal["none", "random", "at-most", "top-k", "units", "bits"] | Annotated[str, Field(pattern=".:.")]
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    k: Positive | None = None
    bits: Annotated[int, Field(ge=1, le=8)] | None = None
    clip: Rate | None = None
    noise: Rate | None = None
    mask: Literal["fresh", "keyed"] = "fresh"

    @property
    def own(self) -> bool:
        """Whether the policy is somebody's own."""
        return self.policy not in BUILT_IN

    @property
    def numbers(self) -> dict[str, Any]:
        """What is given of the policy's fields."""
        given = {key: getattr(self, key) for key in ("keep", "k", "bits")} | (self.model_extra or {})
        return {key: value for key, value in given.items() if value is not None}

    def built(self) -> Policy:
        """Return the policy; raises ConfigError. One from outside is imported here, and not before."""
        policy = from_outside(self.policy, self.numbers) if self.own else built_in(self.policy, **self.numbers)
        return with_noise(policy, self.clip or 0.0, self.noise or 0.0)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, raw: Any) -> Any:
        keys = {field.alias for field in cls.model_fields.values()}
        if isinstance(raw, dict) and raw.get("policy") in BUILT_IN and (unknown := sorted(set(raw) - keys)):
            raise PydanticCustomError("extra_forbidden", "unknown key", {"key": unknown[0]})
        return raw

    @model_validator(mode="after")
    def _budget(self) -> "DroppingSettings":
        if (self.clip is None) != (self.noise is None):
            raise ValueError("clip and noise go together: noise needs a bound, and a bound is there for noise")
        if self.own:
            return self
        needs, given = takes(self.policy), tuple(self.numbers)
        if given != needs:
            taken = " and ".join(needs) or "none of keep, k and bits"
            raise ValueError(f"policy {self.policy!r} takes {taken}, got {' and '.join(given) or 'none'}")
        try:
            self.built()
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


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


class GuardSettings(Section):
    """``[guard]``: what a simulated device's guard does. Real nodes follow their owners' limits instead.

    Attributes
    ----------
    mode
        ``observe`` counts what the limits would refuse, ``enforce`` refuses it.
    limits
        A limits file. Without it the shipped limits hold.
    """

    mode: Literal["observe", "enforce"] = "observe"
    limits: str | None = None


class AuditSettings(Section):
    """``[audit]``: what a simulated run records for ``fedsplit audit``.

    Attributes
    ----------
    targets
        The number of private records whose originals and releases are recorded. 0 records nothing.
    """

    targets: Annotated[int, Field(ge=0)] = 0


Objective = Literal[
    "test_accuracy",
    "test_auc",
    "test_loss",
    "strongest_psnr",
    "identification",
    "bytes_up",
    "exchanges",
    "seconds",
    "simulated_seconds",
    "exposures_max",
]
MAXIMISED = ("test_accuracy", "test_auc")
"""Objectives of which more is better; of all others less is."""


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
            low, high = _POSSIBLE.get(name, (0.0, float("inf")))
            if not low <= bound <= high:
                side = "least" if name in MAXIMISED else "most"
                raise ValueError(f"constraints.{name}: no run can have at {side} {bound:g}, it is in {low:g}..{high:g}")
        return self


_POSSIBLE = {
    "test_accuracy": (0.0, 1.0),
    "test_auc": (0.0, 1.0),
    "identification": (0.0, 1.0),
    "bytes_up": (1.0, float("inf")),
    "exchanges": (1.0, float("inf")),
    "exposures_max": (1.0, float("inf")),
    "strongest_psnr": (-float("inf"), float("inf")),
}


class Settings(Section):
    """All settings of one run."""

    run: RunSettings
    data: DataSettings
    devices: DeviceSettings
    model: ModelSettings
    dropping: DroppingSettings
    protocol: ProtocolSettings
    first_layer: FirstLayerSettings = FirstLayerSettings()
    trunk: TrunkSettings = TrunkSettings()
    public: PublicSettings | None = None
    guard: GuardSettings = GuardSettings()
    audit: AuditSettings = AuditSettings()
    tune: TuneSettings | None = None

    @property
    def donors(self) -> tuple[int, ...]:
        """The devices that give their records to everybody; they take no part as devices."""
        return tuple(sorted(set(self.public.devices or ()))) if self.public else ()

    @property
    def teaches(self) -> bool:
        """Whether devices' gradients step the first layer."""
        return self.first_layer.strategy != "frozen" and self.protocol.facts.teaches

    @model_validator(mode="after")
    def _together(self) -> "Settings":
        if why := refusal(self):
            raise ValueError(why)
        sought = (*self.tune.objectives, *self.tune.constraints) if self.tune else ()
        profile = self.devices.profile
        if "simulated_seconds" in sought and (
            not profile or None in (profile.release_seconds, profile.gradient_seconds)
        ):
            raise ValueError(
                "tune: simulated_seconds needs a [devices.profile] with release-seconds and gradient-seconds (as in "
                "the config.toml of a run): trials would measure beside each other"
            )
        if (self.model.name is None) == (self.model.builder is None):
            raise ValueError(f"model needs a name or a builder, not {'both' if self.model.name else 'neither'}")
        return self

    def to_toml(self) -> str:
        """Return a run's settings, defaults included, as a TOML file's text."""
        return tomli_w.dumps(self.tables())

    def tables(self) -> dict[str, Any]:
        """Return a run's settings, defaults included, as nested tables: undone by :func:`check_settings`."""
        return self.model_dump(by_alias=True, exclude_none=True, exclude={"tune"})

    def flat(self) -> dict[str, Any]:
        """Return the settings that have a value, defaults included, by dotted key."""
        return flattened(self.tables())

    def to_json(self) -> str:
        """Return the settings as one line, for :meth:`from_json`."""
        return self.model_dump_json(by_alias=True, exclude={"tune"})

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """Undo :meth:`to_json`."""
        return cls.model_validate_json(text)


def default_folder(settings: Settings) -> Path:
    """Return ``runs/NAME-TIMESTAMP``."""
    return Path("runs") / f"{settings.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def load_settings(path: Path | str, overrides: Sequence[str] = ()) -> Settings:
    """Read a settings file.

    Parameters
    ----------
    path : Path or str
    overrides : sequence of str
        ``section.key=value`` with a TOML value (a bare word is a string); they win over the file.

    Raises
    ------
    ConfigError
        In one line: the key, the value and what is allowed.
    """
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"settings file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings file {path}: not valid TOML: {error}") from None
    for override in overrides:
        _override(raw, override)
    return check_settings(raw)


def check_settings(raw: dict[str, Any]) -> Settings:
    """Build settings from nested tables; raises ConfigError."""
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(one_line(error, Settings)) from None


def flattened(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one, by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat.update(flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"--set must look like section.key=value, got {override!r}")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = raw
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override!r}: {part!r} is not a table")
    table[parts[-1]] = value
