"""Attacks of somebody's own: they are scored with the others, see no original, and fail in one line."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import small_settings

from fedsplit import simulate
from fedsplit.audit.attack import Attack, attacks_named
from fedsplit.audit.standard import STANDARD
from fedsplit.common.errors import ConfigError
from fedsplit.plan.settings import Settings
from fedsplit.runs.auditing import audit_policy, audit_run

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "own-attack.md").read_text()
MODULE = '''
import numpy as np
from fedsplit.audit.attack import Attack

class Peeks(Attack):
    """Tries to hand back the originals."""
    name = "peeks"
    def reconstruct(self, problem):
        subjects = problem.evidence.subjects
        assert np.isnan(subjects.x).all() and np.isnan(subjects.candidates).all()
        return np.nan_to_num(subjects.x[: len(problem.targets)].reshape(len(problem.targets), -1))

class Raises(Peeks):
    name = "raises"
    def reconstruct(self, problem):
        raise KeyError("first")

class Misshapen(Peeks):
    name = "misshapen"
    def reconstruct(self, problem):
        return np.zeros((1, 2))

class Infinite(Peeks):
    name = "infinite"
    def reconstruct(self, problem):
        return np.full((len(problem.targets), problem.numbers), np.inf)

class Taken(Peeks):
    name = "Wiener"

class Nameless(Attack):
    def reconstruct(self, problem):
        return "nothing"

class Half(Attack):
    name = "half"

def function():
    pass
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_attacks.py").write_text(MODULE)
    (tmp_path / "neighbour.py").write_text(re.findall(r'```python title="neighbour.py"\n(.*?)```', PAGE, re.S)[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("own_attacks", "neighbour"):
        sys.modules.pop(name, None)


def settings(*attacks: str) -> Settings:
    return small_settings(audit={"targets": 6, "attacks": list(attacks)}, dropping={"policy": "top-k", "k": 4})


def test_an_attack_of_ones_own_is_scored_with_the_others(module: Path) -> None:
    report = audit_policy(settings("neighbour:Neighbour", "own_attacks:Peeks"), module / "out", seed=0, quick=True)
    assert {"nearest public record", "peeks", "Wiener"} <= set(report["attacks"])
    assert report["strongest"]["attack"] != "peeks"
    assert json.loads((module / "out" / "audit.json").read_text())["attacks"].keys() == report["attacks"].keys()


def test_an_attack_that_finds_the_records_is_the_strongest(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that knows them from elsewhere."""
    chosen = settings("own_attacks:Peeks")
    audit_policy(chosen, module / "out", seed=0, quick=True)
    own: Any = sys.modules["own_attacks"]
    known = _originals(chosen)
    monkeypatch.setattr(own.Peeks, "reconstruct", lambda self, problem: known[: len(problem.targets)])
    report = audit_policy(chosen, module / "again", seed=0, quick=True)
    assert report["strongest"]["attack"] == "peeks" and report["strongest"]["psnr"] > 60


def _originals(chosen: Settings) -> np.ndarray:
    from fedsplit.audit.transcript import Subjects
    from fedsplit.plan.experiment import Experiment

    parts = Experiment(chosen)
    x = Subjects.choose(parts.source, parts.public, chosen.donors, 6, chosen.run.seed).x
    return x.reshape(len(x), -1).astype(np.float64)


@pytest.mark.slow
def test_a_run_can_be_attacked_with_more(
    module: Path, main: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    simulate(settings(), out=module / "run")
    usual = audit_run(module / "run", seed=0, quick=True)
    main("audit", module / "run", "--quick", "--attack", "neighbour:Neighbour", "--json")
    found = json.loads(capsys.readouterr().out)
    assert set(found["attacks"]) - set(usual["attacks"]) == {"nearest public record"}
    assert all(found["attacks"][name] == scores for name, scores in usual["attacks"].items())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_attacks:Missing", "has no class 'Missing'"),
        ("nowhere:Attack", "there is no module 'nowhere'"),
        ("own_attacks:function", "must be a subclass of fedsplit.audit.attack.Attack"),
        ("own_attacks:Half", "lacks reconstruct"),
        ("own_attacks:Nameless", "needs a name that no other attack has, got None"),
        ("own_attacks:Taken", "needs a name that no other attack has, got 'Wiener'"),
        ("own_attacks:Raises", "attack 'raises' raised KeyError: 'first'"),
        ("own_attacks:Misshapen", r"attack 'misshapen' must return finite guesses of shape \(6, 12\), got \(1, 2\)"),
        ("own_attacks:Infinite", "attack 'infinite' must return finite guesses"),
    ],
)
def test_what_is_wrong_with_an_attack_is_told_in_one_line(name: str, said: str, module: Path) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        audit_policy(settings(name), module / "out", seed=0, quick=True)
    assert "\n" not in str(refused.value)
    assert not (module / "out" / "audit.json").exists()


def test_two_attacks_of_one_name_are_refused(module: Path) -> None:
    with pytest.raises(ConfigError, match="needs a name that no other attack has"):
        attacks_named(["own_attacks:Peeks", "own_attacks:Peeks"])


def test_the_standard_attacks_have_names_of_their_own() -> None:
    names = [attack.name for attack in STANDARD]
    assert len(set(names)) == len(names) and all(isinstance(attack, Attack) for attack in STANDARD)
