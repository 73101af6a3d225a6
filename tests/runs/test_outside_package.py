"""A package from outside brings a policy, a first layer, a task, an attack and an observer to every command."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # tunes on Ray
PAGES = Path(__file__).parents[2] / "docs" / "how-to"
MODULES = {
    "policy.py": ("own-policy.md", "every_other.py"),
    "attack.py": ("own-attack.md", "neighbour.py"),
    "observer.py": ("own-tracker.md", "csv_table.py"),
}
LAYER = '''
import torch
from torch import nn
from fedsplit import FirstLayer, SplitModel
from fedsplit.model.kinds import register_layer_kind
from fedsplit.model.kinds.general import General


class Circulant(nn.Module):
    """All circular shifts of each filter."""

    def __init__(self, n, filters):
        super().__init__()
        self.filters = nn.Parameter(torch.randn(filters, n) / n**0.5)
        self.bias = nn.Parameter(torch.zeros(filters, 1))

    def forward(self, x):
        spectrum = torch.fft.rfft(x)[:, None] * torch.fft.rfft(self.filters).conj()
        return (torch.fft.irfft(spectrum, n=x.shape[1]) + self.bias).flatten(1)


@register_layer_kind(Circulant)
class CirculantKind(General):
    name = "Circulant"

    def describe(self):
        filters, n = self.module.filters.shape
        return {"n": n, "filters": filters}

    @classmethod
    def build(cls, arguments, *, bias):
        return Circulant(**arguments)


def model():
    first = FirstLayer(Circulant(12, 3), nn.ReLU(), (12,))
    return SplitModel(first, nn.Sequential(nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 3)))
'''
SETTINGS = """
[run]
name = "elsewhere"
rounds = 20
engine = "inline"
seed = 5
observers = ["elsewhere.observer:CsvTable"]

[data]
builder = "elsewhere.task:labelled"
task = "elsewhere.task:Labels"
outputs = 3

[devices]
count = 5
test = [3, 4]

[model]
builder = "elsewhere.layer:model"

[dropping]
policy = "elsewhere.policy:EveryOther"
step = 9

[protocol]
mode = "single-pass"

[trunk]
lr = 0.02

[first-layer]
strategy = "frozen"

[guard]
mode = "enforce"
limits = "limits.toml"

[audit]
targets = 6
attacks = ["elsewhere.attack:Neighbour"]

[tune]
trials = 2
objectives = ["test_accuracy", "strongest_psnr"]

[tune.space]
dropping = { step = [9, 12] }
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a settings file beside the package."""
    package = tmp_path / "elsewhere"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name, (page, title) in MODULES.items():
        text = (PAGES / page).read_text(encoding="utf-8")
        (package / name).write_text(re.findall(rf'```python title="{title}"\n(.*?)```', text, re.S)[0])
    (package / "layer.py").write_text(LAYER)
    (package / "task.py").write_text((Path(__file__).parents[1] / "outside.py").read_text())
    (tmp_path / "limits.toml").write_text("equations = 0.5\nleverage = 1.0\n")
    (tmp_path / "settings.toml").write_text(SETTINGS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "settings.toml"
    for name in [name for name in sys.modules if name.partition(".")[0] == "elsewhere"]:
        sys.modules.pop(name)


def test_every_command_takes_parts_from_outside(
    settings: Path, main: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = settings.parent
    for name, step in (("one", 9), ("two", 12)):
        main("simulate", settings, "--set", f"dropping.step={step}", "--out", folder / name, "--json")
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for result, equations in zip(results, (4, 3), strict=True):
        assert result["guard"] == {"mode": "enforce", "refused": {}, "test_refused": {}}
        assert result["samples"] > 100 and 0 < result["ledger"]["equations"] <= equations
        assert result["test_accuracy"] is not None and 0.5 < result["test_label_accuracy"] <= 1
    assert (folder / "one" / "rounds.csv").read_text().count("\n") == 21

    main("audit", folder / "one", "--quick", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["control"]["holds"] and report["criterion"]["equations_max"] <= 4
    assert {"nearest public record", "Wiener"} <= set(report["attacks"])

    main("compare", folder / "one", folder / "two", "--json")
    compared = capsys.readouterr().out
    assert "test_label_accuracy" in compared and "dropping.step" in compared

    main("tune", settings, "--out", folder / "study", "--parallel", "1", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found and json.dumps(found).count("strongest_psnr")


def test_a_guard_that_enforces_refuses_what_the_policy_says_is_too_much(
    settings: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(settings.parent)
    said = refused("simulate", settings, "--set", "dropping.step=2", "--out", settings.parent / "run")
    assert "a record of 12 numbers could give 18 equations, equations is 0.5" in said
    assert not (settings.parent / "run").exists()
