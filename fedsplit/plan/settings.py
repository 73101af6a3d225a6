"""The one place where settings are defined, checked and documented: a TOML file as frozen pydantic models.

An unknown key or a bad value is refused with the key, the value and what is allowed.
"""

import time
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from fedsplit.common.errors import ConfigError
from fedsplit.common.figures import OBJECTIVES, figure
from fedsplit.common.tables import Section, one_line
from fedsplit.model.tasks import TASKS
from fedsplit.plan.combinations import refusal
from fedsplit.plan.modes import MODES, Mode
from fedsplit.plan.strategies import STRATEGIES
from fedsplit.release.chosen import built_in, from_outside, takes, with_noise
from fedsplit.release.policies import BUILT_IN
from fedsplit.release.policy import Policy

INCIDENTAL = ("run.engine", "run.ray-address", "run.observers")
"""Settings on which nothing depends that a run comes to: it may be resumed with others."""
Code = Annotated[str, Field(pattern=r"^[^:\s]+:[^:\s]+$")]  # module:Name
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
    """``[run]``: the name (of the run folder), seed, rounds, engine, and rounds between evaluations (0: at the end).

    ``ray_address``: HOST:PORT of a Ray cluster that is there already, for the engine ``ray``; without it a private one
    is made.
    ``observers``: a user's own (module:Class), which are told of the run; see
    :class:`fedsplit.runs.observing.Observer`.
    """

    name: str = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    rounds: Positive
    engine: Literal["ray", "inline"] = "ray"
    ray_address: Annotated[str, Field(pattern=r"^[^\s/:]+:[0-9]{1,5}$")] | None = None
    evaluate_every: Annotated[int, Field(ge=0)] = 0
    observers: list[Code] = Field(default_factory=list)


