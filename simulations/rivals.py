"""What the rivals of the study `devices` were chosen from: FedAvg's local epochs, and learning rates.

    python -m simulations rivals --presets wearables-ble --seeds 1

The seeds are others than those of the study `devices`, the held-out devices the same.
"""

from dataclasses import dataclass

from fedsplit.plan.settings import presets
from simulations.devices.measuring import measure
from simulations.devices.report import draw, tables
from simulations.devices.rows import CHOICES
from simulations.shared.options import option
from simulations.shared.results import Results

__all__ = ["Options", "draw", "study", "tables"]


@dataclass(frozen=True)
class Options:
    """Which devices, and how often."""

    seeds: int = option(3, quick=1)
    presets: tuple[str, ...] = option(tuple(presets()), quick=("phones-4g",), choices=tuple(presets()))
    rows: tuple[str, ...] = option(
        tuple(CHOICES), quick=("pipelined", "FedAvg, 1, 0.01"), choices=tuple(CHOICES), help="ways of training"
    )
    rounds: int = option(0, quick=2, help="of each run; 0: as the row says")


def study(options: Options) -> Results:
    """Run all choices on seeds of their own."""
    chosen = {name: CHOICES[name] for name in options.rows}
    return {"runs": measure(chosen, options.presets, range(100, 100 + options.seeds), options.rounds)}
