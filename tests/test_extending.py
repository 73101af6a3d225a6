"""How-tos of docs/: their code builds what they say, from nothing, and it works as what comes with fedsplit does."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from fedsplit.audit.evidence import equations, recorded
from fedsplit.common.errors import ConfigError, DataError
from fedsplit.data import Scaling
from fedsplit.device.bundle import Bundle
from fedsplit.device.nodes import real_node
from fedsplit.guard.limits import load_limits
from fedsplit.model.tasks import task_of
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.named_code import names_code
from fedsplit.plan.preflight import check_limits
from fedsplit.plan.settings import Settings, check_settings, load_settings
from fedsplit.release.noise import Noisy
from fedsplit.runs.comparing import differing, read_runs
from fedsplit.runs.simulation import simulate
from fedsplit.tuning.space import Space, usual_space

DOCS = Path(__file__).parent.parent / "docs" / "how-to"
BLOCKS = re.compile(r'```(python|toml)(?: title="(\S+)")?\n(.*?)```', re.DOTALL)
MODULES = ("every_other", "circulant", "circulant_kind")


def write_files(page: str, folder: Path) -> list[str]:
    """Write a page's files into a folder and return its other blocks of code."""
    found = BLOCKS.findall((DOCS / page).read_text(encoding="utf-8"))
    assert len(found) >= 3
    for _, name, text in found:
        if name:
            (folder / name).write_text(text, encoding="utf-8")
    return [text for _, name, text in found if not name]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def settings(here: Path) -> Settings:
    write_files("own-policy.md", here)
    return load_settings(here / "every_other.toml")


def changed(settings: Settings, **dropping: Any) -> Settings:
    return check_settings({**settings.tables(), "dropping": {**settings.tables()["dropping"], **dropping}})


@pytest.mark.slow
@pytest.mark.parametrize("page", ["own-policy.md", "own-layer.md"])
def test_a_pages_code_runs(page: str, here: Path) -> None:
    for code in write_files(page, here):
        exec(compile(code, page, "exec"), {"__name__": "page"})


# --- a policy from outside --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_policy_from_outside_runs_is_audited_and_compared(settings: Settings, here: Path) -> None:
    """With the guard enforcing: nothing is refused, and every equation and inequality that the audit finds holds."""
    found = simulate(settings, out=here / "two")
    other = simulate(changed(settings, step=4), out=here / "four")
    assert found["bytes_up"] > other["bytes_up"] and found["exposures_max"] == 1
    parts = Experiment(settings)
    evidence = recorded(here / "two" / "audit", parts.model.first_layer, parts.policy, settings.protocol.dtype)
    known = equations(evidence, range_of(evidence.subjects.x))
    for x, rows, rhs, noise, (left, right) in zip(
        evidence.subjects.x.astype(float), known.rows, known.rhs, known.noise, known.inequalities, strict=True
    ):
        assert (abs(rows @ x.ravel() - rhs) <= 3 * noise + 1e-4).all() and (left @ x.ravel() <= right + 1e-4).all()
        assert len(rows) + len(left) == 6  # what is left out of every step-th was zero
    runs = read_runs([here / "two", here / "four"])
    assert "dropping.step" in differing(runs)


def range_of(x: Any) -> Any:
    import numpy as np

    return np.arange(len(x))


def test_a_run_with_too_many_equations_is_refused_before_anything_leaves(settings: Settings) -> None:
    parts = Experiment(changed(settings, step=1))
    with pytest.raises(ConfigError, match="could give 12 equations"):
        check_limits(parts.terms, parts.source, parts.model.first_layer, parts.policy, load_limits())


def test_a_policy_from_outside_is_searched(settings: Settings) -> None:
    layer = Experiment(settings).model.first_layer
    space = Space.of(settings, usual_space(settings, layer))
    assert "dropping" in space.dimensions
    drawn = {"dropping": "every_other:EveryOther", "dropping.every_other:EveryOther.step": 5, "trunk.lr": 1e-3}
    tables = space.draw(optuna.trial.FixedTrial(drawn))
    assert Experiment(check_settings(tables)).policy == Experiment(changed(settings, step=5)).policy
    space.check(lambda trial: Experiment(trial).policy.fits(layer))


def test_noise_goes_around_a_policy_from_outside(settings: Settings) -> None:
    policy = Experiment(changed(settings, clip=2.0, noise=0.5)).policy
    assert isinstance(policy, Noisy) and policy.policy == Experiment(settings).policy


@pytest.mark.parametrize(
    ("dropping", "said"),
    [
        ({"stride": 3}, r"dropping\.stride: policy 'every_other:EveryOther' takes step"),
        ({"step": 13}, r"step must be in 1\.\.12, got 13"),
        ({"policy": "every_other:Other"}, "module every_other has no class 'Other'"),
        ({"policy": "every_other:Skipped"}, "must derive from"),
        ({"policy": "no_such:Policy"}, "there is no module 'no_such'"),
    ],
)
def test_what_is_wrong_with_a_policy_is_told_in_one_line(settings: Settings, dropping: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        _ = Experiment(changed(settings, **dropping)).model
    assert "\n" not in str(error.value)


def test_settings_keep_what_is_given(settings: Settings) -> None:
    assert Settings.from_json(settings.to_json()).tables() == settings.tables()
    assert settings.tables()["dropping"] == {"policy": "every_other:EveryOther", "step": 2, "mask": "fresh"}


def test_a_node_imports_no_policy_that_its_owner_does_not_allow(
    settings: Settings, here: Path, main: Callable[..., None]
) -> None:
    main("node", "init", here / "node", "--device", "3")
    terms = Experiment(settings).terms.to_json()
    sys.modules.pop("every_other", None)
    assert names_code(settings, on_nodes=True) == {"dropping.policy": "every_other:EveryOther"}
    with pytest.raises(
        ConfigError, match=r"dropping\.policy 'every_other:EveryOther' is not among what the node's owner"
    ):
        real_node(terms, str(here / "node"))
    assert "every_other" not in sys.modules


def test_a_bundle_imports_no_policy_that_is_not_allowed(settings: Settings, here: Path) -> None:
    parts = Experiment(settings)
    layer, name = parts.model.first_layer, "every_other:EveryOther"
    Bundle(layer, parts.policy, "float16", Scaling(), task_of("classification"), 10).save(here / "device")
    sys.modules.pop("every_other")
    with pytest.raises(DataError, match=f"policy '{name}' is code from outside, and not allowed"):
        Bundle.load(here / "device")
    assert "every_other" not in sys.modules
    assert Bundle.load(here / "device", [name]).dropping.step == 2  # type: ignore[attr-defined]
