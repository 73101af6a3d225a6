"""What rounds take over devices that are away, late and lost, and which profiles and traces are refused."""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import small_settings
from virtual_devices import FAST, KNOWN, SHAKY, metrics_of, settings_for

from fedsplit import simulate
from fedsplit.common.errors import FedsplitError

pytestmark = pytest.mark.slow  # whole runs


def write_trace(path: Path, columns: str, *rows: str) -> str:
    path.write_text("\n".join([columns, *rows]) + "\n")
    return str(path)


@pytest.fixture
def generous(tmp_path: Path) -> dict[str, str]:
    """Return the guard's settings with which no message tells of a refusal."""
    path = tmp_path / "limits.toml"
    path.write_text("releases = 100\nequations = 1.0\nleverage = 1.0\nactive = 1.0\ngradients = true\n")
    return {"limits": str(path)}


def test_rounds_take_what_was_worked_out_by_hand(generous: dict[str, str], tmp_path: Path) -> None:
    """Five devices, three rounds, no gradients: sizes, transfers, work, latency, a deadline.

    A first layer of 12 x 10 + 10 = 130 parameters; all 10 outputs of a record are sent as float32, since zeros of an
    identity are sent, too. A message has 6 bytes of head, arrays with 6 (one axis) or 10 (two) of their own:

    - down: 6 + (6 + 48) + (6 + 4 * 130) + (10 + 16) = 612 bytes
    - up, n records: 6 + nonce 14 + ledger 70 + lost 6 + failed 6 + refused 10 + width 14 + devices 10 + records 10
      + targets 6 + 4n + counts 6 + 2n + bitmap 10 + 2n + values 6 + 40n + exponents 6 + 2n
      + gradients 6 + 6 + 10 = 202 + 50n bytes

    Devices 0..4 train on 7, 10, 13, 16, 19 records. At 0.1 Mbit/s a byte takes 80 us, at 0.2 Mbit/s 40 us.
    """
    trace = write_trace(
        tmp_path / "trace.csv",
        "device,seconds,compute,uplink,downlink,latency,available",
        "0,0,1.0,0.1,0.2,0.05,1",
        "1,0,0.5,0.1,0.1,0.0,1",
        "2,0,2.0,0.2,0.2,0.01,1",
        "3,0,1.0,0.05,0.1,0.0,1",  # too slow for the deadline: 0.048960 + 0.016 + 1002 * 160 us = 0.225280
        "4,0,1.0,0.2,0.1,0.1,0",  # comes back at 0.2 s
        "4,0.2,1.0,0.2,0.1,0.1,1",
    )
    settings = small_settings(
        run={"rounds": 3},
        devices={"count": 5, "test": [4], "profile": {**KNOWN, "trace": trace}},
        model={"builder": "own:identity_model"},
        first_layer={"strategy": "frozen"},
        protocol={"deadline": 0.22},
        guard=generous,
    )
    result = simulate(settings, out=tmp_path / "run")
    # device 0: 0.05 + 612 * 40 us + 7 ms / 1   + (202 + 350) * 80 us = 0.125640
    # device 1:        612 * 80 us + 10 ms / 0.5 + (202 + 500) * 80 us = 0.125120
    # device 2: 0.01 + 612 * 40 us + 13 ms / 2   + (202 + 650) * 40 us = 0.075060
    # device 4: 0.1  + 612 * 80 us + 19 ms       + (202 + 950) * 40 us = 0.214040
    lines = metrics_of(tmp_path / "run")
    # device 3 never makes it, and each round waits for it until the deadline
    assert [line["simulated_seconds"] for line in lines] == [0.22, 0.44, 0.66]
    assert [line["heard"] for line in lines] == [3, 4, 4]
    assert [(line["late"], line["away"]) for line in lines] == [([3], [4]), ([3], []), ([3], [])]
    rows = {int(row["device"]): row for row in csv.DictReader((tmp_path / "run" / "devices.csv").open())}
    assert [int(rows[d]["bytes_up"]) for d in range(5)] == [3 * 552, 3 * 702, 3 * 852, 3 * 1002, 2 * 1152]
    assert [int(rows[d]["bytes_down"]) for d in range(5)] == [3 * 612] * 4 + [2 * 612]
    assert [float(rows[d]["busy"]) for d in range(5)] == [0.021, 0.06, 0.0195, 0.048, 0.038]
    relaxed = settings.model_copy(update={"protocol": settings.protocol.model_copy(update={"deadline": 1.0})})
    simulate(relaxed, out=tmp_path / "relaxed")
    # now the slowest ends a round: device 3 with 0.225280, in all three
    assert [line["simulated_seconds"] for line in metrics_of(tmp_path / "relaxed")] == [0.22528, 0.45056, 0.67584]
    # heard 3, 3, 3, 0 and 2 times: 11^2 / (5 * 31)
    assert result["simulated"]["participation"] == {"least": 0, "mean": 2.2, "most": 3, "jain": 0.7806}


