"""The figures of a run: what each is called, in which unit, which way is better, what it can be, how it is written.

Whatever lists, orders, writes, bounds or draws figures asks here. A figure that is not in the table, because a task or
an observer of somebody's own brings it, is shown by its name with four digits.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

Value = int | float


@dataclass(frozen=True)
class Axis:
    """How a figure is drawn along a picture's horizontal axis.

    Attributes
    ----------
    short : str
        What it is called in a sentence.
    label : str
    per : float
        The axis counts in so much of the figure's unit.
    whole : bool
        Whether it has whole numbers only.
    """

    short: str
    label: str
    per: float = 1.0
    whole: bool = False


@dataclass(frozen=True)
class Figure:
    """What is known of a figure.

    Attributes
    ----------
    name : str
        In ``metrics.jsonl``, ``result.json``, settings.
    label : str
        In tables, with the unit where it is no plain number; by default the name.
    better : str
        ``higher`` or ``lower``.
    least, most : float
        What it can be.
    form : str
        A format specification.
    source : tuple of str
        Keys of the value in ``result.json``, or in ``audit.json``; by default the name.
    place : str
        ``result`` or ``audit``: which of the two files has it. ``round``: only a round's line.
    shown : bool
        Whether tables of runs show it.
    score : str
        What a picture's vertical axis calls it, if it says how well a model does. A run's first one is told first.
    grows : bool
        Whether it never falls while a run goes on.
    margin : float or None
        By how much other seeds usually change it; None: by a tenth.
    objective : bool
        Whether ``fedsplit tune`` can search for it.
    axis : Axis or None
    """

    name: str
    label: str = ""
    better: Literal["higher", "lower"] = "lower"
    least: float = 0.0
    most: float = inf
    form: str = ".4g"
    source: tuple[str, ...] = ()
    place: Literal["result", "audit", "round"] = "result"
    shown: bool = True
    score: str = ""
    grows: bool = False
    margin: float | None = None
    objective: bool = False
    axis: Axis | None = None

    @property
    def title(self) -> str:
        """What tables and pictures call it."""
        return self.label or self.name

    @property
    def keys(self) -> tuple[str, ...]:
        """Where its value stands in the file that has it."""
        return self.source or (self.name,)

    @property
    def sign(self) -> int:
        """1 if less is better, -1 if more is: times it, less is better."""
        return -1 if self.better == "higher" else 1

    @property
    def bound(self) -> str:
        """What a constraint bounds it from: it must be ``at most`` or ``at least`` so much."""
        return "least" if self.better == "higher" else "most"

    def written(self, value: Value | None) -> str:
        """Return a value for people, ``-`` for none."""
        return "-" if value is None else format(value, self.form)

    def usual_change(self, value: float) -> float:
        """Return by how much other seeds usually change a value."""
        return 0.1 * abs(value) if self.margin is None else self.margin

    def of(self, found: Mapping[str, Any]) -> Value | None:
        """Return its value in what the file holds; None if it is not there, or no number."""
        value: Any = found
        for key in self.keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value if is_number(value) else None


def is_number(value: object) -> bool:
    """Whether something is a figure's value: a number, no truth value, and not infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


_SHARE: dict[str, Any] = {"better": "higher", "most": 1.0, "form": ".4f"}
_COUNT: dict[str, Any] = {"form": ","}
_HIDDEN: dict[str, Any] = {"shown": False}
_OF_A_ROUND: dict[str, Any] = {"place": "round", "shown": False}

