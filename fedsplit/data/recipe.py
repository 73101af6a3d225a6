"""The recipe by which recordings become records: a small file that all devices of a run share."""

import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import tomli_w
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.common.tables import Section, one_line
from fedsplit.data.formats import Layout
from fedsplit.data.recordings import Channel, Recording, read_recording
from fedsplit.data.records import Scaling
from fedsplit.data.resampling import UNLABELLED
from fedsplit.data.windows import Windows, cut, whole_samples

RECIPE = "windows.toml"

_HEADER = "# How recordings become records, the same on all devices of a run: fedsplit windows --like windows.toml\n"

Names = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Recipe(Section):
    """How recordings become records: a small TOML file that the devices of a run share.

    ``channels`` in the order of a record's first axis, in ``units`` ("": as the files have them); sampled at ``rate``
    Hz; windows of ``seconds`` that begin every ``stride``; times of up to ``fill`` seconds between samples are bridged.
    Labels: ``classes`` are numbered from 0; or ``normal`` ones are 0 and ``anomalous`` ones 1. ``otherwise`` is the
    label where there is none of these; without it there is none. With ``recordings`` the task is ``novelty``: a
    device's normal windows, all of them if there are no labels, are so many recordings by their order. Records are
    ``(value - subtract) / divide``, by channel.
    """

    channels: Names
    units: list[str]
    rate: Positive
    seconds: Positive
    stride: Positive
    fill: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    classes: Names | None = None
    normal: Names | None = None
    anomalous: Names | None = None
    otherwise: str | None = None
    recordings: Annotated[int, Field(ge=1, le=1000)] | None = None
    subtract: list[Finite] | None = None
    divide: list[Positive] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(set(self.channels)) < len(self.channels):
            raise ValueError("channels: none may come twice")
        for name in ("units", "subtract", "divide"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.channels):
                raise ValueError(f"{name} must be {len(self.channels)}, one for each channel, got {len(given)}")
        if (self.subtract is None) != (self.divide is None):
            raise ValueError("subtract and divide go together")
        for name in ("seconds", "stride"):
            try:
                whole_samples(name, getattr(self, name), self.rate)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _labels(self) -> Self:
        unlabelled = self.recordings is not None and self.numbers == {} and self.otherwise is None
        if self.recordings is not None and self.classes is not None:
            raise ValueError("recordings go with normal and anomalous labels or with none, not with classes")
        if unlabelled:
            return self
        if (self.classes is None) != (self.normal is not None and self.anomalous is not None):
            raise ValueError("labels need either classes, or both normal and anomalous")
        if self.classes is not None and (self.normal is not None or self.anomalous is not None):
            raise ValueError("labels need either classes, or both normal and anomalous")
        if self.classes is not None and len(self.classes) < 2:
            raise ValueError("classes must be at least 2")
        named = [*(self.classes or ()), *(self.normal or ()), *(self.anomalous or ())]
        if len(set(named)) < len(named):
            raise ValueError("labels: none may come twice")
        if self.otherwise is not None and self.otherwise not in named:
            raise ValueError(f"otherwise must be one of {', '.join(named)}, got {self.otherwise!r}")
        return self

    @property
    def numbers(self) -> dict[str, int]:
        """The number of each label."""
        if self.classes is not None:
            return {name: number for number, name in enumerate(self.classes)}
        return dict.fromkeys(self.normal or (), 0) | dict.fromkeys(self.anomalous or (), 1)

    @property
    def task(self) -> str:
        """The name of the records' task, one of :data:`fedsplit.model.tasks.TASKS`."""
        if self.recordings is not None:
            return "novelty"
        return "binary" if self.classes is None else "classification"

    @property
    def scaling(self) -> Scaling:
        """How values become records; raises ConfigError if that has not been measured."""
        if self.subtract is None or self.divide is None:
            raise ConfigError("the recipe has no subtract and divide: they are measured on donors")
        return Scaling(tuple(self.subtract), tuple(self.divide))

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of one record: channels and samples."""
        return len(self.channels), round(self.seconds * self.rate)

    def read(self, path: Path, layout: Layout, *, labelled: bool = True) -> Recording:
        """Read a recording; see :func:`fedsplit.data.recordings.read_recording`.

        Parameters
        ----------
        path : Path
        layout : Layout
            Which columns of the file hold what.
        labelled : bool
            Whether its labels are read.
        """
        return read_recording(
            path,
            [Channel(*each) for each in zip(self.channels, self.units, strict=True)],
            self.rate,
            fill=self.fill,
            numbers=self.numbers if labelled and self.numbers else None,
            otherwise=UNLABELLED if self.otherwise is None else self.numbers[self.otherwise],
            layout=layout,
        )

    def cut(self, recording: Recording) -> Windows:
        """Cut a recording into windows that are records: scaled.

        If it was read without labels y is None: enough to replay it.
        """
        scaling = self.scaling
        found = cut(recording, self.seconds, self.stride, events=self.classes is None)
        return replace(found, x=scaling.apply(found.x.astype(np.float64)))

    def measured(self, parts: Sequence[NDArray[np.float32]]) -> Self:
        """Return the recipe with constants: mean and standard deviation of donors' values (channels, samples)."""
        values = np.concatenate(parts, axis=1).astype(np.float64)
        if not np.isfinite(values).any(axis=1).all():
            raise DataError("donors: a channel holds no numbers to train with, from which constants are measured")
        spread = np.nanstd(values, axis=1)
        if not (spread > 0).all():
            constant = self.channels[int(np.argmin(spread))]
            raise DataError(f"donors: channel {constant!r} is constant in what they have to train with")
        subtract, divide = ([float(f"{v:.6g}") for v in row] for row in (np.nanmean(values, axis=1), spread))
        return self.model_copy(update={"subtract": subtract, "divide": divide})

    def to_toml(self) -> str:
        """Return the text of its file."""
        return _HEADER + tomli_w.dumps(self.model_dump(by_alias=True, exclude_none=True))


def read_recipe(path: Path) -> Recipe:
    """Read a recipe's file; raises ConfigError in one line."""
    try:
        return check_recipe(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def check_recipe(raw: dict[str, Any]) -> Recipe:
    """Build a recipe from its table; raises ConfigError in one line."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(one_line(error, Recipe)) from None
