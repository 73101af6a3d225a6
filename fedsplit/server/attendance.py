"""Waits for nodes: all of them at the start, those that come back before the end."""

import logging
import time
from collections.abc import Callable

from flwr.serverapp import Grid

from fedsplit.common.errors import RunError
from fedsplit.flower.grid import Pauses
from fedsplit.server.parts import Parts

log = logging.getLogger(__name__)
_PATIENCE = 5.0  # seconds after which it is said who is waited for
_COMING_BACK = 10.0  # seconds that a node may take to say that it is there again


class Attendance:
    """Has the roster look who is there until the run can go on."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._started = False

    def wait(self, grid: Grid, note: Callable[[], None]) -> None:
        """List the nodes anew; before the first round wait for all devices, later as long as there is no node at all.

        ``note`` is called whenever another number of devices is there, or of nodes refused.

        Raises
        ------
        RunError
            If there are more nodes than devices, or no device has come within the timeout.
        """
        timeout, expected, roster = self._parts.options.timeout, self._parts.options.devices, self._parts.roster
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

    def gather(self, grid: Grid) -> None:
        """Look for nodes before the evaluation at the end, and wait a little for those that are coming back."""
        began, pauses = time.monotonic(), Pauses(0.02, 0.5)
        self._look(grid)
        longest = min(self._parts.options.timeout, _COMING_BACK)
        while self._parts.roster.waiting and time.monotonic() - began < longest:
            time.sleep(pauses.next())
            self._look(grid)

    def _look(self, grid: Grid) -> None:
        asked, heard = self._parts.roster.look(grid, self._parts.options.timeout)
        self._parts.progress.totals.exchanges += asked
        self._parts.progress.totals.bytes_up += heard
