"""The audit inverts what activations it meets, by their own numbers: no layer is taken for safe for being unusual."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedsplit import simulate
from fedsplit.audit.audit import audit
from fedsplit.audit.evidence import Evidence, equations, rehearsed
from fedsplit.audit.scores import psnr
from fedsplit.audit.transcript import Subjects
from fedsplit.data import Records
from fedsplit.model.layer import FirstLayer
from fedsplit.plan.settings import check_settings
from fedsplit.release.policies import All

TARGETS, NUMBERS, WIDTH = 24, 64, 192
ACTIVATIONS = [nn.LeakyReLU(0.3), nn.GELU(), nn.GELU("tanh"), nn.Tanh(), nn.Sigmoid(), nn.LeakyReLU(0.01), nn.ReLU()]


def evidence_of(activation: nn.Module, dtype: str, scale: float = 1.0) -> Evidence:
    from sklearn.datasets import load_digits

    x = (load_digits().data / 16).astype(np.float32)
    torch.manual_seed(0)
    module = nn.Linear(NUMBERS, WIDTH)
    with torch.no_grad():
        module.weight.mul_(scale)
    layer = FirstLayer(module, activation, (NUMBERS,))
    index, rest, labels = np.arange(TARGETS), slice(300, 1300), np.zeros(1000, np.int64)
    public = Records(x[rest], labels)
    y = labels[:TARGETS]
    subjects = Subjects(x[:TARGETS], y, 0 * index, index, x[:200], index, public, stand_in=False)
    return rehearsed(layer, All(), dtype, subjects, 0)


def least_squares(evidence: Evidence) -> float:
    """The PSNR in dB of plain least squares with the inverse by hand, on what was sent where it has one."""
    layer, seen = evidence.layer, evidence.seen[0]
    weight, bias = layer.layer.weight.detach().numpy(), layer.layer.bias.detach().numpy()
    guesses = []
    for values in seen.values.astype(np.float64):
        before, known = by_hand(layer.activation, values)
        guesses.append(np.linalg.lstsq(weight[known], before[known] - bias[known], rcond=None)[0])
    return float(psnr(evidence.subjects.x, np.clip(guesses, 0, 1), 1.0).mean())


def by_hand(activation: nn.Module, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    z, everywhere = np.linspace(0, 20, 200001), np.full(a.shape, True)
    if isinstance(activation, nn.Tanh):
        return np.arctanh(np.clip(a, -0.9999, 0.9999)), np.abs(a) < 0.9999
    if isinstance(activation, nn.Sigmoid):
        return np.log(a / (1 - a)), everywhere
    if isinstance(activation, nn.LeakyReLU):
        return np.where(a < 0, a / activation.negative_slope, a), everywhere
    return np.interp(a, activation(torch.from_numpy(z)).numpy(), z), a > 0


@pytest.mark.parametrize(
    ("activation", "dtype"), [*((a, "float16") for a in ACTIVATIONS[:5]), (nn.Tanh(), "float32")], ids=str
)
def test_the_strongest_attack_does_what_least_squares_does(activation: nn.Module, dtype: str) -> None:
    evidence = evidence_of(activation, dtype)
    found = audit(evidence, seed=0, quick=True).report
    plain = least_squares(evidence)
    assert plain > 45
    assert found["strongest"]["psnr"] > min(plain, 100) - 3


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_equations_and_inequalities_hold(activation: nn.Module, scale: float) -> None:
    """Also where most outputs are saturated: these bound, and are no equations of noise that they do not have."""
    evidence = evidence_of(activation, "float16", scale)
    found = equations(evidence, np.arange(TARGETS))
    for x, rows, rhs, noise, (left, right) in zip(
        evidence.subjects.x.astype(np.float64), found.rows, found.rhs, found.noise, found.inequalities, strict=True
    ):
        assert (np.abs(rows @ x - rhs) <= 3 * noise + 1e-5 * scale).all()
        assert (left @ x <= right + 1e-5 * scale).all()
    if isinstance(activation, nn.Tanh) and scale > 1:
        assert min(len(right) for _, right in found.inequalities) > WIDTH // 4


BUILDER = """
import torch
from torch import nn
from fedsplit import FirstLayer, SplitModel

def model():
    trunk = nn.Sequential(nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10))
    return SplitModel(FirstLayer(nn.Linear(64, 192), {activation}, (64,)), trunk)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "activation"), [("leaky", "nn.LeakyReLU(0.3)"), ("gelu", "nn.GELU()"), ("tanh", "nn.Tanh()")]
)
def test_a_run_that_sends_everything_fails_its_audit(
    name: str, activation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: Callable[..., Any]
) -> None:
    (tmp_path / f"unusual_{name}.py").write_text(BUILDER.format(activation=activation), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    settings = check_settings(
        {
            "run": {"name": "unusual", "rounds": 1, "engine": "inline"},
            "data": {"name": "digits"},
            "devices": {"count": 12, "per-node": 6, "partition": "iid", "test": 2},
            "public": {"devices": [0, 1], "epochs": 0},
            "model": {"builder": f"unusual_{name}:model"},
            "dropping": {"policy": "none"},
            "protocol": {"mode": "pipelined"},
            "audit": {"targets": 12},
        }
    )
    simulate(settings, out=tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        main("audit", tmp_path / "run", "--fail-above", "40")
    assert ended.value.code == 1
