"""What tests of whole runs are given."""

import gc

import pytest

from fedsplit.runs import observing


@pytest.fixture
def quick(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out curves and collections, too."""
    monkeypatch.setattr(observing, "draw_curves", lambda folder: None)
    monkeypatch.setattr(gc, "collect", lambda *arguments: 0)  # which Flower's Bulyan does for every contribution
