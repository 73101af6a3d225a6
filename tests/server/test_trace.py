"""Traces and presence: what holds when, who is there and until when; a bad file is refused in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.common.errors import ConfigError, DataError, FedsplitError
from fedsplit.server.virtual.presence import AGAIN, ByChance, ByTrace, ByTurns, Presence
from fedsplit.server.virtual.trace import NEVER, SECOND, Trace

HEAD = "device,seconds,available\n"
GOOD = HEAD + "0,0,1\n1,0,0\n"


def read(folder: Path, text: str | bytes, count: int = 2, period: float | None = None) -> Trace:
    (folder / "trace.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return Trace.read(folder / "trace.csv", count, period)


def table(rows: list[tuple[int, int, int]], period: int | None) -> Trace:
    """A trace of (device, microseconds, available)."""
    columns = np.array(sorted(rows), dtype=np.int64).T
    return Trace(columns[0], columns[1], {"available": columns[2].astype(float)}, period)


# -- a trace by hand ---------------------------------------------------------------------------------------------------

BY_HAND = """seconds , uplink,device,available

5.5,4,1,1
0,1,0,1
2,2,0,0
0,3,1,0
4,1.5,0,1
"""


def test_a_row_holds_until_the_devices_next_one(tmp_path: Path) -> None:
    """In whatever order rows and columns come, with spaces, blank lines and a spreadsheet's mark."""
    rows = BY_HAND.splitlines(keepends=True)
    for text in (BY_HAND, "".join([rows[0], *rows[:1:-1]]), "\ufeff" + BY_HAND, BY_HAND.replace("\n", "\r\n")):
        trace = read(tmp_path, text)
        for seconds, uplink, available in [
            (0, [1, 3], [1, 0]),
            (1.999999, [1, 3], [1, 0]),
            (2, [2, 3], [0, 0]),
            (4, [1.5, 3], [1, 0]),
            (5.5, [1.5, 4], [1, 1]),
            (1e6, [1.5, 4], [1, 1]),
        ]:
            found = trace.at(round(seconds * SECOND))
            assert set(found) == {"uplink", "available"}
            assert found["uplink"].tolist() == uplink and found["available"].tolist() == available, seconds
        assert [trace.next_change(round(s * SECOND)) for s in (0, 2, 5.4)] == [2000000, 4000000, 5500000]
        assert trace.next_change(5500000) == NEVER
        assert trace.gone_at(0).tolist() == [2000000, 0]
        assert trace.gone_at(3000000).tolist() == [3000000, 3000000]  # both are away
        assert trace.gone_at(6000000).tolist() == [NEVER, NEVER]
        assert [trace.most_at_once(np.array(d)) for d in ([0], [1], [0, 1])] == [1, 1, 2]


def test_a_trace_begins_again(tmp_path: Path) -> None:
    trace = read(tmp_path, BY_HAND, period=6)
    assert trace.at(8 * SECOND)["uplink"].tolist() == [2, 3]  # as at 2
    assert trace.next_change(5500000) == 6 * SECOND and trace.next_change(6 * SECOND) == 8 * SECOND
    # at 5.5 device 0 is away next at 6 + 2, device 1 as soon as the trace begins again
    assert trace.gone_at(5500000).tolist() == [8 * SECOND, 6 * SECOND]
    assert trace.gone_at(13 * SECOND).tolist() == [14 * SECOND, 13 * SECOND]


def test_without_a_column_available_all_are_there(tmp_path: Path) -> None:
    trace = read(tmp_path, "device,seconds,compute\n0,0,1\n1,0,2\n")
    assert not trace.says_who_is_there and read(tmp_path, GOOD).says_who_is_there
    assert trace.most_at_once(np.array([0, 1])) == 2


# -- any trace, second by second ---------------------------------------------------------------------------------------


@st.composite
def traces(draw: st.DrawFn) -> tuple[list[dict[int, int]], int | None]:
    """By device: whether it is there, by the microsecond from which on; and a period."""
    times = st.dictionaries(st.integers(1, 14), st.integers(0, 1), max_size=5)
    devices = draw(st.lists(st.builds(lambda first, more: {0: first, **more}, st.integers(0, 1), times), min_size=1))
    return devices, draw(st.none() | st.integers(15, 20))


@given(drawn=traces(), now=st.integers(0, 60))
def test_any_trace_is_as_one_that_is_walked_step_by_step(drawn: Any, now: int) -> None:
    devices, period = drawn
    trace = table([(d, s, a) for d, rows in enumerate(devices) for s, a in rows.items()], period)

    def there(device: int, time: int) -> int:
        within = time if period is None else time % period
        return devices[device][max(s for s in devices[device] if s <= within)]

    def begins(time: int) -> bool:
        return any((time if period is None else time % period) in rows for rows in devices)

    ahead = range(now, now + 45)  # two periods and more
    away = [next((t for t in ahead if not there(d, t)), NEVER) for d in range(len(devices))]
    assert trace.at(now)["available"].tolist() == [there(d, now) for d in range(len(devices))]
    assert trace.gone_at(now).tolist() == away
    assert trace.next_change(now) == next((t for t in ahead if t > now and begins(t)), NEVER)
    some = list(range(0, len(devices), 2))
    assert trace.most_at_once(np.array(some)) == max(sum(there(d, t) for d in some) for t in range(20))
    presence = ByTrace(trace)
    assert presence.there(now, 1, 0).tolist() == [there(d, now) == 1 for d in range(len(devices))]
    assert presence.gone_at(now).tolist() == away