class DataSettings(Section):
    """``[data]``: one of ``name`` (a packaged data set), ``folder`` (of .npz files) or ``builder`` (module:function).

    Or ``shape``, of one record, where real nodes have the records: then nobody else needs any.
    ``overlap``: whether the windows of ``wearables`` overlap by half or not at all.
    ``novel``: the class of a data set that nobody trains with, which makes it a task ``novelty``.
    ``task`` (see :func:`fedsplit.model.tasks.task_of`) and ``outputs`` (classes, columns of a regression target, or
    the most recordings that a device has for ``novelty``) describe a user's own data.
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
    """``[devices.profile]``, in simulation only: what each device would need, on a virtual clock.

    ``compute``: speed relative to one core of this machine; ``uplink`` and ``downlink`` in Mbit/s; ``latency``: seconds
    of a round trip, once an exchange. Each is a number or a lognormal over the devices. ``availability``: the
    probability that a device is there in a round, or a Markov chain. ``dropout``: the probability that it is lost in an
    exchange. ``trace``: a CSV file, see :class:`fedsplit.server.virtual.trace.Trace`, that begins again every
    ``trace_period`` seconds. ``preset`` stands for typical figures, of which those that are given take the place; see
    :meth:`filled`.
    ``release_seconds`` and ``gradient_seconds``: what one core of this machine needs to release a record, and for its
    gradient; measured where they are absent, so give them where runs must be equal.
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
    """``[devices]``: how many there are (test devices included), how many a node hosts, who holds what.

    ``test``: a list of device ids, a number (the last ones) or ``"all"`` (every device that has test records).
    ``fraction`` of the training devices is sampled in each round, ``sampling`` by chance, by size or fairly; see
    :class:`fedsplit.plan.schedule.Schedule`. ``over_sampling`` times as many are asked, and the round ends with the
    answers of those who come first.
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
    """``[model]``: a built-in ``name`` with the first layer's ``width`` and ``activation``, or a ``builder``.

    ``width`` is the first layer's output channels or units. ``builder`` is a module:function that takes nothing and
    returns a SplitModel.
    """

    name: Literal["sensor-cnn", "image-cnn", "mlp"] | None = None
    builder: str | None = None
    width: Positive = 32
    activation: Literal["relu", "leaky_relu", "tanh", "sigmoid", "gelu", "identity"] = "relu"


class DroppingSettings(Section):
    """``[dropping]``: the policy and its numbers; see :mod:`fedsplit.release.policies`.

    ``policy``: one that comes with fedsplit or ``module:Name`` of somebody's own, whose fields are then keys, too.
    ``mask = "keyed"`` keeps the same outputs of a record in all rounds; prediction is always keyed.
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
    """``[protocol]``: the mode (no default), records per device and round, the trunk's mini-batches, the wire.

    ``chunk``: a number of records, ``"epoch"`` (all of a device's records), or in single-pass ``"spread"`` (an even
    share in each round). First-layer gradients that come s rounds later than the mode's way count (1 + s)^-a, where a
    is ``staleness_weight``. ``timeout`` is the seconds a message may take, ``deadline`` those after which a round goes
    on without the answer: on the virtual clock of a profile, or of real nodes. With a profile ``min_nodes`` counts
    devices. ``pace``: a ``module:Class`` from outside that decides who takes part in an exchange, and when it is over;
    see :class:`fedsplit.server.pace.Pace`. A node is left out for good after ``max_offences`` replies that no honest
    node would send. ``labels``: whether they go to the server with the releases or stay at home, where the trunk's last
    layer is then computed; see :mod:`fedsplit.server.at_home`.
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
    """``[first-layer]``: the Flower strategy that aggregates it (or ``frozen``), its learning rate, its arguments.

    ``strategy``: ``frozen``, or as in :func:`fedsplit.server.aggregation.build_strategy`.
    ``schedule`` as in :func:`fedsplit.common.seeds.scheduled`.
    """

    strategy: Annotated[str, one_of("frozen", *STRATEGIES, own="Class")] = "FedAdam"
    lr: Rate = 0.003
    schedule: LearningSchedule = "constant"
    args: dict[str, Any] = Field(default_factory=dict)


class TrunkSettings(Section):
    """``[trunk]``: its optimizer and learning rate; ``schedule`` as in :func:`fedsplit.common.seeds.scheduled`.

    ``optimizer`` is built with ``lr`` and ``args``; from outside a ``module:Class`` of a torch Optimizer, which only
    the server imports.
    ``thinning``: in learning, up to this share of a record's outputs counts as dropped, too, drawn anew in each step.
    ``replay_mb``: the most megabytes that releases kept for replay take between rounds; without it all are kept.
    While the trunk learns it has a second copy of them, and the round's own.
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
    """``[public]``: labelled records that nobody has to protect, from devices that give them or from an .npz ``file``.

    Both halves of the network learn from them for ``epochs`` (with Adam and ``lr``) before any device is asked.
    ``penalty`` weighs :func:`fedsplit.server.warmup.covariance_penalty`. An attacker is taken to know them.
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
    """``[guard]``, in simulation only: ``observe`` counts what the ``limits`` (a file) would refuse, or ``enforce``."""

    mode: Literal["observe", "enforce"] = "observe"
    limits: str | None = None


class AuditSettings(Section):
    """``[audit]``, in simulation only: record what ``targets`` records release, and their originals."""

    targets: Annotated[int, Field(ge=0)] = 0


if TYPE_CHECKING:
    Objective = str
else:
    Objective = Literal[OBJECTIVES]


class TuneSettings(Section):
    """``[tune]``, for ``fedsplit tune``: what to look for, in which ``space`` of settings, in how many ``trials``.

    Each trial is run with so many ``seeds``, from ``run.seed`` on, and objectives are averaged over them.
    ``constraints``: by objective, how much it may be at most (at least, if more of it is better).
    ``space``: see :class:`fedsplit.tuning.space.Space`; without it, budgets of dropping and learning rates around those
    that are set.
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
