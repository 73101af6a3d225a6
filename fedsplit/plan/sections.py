"""The sections of a settings file that say what is run: data, devices, model, dropping, guard, audit."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from fedsplit.common.errors import ConfigError
from fedsplit.common.tables import Section
from fedsplit.model.tasks import TASKS
from fedsplit.plan.profiles import ProfileSettings
from fedsplit.plan.values import Code, Positive, Rate, one_of, outside
from fedsplit.release.chosen import built_in, from_outside, takes, with_noise
from fedsplit.release.policies import BUILT_IN
from fedsplit.release.policy import Policy


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
    observers
        Classes of one's own (module:Class) that are told of the run; see :class:`fedsplit.runs.observing.Observer`.
    """

    name: str = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    rounds: Positive
    engine: Literal["ray", "inline"] = "ray"
    ray_address: Annotated[str, Field(pattern=r"^[^\s/:]+:[0-9]{1,5}$")] | None = None
    evaluate_every: Annotated[int, Field(ge=0)] = 0
    observers: list[Code] = Field(default_factory=list)


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


POLICY_KEYS = tuple(dict.fromkeys(key for name in BUILT_IN for key in takes(name)))
"""The keys of ``[dropping]`` that one or the other policy takes."""


def _listed(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}"


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

    policy: Literal["none", "random", "at-most", "top-k", "units", "bits"] | Annotated[str, outside("Class")]
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
        given = {key: getattr(self, key) for key in POLICY_KEYS} | (self.model_extra or {})
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
            taken = " and ".join(needs) or f"none of {_listed(POLICY_KEYS)}"
            raise ValueError(f"policy {self.policy!r} takes {taken}, got {' and '.join(given) or 'none'}")
        try:
            self.built()
        except ConfigError as error:
            raise ValueError(str(error)) from None
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

    @property
    def enforces(self) -> bool:
        """Whether refusals hold, if the limits enforce, too."""
        return self.mode == "enforce"


class AuditSettings(Section):
    """``[audit]``: what a simulated run records for ``fedsplit audit``.

    Attributes
    ----------
    targets
        The number of private records whose originals and releases are recorded. 0 records nothing.
    attacks
        Attacks of one's own (module:Class) beside the standard ones; see :class:`fedsplit.audit.attack.Attack`.
    """

    targets: Annotated[int, Field(ge=0)] = 0
    attacks: list[Code] = Field(default_factory=list)