# -- bad files ---------------------------------------------------------------------------------------------------------

COLUMNS = "device, seconds, compute, uplink, downlink, latency, available"
BAD = {
    "empty": ("", "line 1: column 'device' is missing"),
    "only a head": (HEAD, "device 0 has no row; it must have one for each of 0..1"),
    "not UTF-8": (b"device,seconds\xff", "is not a CSV file"),
    "too long a cell": (GOOD + "0," + 200_000 * "1" + ",1\n", "is not a CSV file"),
    "unknown column": (GOOD.replace("available", "upload"), f"line 1: unknown column 'upload'; allowed: {COLUMNS}"),
    "semicolons": (GOOD.replace(",", ";"), f"unknown column 'device;seconds;available'; allowed: {COLUMNS}"),
    "missing column": ("device,uplink\n0,1\n", "line 1: column 'seconds' is missing"),
    "column twice": ("device,seconds,uplink,uplink\n", "line 1: needs each of device, seconds and some of compute"),
    "no quantity": ("device,seconds\n0,0\n1,0\n", "line 1: needs each of device, seconds and some of compute"),
    "short row": (GOOD + "0,3\n", "line 4: has 2 columns, line 1 has 3"),
    "long row": (GOOD + "\n0,3,1,\n", "line 5: has 4 columns, line 1 has 3"),
    "empty cell": (GOOD + "0,,1\n", "line 4: seconds must be at least 0, got ''"),
    "seconds NaN": (GOOD + "0,nan,1\n", "line 4: seconds must be at least 0, got 'nan'"),
    "seconds negative": (GOOD + "0,-1,1\n", "line 4: seconds must be at least 0, got '-1'"),
    "seconds without end": (GOOD + "0,1e300,1\n", "line 4: seconds must be at least 0, got '1e300'"),
    "available": (GOOD + "0,3,0.5\n", "line 4: available must be 0 or 1, got '0.5'"),
    "device no integer": (GOOD + "0.5,0,1\n", "line 4: device must be a device's id, got '0.5'"),
    "device negative": (GOOD + "-1,0,1\n", "line 4: device must be a device's id, got '-1'"),
    "device large": (GOOD + "1e300,0,1\n", "line 4: device must be a device's id, got '1e300'"),
    "device unknown": (HEAD + "2,0,1\n" + GOOD[len(HEAD) :], "line 2: device 2 does not exist: ids are 0..1"),
    "device without a row": (HEAD + "1,0,1\n", "device 0 has no row; it must have one for each of 0..1"),
    "begins late": (HEAD + "0,0,1\n1,3,1\n1,9,1\n", "line 3: device 1 begins at 3 seconds"),
    "two at once": (GOOD + "1,2,0\n0,2,1\n1,2,0\n", "line 6: device 1 has two rows at 2 seconds"),
    "beyond the period": (GOOD + "1,7.5,0\n", "line 4: seconds must be below trace-period 7.5"),
}
for name in ("compute", "uplink", "downlink"):
    for cell in ("0", "-1", "nan", "inf", "fast"):
        head = f"device,seconds,{name}\n0,0,1\n1,0,"
        BAD[f"{name} {cell}"] = (f"{head}{cell}\n", f"line 3: {name} must be above 0, got '{cell}'")
BAD["latency"] = ("device,seconds,latency\n0,0,0\n1,0,-0.1\n", "line 3: latency must be at least 0, got '-0.1'")


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    text, says = BAD[case]
    with pytest.raises(DataError) as refused:
        read(tmp_path, text, period=7.5)
    said = str(refused.value)
    assert said.startswith(f"trace {tmp_path / 'trace.csv'}") and says in said and "\n" not in said, said


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none.csv", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as refused:
            Trace.read(path, 2, None)
        assert str(refused.value) == f"devices.profile.trace {path}: {why}"


def test_seconds_end_before_the_period(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD + "0,7,1\n", period=7.5).period == 7_500_000
    with pytest.raises(FedsplitError, match=r"must be below trace-period 7$"):
        read(tmp_path, GOOD + "0,7,1\n", period=7.0)


# -- who is there ------------------------------------------------------------------------------------------------------


def fates(presence: Presence, times: list[int]) -> list[tuple[list[bool], list[int]]]:
    return [(presence.there(t, 1, 0).tolist(), presence.gone_at(t).tolist()) for t in times]


