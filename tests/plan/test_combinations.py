"""Which choices go together: the documentation shows what settings are checked by.

``python tests/plan/test_combinations.py --write`` puts the table into the documentation.
"""

import itertools
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # for the script
from conftest import small_settings

from fedsplit.common.errors import ConfigError
from fedsplit.plan.combinations import REFUSALS, refusal
from fedsplit.plan.learning import ProtocolSettings
from fedsplit.plan.modes import MODES
from fedsplit.plan.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "design" / "protocol.md"
_BEGIN, _END = "<!-- Written by: python tests/plan/test_combinations.py --write -->\n", "<!-- end -->\n"
CLOCK = {"uplink": 1.0, "downlink": 1.0}
PLACES = list(itertools.product(("shared", "at-home"), (None, CLOCK)))


def chosen(mode: str, labels: str, profile: dict[str, float] | None, **changes: dict[str, Any]) -> Settings:
    public = {} if MODES[mode].teaches else {"public": {"devices": [0], "epochs": 1}}
    return small_settings(
        protocol={"mode": mode, "labels": labels, **changes.pop("protocol", {})},
        devices={"profile": profile} if profile else {},
        **public,
        **changes,
    )


def reason(mode: str, labels: str, profile: dict[str, float] | None) -> int | None:
    """Return the number of the refusal that a combination meets, or None."""
    try:
        chosen(mode, labels, profile)
    except ConfigError as error:
        says = [refused.says.format(mode=repr(mode)) for refused in REFUSALS]
        return 1 + says.index(str(error))
    return None


def table() -> str:
    """Return the part of the page that is written by this file."""
    columns = [f"labels {labels}{', virtual clock' if profile else ''}" for labels, profile in PLACES]
    lines = [f"| mode | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for mode in MODES:
        cells = ["runs" if (n := reason(mode, *place)) is None else f"refused: {n}" for place in PLACES]
        lines.append(f"| `{mode}` | {' | '.join(cells)} |")
    whys = [f"{n}. `{r.says.format(mode='MODE')}`: {r.why}" for n, r in enumerate(REFUSALS, start=1)]
    return "\n".join([*lines, "", "What is refused, with what is told and why:", "", *whys, ""])


def page() -> str:
    before, _, rest = PAGE.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}{table()}{_END}{after}"


def test_the_documentation_shows_the_table() -> None:
    assert PAGE.read_text() == page()


def test_all_modes_can_be_set_and_know_their_names() -> None:
    assert get_args(ProtocolSettings.model_fields["mode"].annotation) == tuple(MODES)
    assert all(mode.name == name for name, mode in MODES.items())


def test_twelve_of_sixteen_run() -> None:
    found = {(mode, *place[:1]): reason(mode, *place) for mode in MODES for place in PLACES}
    assert {key for key, number in found.items() if number} == {
        ("single-pass", "at-home"),
        ("release-once", "at-home"),
    }


BROKEN: list[dict[str, Any]] = [
    {"mode": "single-pass", "protocol": {"labels": "at-home"}},
    {"mode": "pipelined", "protocol": {"chunk": "spread"}},
    {"mode": "single-pass", "run": {"evaluate-every": 1}},
    {"mode": "release-once", "public": {"devices": [0], "epochs": 0}},
    {"mode": "synchronous", "trunk": {"replay-mb": 1.0}},
    {"mode": "pipelined", "protocol": {"pace": "own:Pace"}, "devices": {"profile": CLOCK}},
]


@pytest.mark.parametrize(("number", "broken"), list(enumerate(BROKEN)))
def test_each_refusal_names_its_mode_in_one_line(number: int, broken: dict[str, Any]) -> None:
    changes = {key: value for key, value in broken.items() if key not in ("mode", "protocol")}
    with pytest.raises(ConfigError) as refused:
        small_settings(protocol={"mode": broken["mode"], **broken.get("protocol", {})}, **changes)
    assert str(refused.value) == REFUSALS[number].says.format(mode=repr(broken["mode"]))
    assert "\n" not in str(refused.value)


def test_every_refusal_is_tried() -> None:
    assert len(BROKEN) == len(REFUSALS)
    assert refusal(small_settings()) is None


if __name__ == "__main__" and "--write" in sys.argv:
    PAGE.write_text(page())
