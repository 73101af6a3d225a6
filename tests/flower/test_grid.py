"""How grids wait for replies."""

import time

import pytest

from fedsplit.flower.grid import Pauses


def test_looks_that_take_long_do_not_put_off_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is always there already is looked for sooner and sooner, although it takes each look a second to see it."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pauses, waits = Pauses(0.02, 3.0), []
    for late in (2.0, 2.0, 2.0, *[0.0] * 20):
        pauses.begin()
        now += late
        waits.append(pauses.next())
        now += waits[-1] + 1.0
        pauses.came()
    assert waits[2] == pytest.approx(0.3)  # 15 % of what has been waited
    assert waits[3] == pytest.approx(0.8 * 2.3)
    assert waits[-1] < 0.1
