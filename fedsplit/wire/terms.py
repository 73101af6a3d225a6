"""What training tells a node before its first message: the model's description, and the few terms that concern it.

Neither trunk nor server are in it, nor weights, which come with each download. To a node it is a stranger's text: every
field is checked, numbers have bounds, and code and folders are only named, for the node's owner to allow.
"""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, ValidationError

from fedsplit.common.errors import ConfigError
from fedsplit.wire.container import MAX_DEVICES
from fedsplit.wire.description import Description, Strict, Word, refusal

MOST_ROUNDS = 10**5  # a node looks at every round before the first message: seconds
_LONGEST = 2**20  # characters
Count = Annotated[int, Field(ge=1, lt=2**31)]
Device = Annotated[int, Field(ge=0, lt=MAX_DEVICES)]


class _Part(Strict):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class DataTerms(_Part):
    """Which records: as in :func:`fedsplit.data.open_source`; without a name each node has its own."""

    name: Word | None
    folder: Annotated[str, Field(min_length=1, max_length=4096)] | None
    builder: Word | None
    count: Annotated[int, Field(ge=1, lt=MAX_DEVICES)]
    test: Literal["all"] | Device | tuple[Device, ...]
    partition: Literal["natural", "iid", "dirichlet"]
    alpha: Annotated[float, Field(gt=0)]
    overlap: bool
    novel: Annotated[int, Field(ge=0, lt=2**31)] | None


class AskedTerms(_Part):
    """How often records will be asked for: what a check of limits goes by before the first message.

    ``once``, ``chunk``, ``fraction`` and ``sampling`` as in :class:`fedsplit.plan.schedule.Schedule`.
    ``teaches``: whether gradients step the first layer. ``alone``: the name of its strategy, if that takes each
    device's gradient by itself. ``donors``: devices that gave their records to everybody.
    """

    rounds: Annotated[int, Field(ge=1, le=MOST_ROUNDS)]
    once: bool
    chunk: Count | Literal["epoch", "spread"]
    fraction: Annotated[float, Field(gt=0, le=1)]
    sampling: Literal["uniform", "size", "fair"]
    evaluate_every: Annotated[int, Field(ge=0, lt=2**31)]
    teaches: bool
    alone: Word | None
    donors: tuple[Device, ...]


class HeadTerms(_Part):
    """The trunk's last layer, where it is computed beside the labels; see :class:`fedsplit.model.head.Head`."""

    features: Annotated[int, Field(ge=1, le=2**24)]
    outputs: Annotated[int, Field(ge=1, le=2**24)]
    bias: bool


class Terms(_Part):
    """What a node needs to know of a run.

    Attributes
    ----------
    model : Description
    data : DataTerms
    asked : AskedTerms
    seed : int
        Of the partition of a named data set, and of sampling.
    keyed : bool
        Whether a record keeps the same outputs in all rounds.
    head : HeadTerms or None
        None where labels leave with the releases.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    model: Description
    data: DataTerms
    asked: AskedTerms
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    keyed: bool
    head: HeadTerms | None

    def to_json(self) -> str:
        """Return the terms as one line, for :meth:`from_json`."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Undo :meth:`to_json`.

        Raises
        ------
        ConfigError
            In one line: the first field that is not as it must be.
        """
        if len(text) > _LONGEST:
            raise ConfigError(f"the run's terms must have at most {_LONGEST} characters, they have {len(text)}")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise refusal(error) from None

    def named(self) -> dict[str, str]:
        """Return what the terms name of the node's machine, code and folders, by setting."""
        given = {"data.builder": self.data.builder, "data.folder": self.data.folder}
        return {**self.model.named(), **{setting: name for setting, name in given.items() if name is not None}}
