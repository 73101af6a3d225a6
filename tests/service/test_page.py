"""The demo page's JavaScript sends byte for byte what the Python client sends."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fedsplit.data import Scaling
from fedsplit.device.bundle import Bundle, Dropping
from fedsplit.device.home import Home
from fedsplit.device.predictor import Predictor
from fedsplit.model.activations import ACTIVATIONS
from fedsplit.model.layer import FirstLayer
from fedsplit.model.tasks import task_of
from fedsplit.release.policies import BUILT_IN, All, AtMost, Bits, Random, TopK, settings_name
from fedsplit.release.policy import Policy

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")]

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "dense": (lambda: nn.Linear(64, 40), (64,)),
    "an image, flattened": (lambda: nn.Linear(64, 40), (1, 8, 8)),
    "along the last axis": (lambda: nn.Linear(8, 5, bias=False), (3, 8)),
    "over time": (lambda: nn.Conv1d(6, 8, kernel_size=9, stride=2, padding=4), (6, 50)),
    "over time, dilated groups": (lambda: nn.Conv1d(6, 9, 3, padding=(2,), dilation=2, groups=3, bias=False), (6, 20)),
    "over an image": (lambda: nn.Conv2d(2, 6, (5, 3), stride=(2, 1), padding=(2, 0), dilation=(1, 2)), (2, 9, 11)),
}
POLICIES = {
    "one bit": Bits(1),
    "three bits": Bits(3),
    "eight bits": Bits(8),
    "top": TopK(7),
    "at most": AtMost(9),
    "random": Random(0.25),
    "everything": All(),
}


def bundle(name: str, dropping: Policy, activation: str = "relu", dtype: str = "float16") -> Bundle:
    build, shape = LAYERS[name]
    torch.manual_seed(3)
    channels = shape[0]
    scaling = Scaling(tuple(np.linspace(-1, 2, channels)), tuple(np.linspace(3, 7, channels)))
    return Bundle(
        FirstLayer(build(), ACTIVATIONS[activation](), shape), dropping, dtype, scaling, task_of("classification"), 4
    )


@dataclass
class Asked:
    """Records that both sides are given, and another policy than the model's."""

    made: Bundle
    raw: NDArray[np.float64]
    dropping: Policy | None = None


def sent(tmp_path: Path, asked: list[Asked]) -> tuple[list[str], list[str]]:
    """Return what Python and JavaScript send of each record."""
    ours, theirs = [], []
    for number, each in enumerate(asked):
        home, folder = Home.create(tmp_path / f"home{number}", [0]), tmp_path / f"device{number}"
        (home.folder / "limits.toml").write_text("enforce = false\n")
        each.made.save(folder)
        chosen = each.made if each.dropping is None else replace(each.made, dropping=each.dropping)
        predictor = Predictor(chosen, home, lambda payload: np.zeros((1, 1)))
        ours += [predictor.release(row[None])[0].to_bytes().hex() for row in each.raw]
        dropping = None if each.dropping is None else Dropping.of(each.dropping).model_dump()
        records = each.raw.reshape(len(each.raw), -1).tolist()
        theirs.append({"folder": str(folder), "secret": home.secret.hex(), "records": records, "dropping": dropping})
    (tmp_path / "asked.json").write_text(json.dumps(theirs))
    command = ["node", str(Path(__file__).parents[1] / "release.mjs"), str(tmp_path / "asked.json")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return ours, done.stdout.split()


def records(made: Bundle, count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    raw = rng.normal(scale=3, size=(count, *made.layer.input_shape)).astype(np.float32).astype(np.float64)
    raw[0] = 0
    raw[1].flat[0] = -0.0
    return raw


@pytest.mark.parametrize("name", LAYERS)
def test_the_page_sends_the_same_bytes(name: str, tmp_path: Path) -> None:
    made = [bundle(name, policy) for policy in POLICIES.values()]
    ours, theirs = sent(tmp_path, [Asked(each, records(each, 20)) for each in made])
    assert theirs == ours and len(set(ours)) > 100


@pytest.mark.slow
def test_the_page_knows_activations_and_formats(tmp_path: Path) -> None:
    made = [
        bundle("dense", AtMost(20), activation, dtype)
        for activation in sorted(set(ACTIVATIONS) - {"relu", "gelu"})
        for dtype in ("float16", "float32")
    ]
    ours, theirs = sent(tmp_path, [Asked(each, records(each, 40)) for each in made])
    assert theirs == ours


def test_values_of_all_sizes_are_rounded_alike(tmp_path: Path) -> None:
    """Down to those that float16 can hardly hold beside the largest, and ties between two of its numbers."""
    layer = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.exp2(-torch.arange(64) / 2)))
    made = Bundle(FirstLayer(layer, nn.Identity(), (64,)), All(), "float16", Scaling(), task_of("regression"), 1)
    rng = np.random.default_rng(1)
    raw = np.concatenate([rng.normal(size=(30, 64)), 1 + rng.integers(0, 4096, size=(30, 64)) / 2048])
    ours, theirs = sent(tmp_path, [Asked(made, raw.astype(np.float32).astype(np.float64))])
    assert theirs == ours


def test_the_page_can_send_under_another_policy(tmp_path: Path) -> None:
    made = bundle("dense", Bits(1))
    ours, theirs = sent(tmp_path, [Asked(made, records(made, 5), TopK(5))])
    assert theirs == ours


def test_the_page_knows_the_policies_that_it_is_offered_for() -> None:
    """A policy that the page does not know must not send all outputs."""
    from fedsplit.service import demo

    script = (Path(demo.__file__).parent / "page" / "layer.js").read_text(encoding="utf-8")
    names = {name for name, kind in BUILT_IN.items() if kind in demo._POLICIES}
    assert set(re.findall(r'case "([\w-]+)":', script)) == names and len(names) == len(demo._POLICIES)
    assert settings_name(All()) in names and "default: // and nothing leaves\n        throw" in script
