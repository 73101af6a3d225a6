"""The promise that sets fedsplit apart: the protocol computes what plain PyTorch computes."""

from pathlib import Path

import pytest
from conftest import small_settings
from references import centralised, delayed, largest_difference, moved, trained

from fedsplit import simulate

KINDS = [
    ("linear", "linear_model"),
    ("linear", "tanh_model"),
    ("linear", "gelu_model"),
    ("conv1d", "conv1d_model"),
    ("conv2d", "conv2d_model"),
]

pytestmark = pytest.mark.slow  # many rounds, and each an exchange with every node


@pytest.mark.parametrize(("data", "model"), KINDS)
def test_synchronous_without_dropping_is_centralised_sgd(data: str, model: str, out: Path) -> None:
    settings = small_settings(
        run={"rounds": 50},
        data={"builder": f"own:{data}"},
        model={"builder": f"own:{model}"},
        protocol={"mode": "synchronous", "chunk": 4, "batch-size": 1000},
    )
    simulate(settings, out=out)
    found = trained(out)
    assert moved(settings, found) > 0.01
    assert largest_difference(found, centralised(settings)) < 1e-5


@pytest.mark.parametrize("chunk", ["epoch", 6])
@pytest.mark.parametrize(("data", "model"), KINDS)
def test_pipelined_applies_first_layer_gradients_one_round_late(
    data: str, model: str, chunk: int | str, out: Path
) -> None:
    settings = small_settings(
        run={"rounds": 8},
        data={"builder": f"own:{data}"},
        model={"builder": f"own:{model}"},
        protocol={"mode": "pipelined", "chunk": chunk, "batch-size": 16},
        first_layer={"lr": 0.3},
    )
    simulate(settings, out=out)
    found = trained(out)
    assert moved(settings, found) > 0.01
    assert largest_difference(found, delayed(settings)) < 1e-5


@pytest.mark.parametrize(("data", "model"), KINDS)
def test_single_pass_replays_releases_for_the_trunk(data: str, model: str, out: Path) -> None:
    settings = small_settings(
        run={"rounds": 5},
        data={"builder": f"own:{data}"},
        model={"builder": f"own:{model}"},
        protocol={"mode": "single-pass", "chunk": "spread", "batch-size": 16},
        first_layer={"lr": 0.3},
    )
    result = simulate(settings, out=out)
    found = trained(out)
    assert result["exposures_max"] == result["test_exposures_max"] == 1
    assert moved(settings, found) > 0.01
    assert largest_difference(found, delayed(settings, replay=True)) < 1e-5


def test_pipelined_differs_from_centralised(out: Path) -> None:
    """The reference tells the modes apart: without the delay it would not hold."""
    settings = small_settings(run={"rounds": 8}, protocol={"batch-size": 1000})
    simulate(settings, out=out)
    assert largest_difference(trained(out), centralised(settings)) > 1e-4
