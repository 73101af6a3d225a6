"""Profiles, and the virtual clock by hand: who is heard, late, lost, spare or away, and what a run tells of it."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_settings
from hypothesis import given
from hypothesis import strategies as st
from own import conv1d_model, linear_model
from payloads import ints

from fedsplit import SplitModel
from fedsplit.common.errors import ConfigError, RunError
from fedsplit.plan.profiles import LogNormal, OnOff, ProfileSettings, presets
from fedsplit.plan.settings import check_settings
from fedsplit.release.policies import All, Bits, TopK
from fedsplit.release.policy import Policy
from fedsplit.server.checkpoint import _from_tensors, _to_tensors
from fedsplit.server.virtual import clock as clock_module
from fedsplit.server.virtual.calibration import record_seconds
from fedsplit.server.virtual.clock import Outcome, VirtualClock, Work
from fedsplit.server.virtual.profile import Profile
from fedsplit.server.virtual.trace import NEVER, SECOND

FATES = ("heard", "late", "lost", "spare")
ALL = np.arange(5)

# -- profiles ----------------------------------------------------------------------------------------------------------


def profile_of(**keys: Any) -> ProfileSettings:
    raw = {key.replace("_", "-"): value for key, value in keys.items()}
    chosen = small_settings(devices={"profile": raw}).devices.profile
    assert chosen is not None
    return chosen


@pytest.mark.parametrize("name", ["phones-4g", "wearables-ble", "hospital-lan"])
def test_a_preset_is_whole_and_a_given_key_wins(name: str) -> None:
    typical, chosen = presets()[name], profile_of(preset=name).filled()
    assert chosen.uplink == LogNormal(**typical["uplink"]) and chosen.availability == typical["availability"]
    assert {"compute", "uplink", "downlink", "latency", "availability", "dropout"} == set(typical)
    other = profile_of(preset=name, uplink=3.0, availability={"on": 60.0, "off": 30.0}).filled()
    assert other.uplink == 3.0 and other.availability == OnOff(on=60.0, off=30.0)
    assert other.downlink == chosen.downlink and other.dropout == chosen.dropout == typical["dropout"]
    whole = small_settings(devices={"profile": {"preset": name, "uplink": 3.0}})
    assert check_settings(whole.tables()) == whole == type(whole).from_json(whole.to_json())
    drawn = Profile.of(chosen, 7, 1).at(0)
    assert all(values.shape == (7,) and (values > 0).all() for values in drawn.values())


def test_devices_are_drawn_by_their_ids_around_the_median() -> None:
    spread = {"median": 5.0, "sigma": 0.5}
    many = Profile.of(profile_of(uplink=spread, downlink=spread, compute=2, latency=0.0), 4000, 1).at(0)
    logs = np.log(many["uplink"])
    assert np.median(logs) == pytest.approx(np.log(5), abs=4 * 1.2533 * 0.5 / 4000**0.5)  # standard error of a median
    assert logs.std() == pytest.approx(0.5, rel=4 / 8000**0.5)
    assert abs(np.corrcoef(logs, np.log(many["downlink"]))[0, 1]) < 4 / 4000**0.5
    assert (many["compute"] == 2).all() and (many["latency"] == 0).all()
    few = Profile.of(profile_of(uplink=spread, downlink=spread), 3, 1).at(0)
    assert np.array_equal(few["uplink"], many["uplink"][:3])
    assert not np.array_equal(few["uplink"], Profile.of(profile_of(uplink=spread, downlink=1), 3, 2).at(0)["uplink"])


def test_a_speed_of_a_link_comes_from_somewhere(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        Profile.of(profile_of(downlink=1.0), 2, 1)
    assert str(refused.value) == "devices.profile.uplink: missing: give it, a preset or a trace that has it"
    path = tmp_path / "links.csv"
    path.write_text("device,seconds,uplink\n0,0,3\n1,0,4\n1,5,6\n")
    profile = Profile.of(profile_of(downlink=1.0, compute=0.5, trace=str(path)), 2, 1)
    assert profile.at(0)["uplink"].tolist() == [3, 4] and profile.at(5 * SECOND)["uplink"].tolist() == [3, 6]
    assert profile.at(5 * SECOND)["compute"].tolist() == [0.5, 0.5]
    assert profile.presence.there(0, 1, 0).all()  # the trace does not say who is there: all, by chance of 1


LINKS = {"uplink": 1.0, "downlink": 1.0}
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        *[({name: value}, f"{name}: should be ") for name in ("compute", "uplink") for value in (-1.0, 0.0, NAN, INF)],
        *[({"latency": value}, "latency: should be ") for value in (-1.0, NAN, INF)],
        *[({"release-seconds": value}, "release-seconds: should be ") for value in (-1.0, NAN, INF)],
        *[({"availability": value}, "availability: should be ") for value in (0.0, 1.5, -1.0, NAN)],
        *[({"dropout": value}, "dropout: should be ") for value in (1.0, -0.1, NAN)],
        ({"uplink": {"median": 0.0, "sigma": 1.0}}, "uplink: should be "),
        ({"uplink": {"median": 1.0, "sigma": -1.0}}, "uplink: should be "),
        ({"uplink": {"median": 1.0}}, "uplink: should be "),
        ({"availability": {"on": 1.0, "off": 0.0}}, "availability: should be "),
        ({"availability": {"on": 1e300, "off": 1.0}}, "availability: should be "),
        ({"trace-period": 5.0}, "trace-period is for a trace"),
        ({"trace-period": 1e14, "trace": "x"}, "trace-period: should be less than or equal to 1000000000"),
        ({"preset": "phones"}, "preset: should be 'phones-4g', 'wearables-ble' or 'hospital-lan', got 'phones'"),
        ({"upload": 1.0}, "nearest valid key is 'devices.profile.uplink'"),
    ],
)
def test_a_bad_profile_is_refused_in_one_line(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        small_settings(devices={"profile": LINKS | keys})
    said = str(refused.value)
    assert said.startswith("devices.profile") and says in said and "\n" not in said, said
    if len(keys) == 1 and "should be" in says:
        assert f"got {next(iter(keys.values()))!r}" in said


@pytest.mark.parametrize("deadline", [0.0, NAN, 1e10])
def test_a_deadline_is_positive_and_ends(deadline: float) -> None:
    with pytest.raises(ConfigError, match=r"^protocol.deadline: should be .*, got "):
        small_settings(devices={"profile": LINKS}, protocol={"deadline": deadline})


# -- exchanges ---------------------------------------------------------------------------------------------------------


def work(devices: np.ndarray = ALL, counts: list[bool] | None = None) -> Work:
    """1000 bytes down, 500 up, a millisecond."""
    down, up = np.full(len(devices), 1000), np.full(len(devices), 500)
    return Work(devices, down, up, np.full(len(devices), 1e-3), None if counts is None else np.array(counts))


def who(outcome: Outcome, devices: np.ndarray = ALL) -> dict[str, list[int]]:
    return {name: devices[getattr(outcome, name)].tolist() for name in FATES}


def a_clock(limit: float = 1.0, count: int = 5, seed: int = 1, **keys: Any) -> VirtualClock:
    clock = VirtualClock(Profile.of(profile_of(**LINKS | keys), count, seed), limit, seed)
    clock.begin(1)
    return clock


TRACE = """device,seconds,compute,uplink,downlink,latency,available
0,0,   1,    1,   8,   0.01,  1
1,0,   0.1,  2,   4,   0.02,  1
2,0,   0.5,  0.4, 1,   0,     1
2,0.11,0.5,  0.4, 1,   0,     0
2,0.13,0.5,  0.4, 1,   0,     1
3,0,   3,    3,   3,   0.005, 1
4,0,   0.02, 0.1, 0.5, 0.1,   1
4,0.1, 1,    1,   8,   0.01,  1
"""
# In microseconds: latency + 8000 bits down / downlink + 1000 / compute + 4000 bits up / uplink
# 0:  10000 +  1000      +  1000     +  4000      =  16000
# 1:  20000 +  2000      + 10000     +  2000      =  34000
# 2:      0 +  8000      +  2000     + 10000      =  20000
# 3:   5000 +  2666.67   +   333.33  +  1333.33   =   9333.33
# 4: 100000 + 16000      + 50000     + 40000      = 206000; from 0.1 s on as 0


@pytest.fixture
def by_hand(tmp_path: Path) -> VirtualClock:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return a_clock(limit=0.1, trace=str(path))


def test_five_devices_by_hand(by_hand: VirtualClock) -> None:
    clock = by_hand
    # round 1: device 4 is late, for which the server waits until the limit, 0.1 s
    assert clock.there(ALL, 5).tolist() == [0, 1, 2, 3, 4] and clock.now == 0
    first = clock.exchange(work())
    assert first.finish.tolist() == [16000, 34000, 20000, 9333, 206000]
    assert who(first) == {"heard": [0, 1, 2, 3], "late": [4], "lost": [], "spare": []}
    assert first.duration == clock.now == 100_000
    assert clock.report()["late"] == [4] and clock.report()["heard"] == 4

    # round 2, from 100000 on: two are enough. Device 3 answers after 9333, then 0 and 4 at the same time, 16000, of
    # which 0 is first; 2 goes away at 110000, before it is through at 120000
    clock.begin(2)
    second = clock.exchange(work(), enough=2)
    assert second.finish.tolist() == [16000, 34000, 20000, 9333, 16000]
    assert who(second) == {"heard": [0, 3], "late": [], "lost": [2], "spare": [1, 4]}
    assert second.duration == 16_000 and clock.now == 116_000

    # round 3: with 2, who is back at 130000, all five are there. Only 0 and 1 count: it is over with 0 after 16000.
    # Of the others 3 (9333) and 4 (16000) have come by then, 2 (20000) has not
    clock.begin(3)
    assert clock.there(ALL, 5).tolist() == [0, 1, 2, 3, 4] and clock.now == 130_000
    third = clock.exchange(work(counts=[True, True, False, False, False]), enough=1)
    assert who(third) == {"heard": [0, 3, 4], "late": [], "lost": [], "spare": [1, 2]}
    assert third.duration == 16_000 and clock.now == 146_000

    # a second exchange, with 2 and 4 alone: it is over when both have answered, after 20000
    some = ints(2, 4)
    assert who(clock.exchange(work(some)), some) == {"heard": [2, 4], "late": [], "lost": [], "spare": []}
    assert clock.now == 166_000
    told = clock.report()
    assert told["simulated_seconds"] == 0.166 and told["heard"] == 4  # 0, 2, 3, 4: in one exchange at least
    assert {name: told[name] for name in ("late", "lost", "spare", "away")} == {
        "late": [],
        "lost": [],
        "spare": [1, 2],
        "away": [],
    }


def test_counts_of_five_devices_by_hand(by_hand: VirtualClock, tmp_path: Path) -> None:
    clock, released = by_hand, ints(10, 20, 30, 40, 50)
    for number, enough in ((1, None), (2, 2)):  # as above
        clock.begin(number)
        asked = work()
        clock.note_records(asked, clock.exchange(asked, enough), released, ints(0, 1, 2, 3, 4))
    assert clock.there(ALL, 4).tolist() == [0, 1, 3, 4]  # 2 is away
    assert clock.report()["away"] == [2]
    clock.save_table(tmp_path / "devices.csv")
    with (tmp_path / "devices.csv").open(newline="") as file:
        lines = {int(line["device"]): line for line in csv.DictReader(file)}
    expected = {  # away, asked, heard, late, lost, spare, released, wasted, answered, busy
        0: (0, 2, 2, 0, 0, 0, 20, 0, 0, 0.002),
        1: (0, 2, 1, 0, 0, 1, 40, 20, 2, 0.02),
        2: (1, 2, 1, 0, 1, 0, 60, 30, 4, 0.004),
        3: (0, 2, 2, 0, 0, 0, 80, 0, 6, 0.000666),  # twice 333
        4: (0, 2, 0, 1, 0, 1, 100, 100, 8, 0.051),  # 50 ms, then 1 ms
    }
    names = ("away", "asked", "heard", "late", "lost", "spare", "released", "wasted", "answered", "busy")
    for device, figures in expected.items():
        line = lines[device]
        assert tuple(float(line[name]) for name in names) == figures, device
        assert (line["bytes_down"], line["bytes_up"]) == ("2000", "1000")
    assert lines[4]["compute"] == "1.0" and lines[2]["uplink"] == "0.4"  # as at the end
    assert len(lines) == 5 and "available" not in lines[0]
    assert clock.summary() == {
        "seconds": 0.116,
        "bytes_up": {"mean": 1000.0, "most": 1000},
        "bytes_down": {"mean": 2000.0, "most": 2000},
        "heard": 6,
        "late": 1,
        "lost": 1,
        "spare": 2,
        "away": 1,
        "released": 300,
        "wasted": 150,
        # heard 2, 1, 1, 2, 0 times: 6^2 / (5 * 10)
        "participation": {"least": 0, "mean": 1.2, "most": 2, "jain": 0.72},
    }


def test_figures_are_of_those_who_took_part() -> None:
    clock = a_clock(count=40)
    assert clock.summary()["participation"] == {"least": 0, "mean": 0.0, "most": 0, "jain": None}
    clock.exchange(work(ints(3, 8)))
    clock.exchange(work(ints(8)))
    told = clock.summary()
    assert told["participation"] == {"least": 1, "mean": 1.5, "most": 2, "jain": 0.9}  # 3^2 / (2 * 5)
    assert told["bytes_up"] == {"mean": 750.0, "most": 1000}
    assert clock.report()["device_bytes_up"] == 750.0 and clock.report()["device_bytes_down"] == 1500.0


def test_a_server_waits_for_those_who_are_lost() -> None:
    clock = a_clock(limit=0.5, dropout=1 - 1e-12)
    assert who(clock.exchange(work()))["lost"] == [0, 1, 2, 3, 4] and clock.now == 500_000
    assert who(clock.exchange(work(), enough=1))["lost"] == [0, 1, 2, 3, 4] and clock.now == 1_000_000
    nobody = clock.exchange(work(ints()))
    assert nobody.duration == 0 and clock.now == 1_000_000


def test_losses_have_their_probability_and_are_drawn_anew() -> None:
    devices = np.arange(2000)
    clock = a_clock(count=2000, dropout=0.2)
    lost = [clock.exchange(work(devices)).lost for _ in range(2)]
    clock.begin(2)
    lost.append(clock.exchange(work(devices)).lost)
    for flags in lost:
        assert flags.mean() == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / 2000) ** 0.5)
    assert len({flags.tobytes() for flags in lost}) == 3
    few = a_clock(count=50, dropout=0.2).exchange(work(np.arange(1, 50, 2))).lost
    assert np.array_equal(few, lost[0][1:50:2])  # by id, whoever else is there


def test_devices_that_go_by_turns_are_lost_on_the_way() -> None:
    """Also those that are away already, when a round's second exchange begins."""
    clock = a_clock(limit=100.0, count=300, availability={"on": 20.0, "off": 20.0}, latency=5.0)
    there = clock.there(np.arange(300), 100)
    until = clock.profile.presence.gone_at(0)[there]
    first = clock.exchange(work(there))
    assert np.array_equal(first.lost, until < first.finish) and 0 < first.lost.sum() < len(there) / 2
    assert clock.now == 100_000_000  # since some were lost
    away = ~clock.profile.presence.there(clock.now, 1, 0)[there]
    assert away.any() and clock.exchange(work(there)).lost[away].all()


