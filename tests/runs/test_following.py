"""How a run is seen from its folder: while it goes on, when it has ended well or badly, and when it was killed."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from fedsplit.common.errors import ConfigError, RunError
from fedsplit.runs import following
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.following import ago, follow, forget_state, working

SECRET = 7654.25  # a record's value: no text for another process may hold it
log = logging.getLogger("fedsplit.test_following")


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    """Leave the level of fedsplit's logger as it was."""
    level = logging.getLogger("fedsplit").level
    yield
    logging.getLogger("fedsplit").setLevel(level)


class Watched:
    """What :func:`follow` said of a run; it looks often, and a minute passes between two looks where ``why`` is given.

    ``why`` is what is known elsewhere of a run that has not begun.
    """

    def __init__(self, why: str | None = None, *, minutes: bool = False) -> None:
        self.rounds: list[int] = []
        self.said: list[str] = []
        self.asked = 0
        self._why = why
        self._clock = count(step=60.0).__next__ if minutes or why else time.monotonic

    def __call__(self, folder: Path, run: str = "") -> dict[str, Any]:
        return follow(
            folder,
            lambda m: self.rounds.append(m["round"]),
            self.said.append,
            self._ended,
            run,
            clock=self._clock,
            sleep=lambda seconds: time.sleep(seconds / 20),
        )

    def _ended(self) -> str | None:
        self.asked += 1
        return self._why


def finish_round(folder: Path, number: int) -> None:
    with RunFolder(folder).metrics.open("a") as file:
        file.write(json.dumps({"round": number}) + "\n")


def finish(folder: Path) -> None:
    RunFolder(folder).result.write_text(json.dumps({"rounds": 2}))


def until(true: Callable[[], bool]) -> None:
    """Wait for something that another thread or process does."""
    waited = threading.Event()
    for _ in range(3000):
        if true():
            return
        waited.wait(0.01)
    raise AssertionError("it has not come")


def test_a_finished_run_is_told_with_its_rounds_and_result(out: Path) -> None:
    with working(out):
        for number in (1, 2):
            finish_round(out, number)
        finish(out)
    watched = Watched()
    assert watched(out) == {"rounds": 2}
    assert watched.rounds == [1, 2] and watched.said == [] and watched.asked == 0


def test_a_run_is_followed_while_it_goes_on(out: Path) -> None:
    """Each round once, as it comes; a line that is being written is left for the next look."""
    watched, results = Watched(), []
    thread = threading.Thread(target=lambda: results.append(watched(out)), daemon=True)
    with working(out):
        thread.start()
        finish_round(out, 1)
        until(lambda: watched.rounds == [1])
        with RunFolder(out).metrics.open("a") as file:
            file.write('{"round": 2')
            file.flush()
            threading.Event().wait(0.1)  # some looks
            assert watched.rounds == [1] and thread.is_alive()
            file.write("}\n")
        until(lambda: watched.rounds == [1, 2])
        finish(out)
        assert thread.is_alive()  # the result is not the end
    thread.join()
    assert results == [{"rounds": 2}] and watched.rounds == [1, 2]


def test_the_last_line_of_a_killed_process_is_not_a_round(out: Path) -> None:
    killed(out, "with open(RunFolder(folder).metrics, 'a') as file: file.write('{\"round\": 1}\\n{\"rou')")
    watched = Watched()
    with pytest.raises(RunError, match=f"was killed; 1 rounds are done: go on with --out {out} --resume"):
        watched(out)
    assert watched.rounds == [1]


def test_an_error_of_fedsplits_is_told(out: Path) -> None:
    with pytest.raises(RunError), working(out):
        finish_round(out, 1)
        raise RunError("only 1 of 3 nodes answered")
    with pytest.raises(RunError, match=f"^only 1 of 3 nodes answered; 1 rounds are done: go on with --out {out}"):
        Watched()(out)


@pytest.mark.parametrize("error", [ValueError(f"x was {SECRET}"), KeyboardInterrupt(f"{SECRET}"), SystemExit(SECRET)])
def test_the_text_of_another_error_is_not_told(error: BaseException, out: Path) -> None:
    with pytest.raises(type(error)), working(out):
        raise error
    with pytest.raises(RunError) as told:
        Watched()(out)
    expected = f"{type(error).__name__}; see the server's log"
    if isinstance(error, SystemExit | KeyboardInterrupt):  # how Flower ends a process
        expected = "the SuperLink is gone, or has stopped the run"
    assert str(told.value) == expected
    assert not any(str(SECRET) in path.read_text() for path in out.iterdir())


def killed(folder: Path, first: str = "") -> None:
    """Have another process work on a run, and kill it without a word."""
    with working_elsewhere(folder, first):
        pass


