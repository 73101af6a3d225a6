"""How time passes in a round: who is there, whose answers come, and when an exchange is over."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fedsplit.common.errors import ConfigError
from fedsplit.common.plugins import resolve_function
from fedsplit.model.head import Head
from fedsplit.server.answers import PendingBlock
from fedsplit.server.parts import Parts
from fedsplit.server.round import Round, Rows
from fedsplit.wire.exchange import Gradients
from fedsplit.wire.release import Release


@dataclass(frozen=True)
class Heard:
    """What an exchange has brought, each in the order of the nodes' devices."""

    releases: Sequence[Release]
    gradients: Sequence[Gradients]


@runtime_checkable
class Pace(Protocol):
    """Decides who takes part in a run's exchanges, and when they are over."""

    def cohort(self, now: Round) -> Rows:
        """Begin a round: return which records are asked for, by node."""

    def exchange(self, now: Round, rows: Rows, pending: Sequence[PendingBlock], *, needed: int | None = None) -> Heard:
        """Have records released and cut gradients answered.

        Parameters
        ----------
        now : Round
        rows : dict
            By node.
        pending : sequence of PendingBlock
        needed : int, optional
            How many must answer well (all of them, if fewer are asked); default: ``protocol.min-nodes``.

        Raises
        ------
        RunError
            If too few do.
        """

    def answering(self, now: Round, releases: Sequence[Release], head: Head) -> Sequence[Release]:
        """Return the parts of releases whose devices will be heard when their labels are asked.

        Parameters
        ----------
        now : Round
        releases : sequence of Release
        head : Head
            Its sizes determine how much each device is sent and sends.

        Raises
        ------
        RunError
            If too few devices will be heard.
        """

    def report(self) -> dict[str, Any]:
        """Return what a round's metrics tell of time."""

    def result(self) -> dict[str, Any]:
        """Return what a run's result tells of time."""

    def save_table(self, path: Path) -> None:
        """Write a table of the devices, if there is something to tell of each."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""

    def check_startable(self, counts: Mapping[int, int]) -> None:
        """Refuse a simulation that cannot begin.

        Parameters
        ----------
        counts : mapping
            By device that trains, ascending: its number of training records.

        Raises
        ------
        ConfigError
        """


class RealTime:
    """All nodes that are there are asked at once; an exchange ends with the last answer, or at the deadline.

    With over-sampling it ends as soon as enough devices have answered.

    Parameters
    ----------
    parts : Parts
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def cohort(self, now: Round) -> Rows:
        """Return the schedule's rows."""
        return now.by_node(self.parts.schedule.rows(now.number))

    def exchange(self, now: Round, rows: Rows, pending: Sequence[PendingBlock], *, needed: int | None = None) -> Heard:
        """Ask for releases and answers in one message.

        Parameters
        ----------
        now, rows, pending, needed : Round, dict, sequence of PendingBlock, int or None
            As in :meth:`Pace.exchange`.

        Raises
        ------
        RunError
            If fewer nodes than ``needed`` answer well.
        """
        enough = self.parts.schedule.enough(sum(map(len, rows.values())))
        least = self.parts.options.min_nodes if needed is None else needed
        uploads = now.exchange(rows, pending, needed=least, enough=enough)
        return Heard([u.release for u in uploads], [u.gradients for u in uploads])

    def answering(self, now: Round, releases: Sequence[Release], head: Head) -> Sequence[Release]:
        """Return all releases: only the question itself shows which devices do not answer.

        Parameters
        ----------
        now, releases, head : Round, sequence of Release, Head
            As in :meth:`Pace.answering`.
        """
        return releases

    def report(self) -> dict[str, Any]:
        """Tell nothing: real time is measured elsewhere."""
        return {}

    def result(self) -> dict[str, Any]:
        """Tell nothing."""
        return {}

    def save_table(self, path: Path) -> None:
        """Write nothing."""

    def state(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Do nothing."""

    def check_startable(self, counts: Mapping[int, int]) -> None:
        """Refuse what is about time, of which none passes; raises ConfigError."""
        if self.parts.options.deadline is not None:
            raise ConfigError("protocol.deadline needs a [devices.profile] in a simulation: without it no time passes")
        if self.parts.schedule.over_sampling > 1:
            raise ConfigError("devices.over-sampling needs a [devices.profile] in a simulation: nobody is slower")


def own_pace(name: str, parts: Parts) -> Pace:
    """Build a pace from outside: ``module:Class``, which is given the parts; raises ConfigError."""
    kind = resolve_function(name, "protocol.pace", "class")
    try:
        pace = kind(parts)
    except Exception as error:  # a user's own code may raise anything
        raise ConfigError(f"protocol.pace {name!r}: raised {type(error).__name__}") from None
    if not isinstance(pace, Pace):
        raise ConfigError(f"protocol.pace {name!r} must have the methods of fedsplit.server.pace.Pace")
    return pace