FIGURES: dict[str, Figure] = {
    figure.name: figure
    for figure in (
        Figure("test_accuracy", **_SHARE, score="accuracy", margin=0.03, objective=True),
        Figure("test_auc", **_SHARE, score="AUC", margin=0.03, objective=True),
        Figure("test_episode_auc", **_SHARE),
        Figure("test_r2", better="higher", least=-inf, most=1.0, form=".4f", score="R²"),
        Figure("test_rmse", form=".4f"),
        Figure("test_loss", form=".4f", score="loss", objective=True),
        Figure(
            "exposures_max", **_COUNT, least=1.0, grows=True, objective=True,
            axis=Axis("exposures", "releases of a training record, the most", whole=True),
        ),
        Figure("equations", **_COUNT, source=("ledger", "equations")),
        Figure(
            "strongest_psnr", "strongest (dB)", least=-inf, form=".1f", place="audit", source=("strongest", "psnr"),
            margin=1.0, objective=True,
        ),
        Figure(
            "identification", "identified", most=1.0, form=".1%", place="audit", source=("strongest", "identification"),
            margin=0.1, objective=True,
        ),
        Figure("exchanges", **_COUNT, least=1.0, grows=True, objective=True),
        Figure("bytes_up", **_COUNT, least=1.0, grows=True, objective=True, axis=Axis("bytes", "MB sent up", per=1e6)),
        Figure("bytes_down", **_COUNT, grows=True),
        Figure("seconds", form=",.1f", source=("seconds", "training"), objective=True),
        Figure(
            "simulated_seconds", "simulated seconds", form=",.1f", source=("simulated", "seconds"), grows=True,
            objective=True, axis=Axis("simulated time", "simulated seconds"),
        ),
        # what tables of runs leave out, or show in a way of their own
        Figure("round", **_COUNT, **_OF_A_ROUND, axis=Axis("rounds", "rounds", whole=True)),
        Figure("train_loss", **_OF_A_ROUND, form=".4f", score="loss"),
        Figure("train_accuracy", **_SHARE, **_OF_A_ROUND, score="accuracy"),
        Figure("trunk_seconds", **_OF_A_ROUND),
        *(Figure(name, **_COUNT, **_OF_A_ROUND) for name in ("heard", "device_bytes_up", "device_bytes_down")),
        Figure("public_only_accuracy", **_SHARE, **_HIDDEN),
        Figure("public_only_auc", **_SHARE, **_HIDDEN),
        Figure("public_only_r2", better="higher", least=-inf, most=1.0, form=".4f", **_HIDDEN),
        Figure("gain_over_public", better="higher", least=-1.0, most=1.0, **_HIDDEN),
        Figure("gain_interval", **_HIDDEN),
        *(
            Figure(name, **_COUNT, **_HIDDEN)
            for name in ("rounds", "devices", "nodes", "samples", "dense_bytes_up", "test_exposures_max", "failures")
        ),
        Figure("samples_per_second", better="higher", form=",.1f", **_HIDDEN),
        Figure("seed", **_HIDDEN),
    )
}  # fmt: skip
"""By name, in the order in which they are shown."""

SHOWN = tuple(figure for figure in FIGURES.values() if figure.shown)
SCORES = tuple(figure for figure in SHOWN if figure.score and figure.better == "higher")
OBJECTIVES = tuple(figure.name for figure in FIGURES.values() if figure.objective)
AUDITED = tuple(figure.name for figure in FIGURES.values() if figure.place == "audit")
AXES = tuple(FIGURES[name] for name in ("round", "bytes_up", "exposures_max", "simulated_seconds"))
"""What scores are drawn over, in the order of a picture's parts."""


def figure(name: str) -> Figure:
    """Return what is known of a figure: of one that is not in the table its name."""
    return FIGURES.get(name) or Figure(name)


def axis_of(name: str) -> Axis:
    """Return how a figure is drawn along a picture's horizontal axis."""
    known = figure(name)
    return known.axis or Axis(known.title, known.title)


def others(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the numbers in a result, or in a round's line, that are not in the table."""
    for name, value in found.items():
        if name not in FIGURES and is_number(value):
            yield name


def told_first(result: Mapping[str, Any]) -> Figure | None:
    """Return the figure that says in one number how well a run's model does, of those that there are."""
    return next((score for score in SCORES if score.of(result) is not None), None)