def test_pending_gradients_take_their_time_too(generous: dict[str, str], tmp_path: Path) -> None:
    """One device, 7 records (another is never there): two messages with their answers, and a flush of gradients alone.

    Cut gradients: a block of 62 bytes and 4 for each of 70 values, down; a sum of 4 + 8 + 8 * 130 = 1052 bytes, up.
    """
    trace = write_trace(tmp_path / "trace.csv", "device,seconds,available", "0,0,1", "1,0,0")
    settings = small_settings(
        run={"rounds": 2},
        devices={"count": 2, "test": [1], "profile": {**KNOWN, "uplink": 0.1, "downlink": 0.2, "trace": trace}},
        model={"builder": "own:identity_model"},
        guard=generous,
    )
    simulate(settings, out=tmp_path / "run")
    first = 612 * 40 + 7_000 + 552 * 80  # microseconds
    second = (612 + 342) * 40 + 7_000 + 14_000 + (552 + 1052) * 80
    flush = (596 + 342) * 40 + 14_000 + (202 + 1052 - 8) * 80
    lines = [line["simulated_seconds"] for line in metrics_of(tmp_path / "run")]
    assert lines == [first / 1e6, (first + second + flush) / 1e6]


def test_those_who_come_first_are_heard(tmp_path: Path) -> None:
    settings = settings_for(
        {**SHAKY, "dropout": 0.0},
        run={"rounds": 6},
        devices={"count": 16, "test": [15], "fraction": 0.4, "over-sampling": 2.0},
        data={"builder": "own:few"},
    )
    simulate(settings, out=tmp_path / "run")
    lines = metrics_of(tmp_path / "run")
    # of 15 devices 12 are asked and 6 wanted; others answer gradients alone, and are heard if they come before the end
    assert all(line["spare"] and 6 <= line["heard"] <= 12 for line in lines[:-1])
    assert lines[0]["heard"] == 6 and len(lines[0]["spare"]) == 6


def test_too_few_are_refused_as_nodes_are(tmp_path: Path) -> None:
    settings = settings_for({**FAST, "dropout": 0.9}, protocol={"min-nodes": 3, "deadline": 60.0})
    with pytest.raises(FedsplitError, match=r"^round 1: [012] of 5 devices were heard within 60 simulated seconds, "):
        simulate(settings, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("profile", "protocol", "said"),
    [
        ({**FAST, "uplink": -1.0}, {}, "devices.profile.uplink: .* greater than 0.*, got -1.0"),
        ({**FAST, "compute": float("nan")}, {}, "devices.profile.compute: .* finite.*, got nan"),
        ({**FAST, "availability": 0.0}, {}, "devices.profile.availability: .*greater than 0.*, got 0.0"),
        ({**FAST, "availability": 1e-5}, {}, "devices.profile: no round can begin: with availability 1e-05"),
        (FAST, {"min-nodes": 6}, "protocol.min-nodes is 6, but only 5 devices train"),
        (
            {**FAST, "availability": {"on": 1.0, "off": 999.0}},
            {"min-nodes": 2},
            "devices.profile: no round can begin: with availability on 1, off 999 .*, protocol.min-nodes is 2 of 5",
        ),
        ({"uplink": 1.0}, {}, "devices.profile.downlink: missing: give it, a preset or a trace that has it"),
        (
            FAST,
            {"deadline": 0.01},
            r"protocol.deadline \(or timeout\) 0.01 s is shorter than even the fastest device, 0, needs .*: 0.0\d+ s",
        ),
        (FAST, {"deadline": 0.0}, "protocol.deadline: .* greater than 0"),
        (None, {"deadline": 1.0}, r"protocol.deadline needs a \[devices.profile\] in a simulation"),
    ],
)
def test_refuses_what_cannot_be_before_it_begins(
    profile: dict[str, Any] | None, protocol: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(FedsplitError, match=f"^{said}") as refused:
        simulate(settings_for(profile, protocol=protocol), out=tmp_path / "run")
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["0,0,1", "1,0,1", "2,0,0", "3,0,1"], "trace .*trace.csv: device 4 has no row"),
        (["0,0,1", "1,0,1", "2,0,1", "3,0,1", "4,0,1", "9,0,1"], "line 7: device 9 does not exist: ids are 0..4"),
        (["0,5,1", "1,0,1", "2,0,1", "3,0,1", "4,0,1"], "line 2: device 0 begins at 5 seconds"),
        ([f"{d},0,0" for d in range(5)], "devices.profile: no round can begin: the trace has at most 0 there at once"),
    ],
)
def test_the_command_refuses_a_trace_in_one_line(
    rows: list[str], said: str, tmp_path: Path, main: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_trace(tmp_path / "trace.csv", "device,seconds,available", *rows)
    settings = settings_for({**FAST, "trace": trace})
    (tmp_path / "run.toml").write_text(settings.to_toml())
    with pytest.raises(SystemExit) as stopped:
        main("simulate", tmp_path / "run.toml", "--out", tmp_path / "run")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    assert re.search(said, error.replace("\n", " ")), error


def test_a_device_that_is_heard_least_is_asked_first(tmp_path: Path) -> None:
    def jain(sampling: str) -> float:
        settings = settings_for(
            {**FAST, "dropout": 0.2},
            run={"rounds": 20},
            devices={"count": 16, "test": [15], "fraction": 0.3, "sampling": sampling},
            data={"builder": "own:few"},
            first_layer={"strategy": "frozen"},
            protocol={"deadline": 60.0},
        )
        return float(simulate(settings, out=tmp_path / sampling)["simulated"]["participation"]["jain"])

    assert jain("fair") > 0.97 > jain("uniform")


def test_curves_show_accuracy_over_simulated_time(tmp_path: Path) -> None:
    simulate(settings_for(FAST), out=tmp_path / "with")
    simulate(settings_for(None), out=tmp_path / "without")

    def width(name: str) -> int:
        return int.from_bytes((tmp_path / name / "curves.png").read_bytes()[16:20], "big")

    assert width("with") > width("without")
