"""All ways to forecast, for each seed."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit.plan.settings import Settings, check_settings, load_settings
from simulations.forecast.data import Float, Pigs
from simulations.forecast.linear import without_privacy
from simulations.forecast.networks import central, run
from simulations.forecast.report import PRIVATE
from simulations.shared.options import option
from simulations.shared.results import Results
from simulations.shared.study import CONFIGS
from simulations.shared.workers import progress, quiet

# Widths, activations and epochs that forecast best on pigs 1..36, by leaving pigs out; the private policy, too, among
# those that leaked no more in audits than a quarter of 64.
RIVALS: dict[str, tuple[dict[str, Any], int, str]] = {
    "top-8 of 16": ({"policy": "top-k", "k": 8}, 16, "relu"),
    "random, 1/4 of 64": ({"policy": "random", "keep": 0.25}, 64, "relu"),
    "random, 1/4 of 256": ({"policy": "random", "keep": 0.25}, 256, "relu"),
    "no dropping, 64 units": ({"policy": "none"}, 64, "identity"),
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What is trained, and how often."""

    config: Path = option(CONFIGS / "pig-forecast.toml")
    seeds: tuple[int, ...] = option((0, 1, 2), quick=(0,))
    rivals: tuple[str, ...] = option(tuple(RIVALS), quick=(), choices=tuple(RIVALS), help="other policies")
    epochs: int = option(80, quick=5, help="of central training")
    set: tuple[str, ...] = option(
        (), quick=("run.rounds=5", "public.epochs=20", "audit.targets=20"), help="KEY=VALUE, as in fedsplit simulate"
    )


def study(options: Options) -> Results:
    """Return forecasts and leakage, and what was to be forecast of which pig."""
    quiet()
    pigs = Pigs(load_settings(options.config))
    rows = [
        {"name": name, "seed": seed, "forecast": forecast.round(5), "leak": leak}
        for seed in progress(options.seeds, "training and attacking")
        for name, forecast, leak in ways(options, seed, pigs)
    ]
    return {"truth": pigs.change, "whose": pigs.tested, "rows": rows}


def ways(options: Options, seed: int, pigs: Pigs) -> Iterator[tuple[str, Float, Row | None]]:
    """Yield each way to forecast: its name, what it says of the held-out windows, and what leaked."""
    private = load_settings(options.config, [*options.set, f"run.seed={seed}", "run.engine=inline"])
    for name, forecast in without_privacy(pigs).items():
        yield name, forecast, None
    found, leak = run(private, pigs)
    yield "ridge, released", found["ridge"], None
    yield PRIVATE, found["trunk"], leak
    for name in options.rivals:
        found, leak = run(rival(private, *RIVALS[name]), pigs)
        yield name, found["trunk"], leak
    for width in (private.model.width, 64):
        settings = rival(private, {"policy": "none"}, width, "identity")
        yield f"central, {width} units", central(settings, pigs, options.epochs), None


def rival(private: Settings, policy: dict[str, Any], width: int, activation: str) -> Settings:
    """Return the private settings with another first layer, unguarded: the limits would refuse most policies."""
    raw = private.tables()
    raw["dropping"] = policy
    raw["model"] |= {"width": width, "activation": activation}
    raw["public"]["penalty"] = 0.0
    raw["guard"]["mode"] = "observe"
    return check_settings(raw)