@contextmanager
def working_elsewhere(folder: Path, first: str = "") -> Iterator[None]:
    """Have another process work on a run, which is killed at the end."""
    code = f"""
import sys, time
from pathlib import Path
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.following import working
folder = Path(sys.argv[1])
with working(folder):
    {first or "pass"}
    print("working", flush=True)
    time.sleep(300)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "working\n"
        yield
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_a_killed_process_is_told(out: Path) -> None:
    watched, errors = Watched(), []

    def follows() -> None:
        try:
            watched(out)
        except RunError as error:
            errors.append(str(error))

    thread = threading.Thread(target=follows, daemon=True)
    with working_elsewhere(out):
        thread.start()
        with pytest.raises(ConfigError, match=f"another process works in {out}"):
            forget_state(out)
        with pytest.raises(ConfigError, match=f"another process works in {out}"), working(out):
            raise AssertionError("two at once")
        assert thread.is_alive() and errors == []
    thread.join()
    assert errors == ["the process that trained was killed"]
    with working(out):  # its lock has gone with it
        finish(out)
    assert Watched()(out) == {"rounds": 2}


def test_one_that_is_refused_leaves_the_others_state_alone(out: Path) -> None:
    before = list(logging.getLogger("fedsplit").handlers)
    with working(out):
        with pytest.raises(ConfigError), working(out):
            pass
        assert following._is_working(following._state(out))
        finish(out)
    assert Watched()(out) == {"rounds": 2}
    assert logging.getLogger("fedsplit").handlers == before


def test_two_runs_do_not_mix_in_one_folder(out: Path) -> None:
    """Both were submitted before either began: the one that is late is told so."""
    with working(out, "7"):
        finish_round(out, 1)
        watched = Watched()
        with pytest.raises(RunError, match=f"^run 7 has {out}, and run 8 must not write there$"):
            watched(out, "8")
        assert watched.rounds == []
        finish(out)
    assert Watched()(out, "7") == {"rounds": 2}


def test_only_warnings_of_this_run_are_said(out: Path) -> None:
    with working(out):
        log.warning("of the run before")
    forget_state(out)
    watched, results = Watched(), []
    thread = threading.Thread(target=lambda: results.append(watched(out)), daemon=True)
    with working(out):
        finish_round(out, 1)
        thread.start()
        until(lambda: watched.rounds == [1])
        log.info("nothing of note")
        log.warning("node 7 is left out")
        until(lambda: bool(watched.said))
        log.warning("node 8 is left out")
        finish(out)
    thread.join()
    assert [line.partition(" WARNING ")[2] for line in watched.said] == ["node 7 is left out", "node 8 is left out"]
    log.warning("afterwards")
    lines = RunFolder(out).log.read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "WARNING of the run before",
        "INFO nothing of note",
        "WARNING node 7 is left out",
        "WARNING node 8 is left out",
    ]


def test_who_has_not_begun_is_asked_for_elsewhere(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched("run 3 is finished:failed")
    with pytest.raises(RunError, match=r"^run 3 is finished:failed$"):
        watched(out)
    waiting = Watched(None, minutes=True)

    def begins_at_the_third_look() -> None:
        waiting.asked += 1
        if waiting.asked == 3:
            with working(out):
                finish(out)

    monkeypatch.setattr(waiting, "_ended", begins_at_the_third_look)
    assert waiting(out) == {"rounds": 2} and waiting.asked == 3


def test_an_earlier_end_is_forgotten(out: Path) -> None:
    forget_state(out)  # nobody has been there
    with pytest.raises(RunError), working(out):
        raise RunError("of the run before")
    forget_state(out)
    assert not RunFolder(out).state.exists()
    with pytest.raises(RunError, match=r"^not yet$"):
        Watched("not yet")(out)
    killed(out)
    forget_state(out)
    assert not RunFolder(out).state.exists()


def test_a_run_that_goes_on_replaces_the_word_of_its_end(out: Path) -> None:
    with pytest.raises(RunError), working(out):
        raise RunError("a long text, longer than the next one: " + 100 * "x")
    with working(out):
        finish(out)
    assert json.loads(RunFolder(out).state.read_text())["state"] == "finished"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"out folder .* cannot be written: "), working(tmp_path / "file" / "run"):
        pass
    RunFolder(tmp_path / "run").state.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"out folder .* cannot be written: "), working(tmp_path / "run"):
        pass


def test_a_process_that_begins_is_not_taken_for_killed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may look between any two steps."""
    seen = []
    handler = logging.FileHandler
    monkeypatch.setattr(logging, "FileHandler", lambda path: seen.append(following._state(out)) or handler(path))
    with working(out):
        pass
    assert seen == [None]


def test_half_a_letter_is_not_a_line(out: Path) -> None:
    with working(out):
        finish(out)
        RunFolder(out).log.write_bytes("2026 WARNING é".encode()[:-1])
    assert Watched()(out) == {"rounds": 2}


def test_nodes_are_read_or_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no nodes\.json: it is written as nodes come"):
        RunFolder(tmp_path).node_rows()
    for damage in ("", "[{", "3x"):
        RunFolder(tmp_path).nodes.write_text(damage)
        with pytest.raises(ConfigError, match=r"nodes\.json is damaged"):
            RunFolder(tmp_path).node_rows()
    RunFolder(tmp_path).nodes.write_text('[{"node": "1"}]')
    assert RunFolder(tmp_path).node_rows() == [{"node": "1"}]


def test_a_time_is_written_for_people() -> None:
    assert ago(0.0) == "-" and len(ago(1_800_000_000.0).split(":")) == 3