@given(seed=st.integers(0, 2**63 - 1), end=st.integers(1, 100 * SECOND), steps=st.integers(1, 40))
def test_turns_do_not_depend_on_when_they_are_asked_for(seed: int, end: int, steps: int) -> None:
    small, large = ByTurns(8.0, 3.0, 4, seed), ByTurns(8.0, 3.0, 4, seed)
    for step in range(steps):
        small.there(end * step // steps, 1, 0)
    assert fates(small, [end]) == fates(large, [end])
    assert small.next_change(end, np.arange(4)) == large.next_change(end, np.arange(4)) > end


def test_a_devices_turns_do_not_depend_on_how_many_devices_there_are() -> None:
    times = list(range(0, 500 * SECOND, 7 * SECOND))
    few, many = fates(ByTurns(8.0, 3.0, 3, 5), times), fates(ByTurns(8.0, 3.0, 40, 5), times)
    assert few == [(there[:3], until[:3]) for there, until in many]
    assert few != fates(ByTurns(8.0, 3.0, 3, 6), times)
    assert len({tuple(there) for there, _ in few}) > 2  # they do not go and come together


def test_turns_have_their_means() -> None:
    """4 standard errors, which for exponential times are the mean over the root of their number."""
    presence, on, off = ByTurns(6.0, 2.0, 3000, 1), [], []
    for now in (0, 500 * SECOND):  # at the beginning as long afterwards: there is nothing to settle
        there = presence.there(now, 1, 0)
        assert there.mean() == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 3000) ** 0.5)
        left = presence.gone_at(now)[there] - now  # an exponential time has no memory
        assert left.mean() == pytest.approx(6 * SECOND, rel=4 / len(left) ** 0.5)
    single = ByTurns(6.0, 2.0, 1, 1)
    now = single.next_change(0, np.arange(1))
    for _ in range(3000):
        there, then = single.there(now, 1, 0)[0], single.next_change(now, np.arange(1))
        (on if there else off).append(then - now)
        assert single.gone_at(now)[0] == (then if there else now)
        now = then
    assert len(on) == len(off) == 1500
    assert np.mean(on) == pytest.approx(6 * SECOND, rel=4 / 1500**0.5)
    assert np.mean(off) == pytest.approx(2 * SECOND, rel=4 / 1500**0.5)


def test_chance_is_drawn_for_each_round_and_for_each_look() -> None:
    presence = ByChance(0.3, 4000, 1)
    looks = [presence.there(0, number, attempt) for number, attempt in ((1, 0), (2, 0), (1, 1))]
    for look in looks:
        assert look.mean() == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 4000) ** 0.5)
    assert len({look.tobytes() for look in looks}) == 3
    assert np.array_equal(presence.there(99, 1, 0), looks[0])  # for the round, not for the time
    assert np.array_equal(ByChance(0.3, 10, 1).there(0, 1, 0), looks[0][:10])
    assert not np.array_equal(ByChance(0.3, 4000, 2).there(0, 1, 0), looks[0])
    assert presence.next_change(7, np.arange(5)) == 7 + AGAIN == 7 + 60_000_000
    assert (presence.gone_at(5) == NEVER).all()
    assert ByChance(1.0, 5, 1).there(0, 1, 0).all()


def test_what_can_never_begin_is_hopeless() -> None:
    devices = np.arange(10)
    all_ten = 0.5**10  # 1e-3: it is worth waiting; of 20 it is 1e-6
    for presence in (ByChance(0.5, 40, 1), ByTurns(300.0, 300.0, 40, 1)):
        assert presence.hopeless(devices, 10) is None and all_ten > 1e-4
        said = presence.hopeless(np.arange(20), 20)
        assert said is not None and "so many are there with a probability of 1e-06" in said
        assert presence.hopeless(devices, 11) is not None  # more than there are
        assert presence.hopeless(devices, 0) is None and presence.hopeless(np.arange(0), 0) is None
    assert ByChance(0.0101, 40, 1).hopeless(np.arange(2), 2) is None  # 1.02e-4
    assert ByChance(0.0099, 40, 1).hopeless(np.arange(2), 2) is not None  # 0.98e-4
    assert ByChance(0.0099, 40, 1).hopeless(np.arange(3), 2) is None  # thrice that
    assert ByChance(1.0, 40, 1).hopeless(devices, 10) is None
    assert "availability 0.5" in str(ByChance(0.5, 40, 1).hopeless(devices, 11))
    assert "on 3, off 300" in str(ByTurns(3.0, 300.0, 40, 1).hopeless(devices, 9))


def test_a_trace_is_hopeless_beyond_the_most_at_once() -> None:
    presence = ByTrace(table([(0, 0, 1), (0, 5, 0), (1, 0, 0), (1, 5, 1), (2, 0, 0), (2, 6, 1)], None))
    assert presence.hopeless(np.arange(3), 2) is None  # 1 and 2
    assert presence.hopeless(np.arange(3), 3) == "the trace has at most 2 there at once"
    assert presence.hopeless(np.array([0, 1]), 2) == "the trace has at most 1 there at once"
