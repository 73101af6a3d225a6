"""How a run that another process works on is seen from outside: by its run folder.

The process that trains holds ``state.json`` locked and writes into it how the run ended; when the lock is free and
nothing is written there, it was killed.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from fedsplit.common.errors import ConfigError, FedsplitError, RunError
from fedsplit.common.files import locked, shared
from fedsplit.runs.folder import RunFolder, lines

_ROOM = 8192  # bytes of the state file
_WORKING = "working"
_LOOK = 0.2  # seconds between two looks at a run folder
_SILENCE = 20.0  # seconds after which it is asked elsewhere how a run is that has not begun


@contextmanager
def working(folder: Path, run: str = "") -> Iterator[None]:
    """Hold a run folder while a run is worked on, with a log of what happens, and leave word of how it ended.

    Parameters
    ----------
    folder : Path
    run : str
        What Flower calls the run, for those who follow it.

    Raises
    ------
    ConfigError
        If the folder cannot be written, or another process works there.
    """
    run_folder = RunFolder(folder)
    run_folder.make()
    with run_folder.writing():
        file = os.fdopen(os.open(run_folder.state, os.O_RDWR | os.O_CREAT, 0o644), "r+")
        handler = logging.FileHandler(run_folder.log)
    with file:
        if not locked(file):
            raise ConfigError(f"another process works in {folder}")

        def say(state: str, error: str = "") -> None:
            file.seek(0)
            file.write(json.dumps({"state": state, "run": run, "error": error[:1000]}).ljust(_ROOM))
            file.flush()

        say(_WORKING)  # which takes the room: the end can be written even when the disk is full
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("fedsplit")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        except FedsplitError as error:
            say("failed", str(error))
            raise
        except (SystemExit, KeyboardInterrupt):  # how Flower ends a process
            say("failed", "the SuperLink is gone, or has stopped the run")
            raise
        except BaseException as error:
            say("failed", f"{type(error).__name__}; see the server's log")
            raise
        finally:
            logger.removeHandler(handler)
            handler.close()
        say("finished")


def forget_state(folder: Path) -> None:
    """Remove the word of an earlier end; raises ConfigError if a process works there."""
    check_idle(folder)
    RunFolder(folder).state.unlink(missing_ok=True)


def check_idle(folder: Path) -> None:
    """Raise ConfigError if a process works in a run folder."""
    if _is_working(_state(folder)):
        raise ConfigError(f"another process works in {folder}")


def _state(folder: Path) -> dict[str, str] | None:
    """Return how a run is, or how it ended; None if nobody has begun."""
    try:
        with RunFolder(folder).state.open() as file:
            locked = not shared(file)
            found = dict(json.loads(file.read()))
    except (OSError, ValueError):
        return None  # not there, or somebody is just about to lock it, or to write it
    if _is_working(found) and not locked:
        return {**found, "state": "failed", "error": "the process that trained was killed"}
    return found


def _is_working(state: dict[str, str] | None) -> bool:
    return state is not None and state.get("state") == _WORKING


def follow(
    folder: Path,
    report: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
    ended: Callable[[], str | None],
    run: str = "",
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Report the metrics of every round of a run until it ends, and return its result.

    Parameters
    ----------
    folder : Path
        The run folder.
    report : callable
        Called with each round's metrics.
    say : callable
        Called with each new line of the run's log that is a warning.
    ended : callable
        Asks elsewhere whether a run that has not begun ever will: returns why not, or None.
    run : str
        What Flower calls the run.
    clock, sleep : callables
        Return the time in seconds, and let some pass.

    Raises
    ------
    RunError
        With what the process that trained said, if it stopped before the end; or if another run has the folder.
    """
    place = RunFolder(folder)
    seen, said, began = 0, len(lines(place.log)), clock()
    while True:
        state = _state(folder)
        if state and state.get("run") != run:
            raise RunError(f"run {state.get('run')} has {folder}, and run {run} must not write there")
        rounds = place.rounds()
        for line in rounds[seen:]:
            report(json.loads(line))
        seen, logged = len(rounds), lines(place.log)
        for line in logged[said:]:
            if " WARNING " in line:
                say(line)
        said = len(logged)
        if state is None and clock() - began > _SILENCE:
            if (why := ended()) is not None and _state(folder) is None:
                raise RunError(why)
            began = clock()
        if state and state["state"] == "finished":
            return dict(json.loads(place.result.read_text(encoding="utf-8")))
        if state and not _is_working(state):
            done = json.loads(rounds[-1])["round"] if rounds else 0
            way = f"; {done} rounds are done: go on with --out {folder} --resume" if done else ""
            raise RunError(f"{state.get('error')}{way}")
        sleep(_LOOK)


def ago(seconds: float) -> str:
    """Write a time since 1970 for people, ``-`` for never."""
    return datetime.fromtimestamp(seconds).strftime("%H:%M:%S") if seconds else "-"