@given(data=st.data())
def test_each_device_has_one_fate(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    devices = np.array(sorted(data.draw(st.sets(st.integers(0, 9), min_size=count, max_size=count))))
    sizes = st.lists(st.integers(0, 4000), min_size=count, max_size=count).map(np.array)
    flags = st.none() | st.lists(st.booleans(), min_size=count, max_size=count).map(np.array)
    asked = Work(devices, data.draw(sizes), data.draw(sizes), np.zeros(count), data.draw(flags))
    enough, chance = data.draw(st.none() | st.integers(1, 9)), data.draw(st.sampled_from([0.0, 0.4]))
    clock = VirtualClock(Profile.of(ProfileSettings(uplink=8.0, downlink=8.0, dropout=chance), 10, 3), 0.004, 3)
    told = clock.exchange(asked, enough)
    assert sum(getattr(told, name).astype(int) for name in FATES).tolist() == [1] * count
    assert told.finish.tolist() == (asked.bytes_down + asked.bytes_up).tolist()  # 8 Mbit/s: a byte in a microsecond
    assert (told.finish[told.heard] <= told.duration).all() and clock.now == told.duration <= 4000
    assert (told.finish[told.late] > 4000).all() and (told.finish[told.spare] >= told.duration).all()
    counts = np.ones(count, bool) if asked.counts is None else asked.counts
    if enough is None:
        assert not told.spare.any()
        assert told.duration == (4000 if (told.lost | told.late).any() else told.finish.max())
    else:
        assert (told.heard & counts).sum() <= enough
        assert (told.heard & counts).sum() == enough or not told.spare.any()


# -- waiting -----------------------------------------------------------------------------------------------------------


def test_by_chance_a_round_waits_for_minutes() -> None:
    clock = a_clock(availability=0.3)
    draws = clock.profile.presence
    looks = [draws.there(0, 1, attempt).sum() for attempt in range(100)]
    tries = next(i for i, found in enumerate(looks) if found >= 4)
    assert tries > 0  # or there is nothing to wait for
    there = clock.there(ALL, 4)
    assert clock.now == tries * 60_000_000 and len(there) >= 4
    away = sorted(set(range(5)) - set(there.tolist()))
    assert clock.report()["away"] == away and np.flatnonzero(clock.counts.away).tolist() == away  # once, not per look
    assert clock.there(ints(1, 3), 0).tolist() == sorted({1, 3} & set(np.flatnonzero(draws.there(0, 1, 0))))


def test_by_turns_a_round_waits_for_the_next_turn() -> None:
    clock, same = (a_clock(availability={"on": 60.0, "off": 90.0}) for _ in range(2))
    there, presence, now = clock.there(ALL, 4), same.profile.presence, 0
    while presence.there(now, 1, 0).sum() < 4:
        now = presence.next_change(now, ALL)
    assert clock.now == now > 0 and there.tolist() == np.flatnonzero(presence.there(now, 1, 0)).tolist()


def test_a_round_that_can_never_begin_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("device,seconds,available\n0,0,1\n1,0,0\n1,7,1\n0,9,0\n")
    clock = a_clock(count=2, trace=str(path))
    assert clock.there(ints(0, 1), 2).tolist() == [0, 1] and clock.now == 7 * SECOND
    clock.now = 9 * SECOND
    with pytest.raises(RunError, match=r"^round 1 cannot begin: after 9 simulated seconds there are still not 2 dev"):
        clock.there(ints(0, 1), 2)
    monkeypatch.setattr(clock_module, "_ATTEMPTS", 50)
    for keys in ({"availability": 0.5}, {"trace": str(path), "trace_period": 10.0}):
        with pytest.raises(RunError, match="there are still not 3 devices at once"):
            a_clock(count=2, **keys).there(ints(0, 1), 3)


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_a_clock_goes_on_as_it_was() -> None:
    keys = {"availability": {"on": 5.0, "off": 5.0}, "dropout": 0.2, "uplink": {"median": 1.0, "sigma": 1.0}}

    def rounds(clock: VirtualClock, numbers: range) -> list[Any]:
        told = []
        for number in numbers:
            clock.begin(number)
            asked = work(clock.there(ALL, 3))
            outcome = clock.exchange(asked, enough=2)
            clock.note_records(asked, outcome, asked.bytes_up, asked.bytes_up)
            told.append((clock.report(), who(outcome, asked.devices)))
        return told

    whole, half, resumed = (a_clock(**keys) for _ in range(3))
    rounds(whole, range(1, 6)), rounds(half, range(1, 6))
    resumed.load_state(_from_tensors(_to_tensors(half.state())))
    assert rounds(resumed, range(6, 11)) == rounds(whole, range(6, 11))
    assert resumed.summary() == whole.summary() and resumed.now > half.now


def test_a_device_that_hardly_moves_is_late_not_in_the_past() -> None:
    clock = a_clock(limit=2.0, uplink=1e-300)
    told = clock.exchange(work())
    assert who(told)["late"] == [0, 1, 2, 3, 4] and (told.finish == NEVER // 2).all() and clock.now == 2 * SECOND


@pytest.mark.parametrize("policy", [All(), TopK(4), Bits(2)])
@pytest.mark.parametrize("model", [linear_model, conv1d_model])
def test_seconds_of_a_record_are_measured_on_one_core(policy: Policy, model: Callable[[], SplitModel]) -> None:
    layer, used = model().first_layer, set()
    gradient = layer.gradient
    layer.gradient = lambda *both: (used.add(torch.get_num_threads()), gradient(*both))[1]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = record_seconds(layer, policy, "float16")
        assert torch.get_num_threads() == 2 and used == {1}
    finally:
        torch.set_num_threads(before)
    assert len(found) == 2 and all(0 < seconds < np.inf for seconds in found)
