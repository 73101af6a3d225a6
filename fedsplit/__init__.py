"""Split training across devices that keep their records; see README.md."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsplit.data import DeviceData as DeviceData
    from fedsplit.device.predictor import Predictor as Predictor
    from fedsplit.model.layer import FirstLayer as FirstLayer
    from fedsplit.model.split import SplitModel as SplitModel
    from fedsplit.runs.observing import Observer as Observer
    from fedsplit.runs.simulation import simulate as simulate
    from fedsplit.server.rounds import SplitStrategy as SplitStrategy

__version__ = "0.1.0"
__all__ = ["DeviceData", "FirstLayer", "Observer", "Predictor", "SplitModel", "SplitStrategy", "simulate"]
_HOMES = {
    "DeviceData": "fedsplit.data",
    "FirstLayer": "fedsplit.model.layer",
    "Observer": "fedsplit.runs.observing",
    "Predictor": "fedsplit.device.predictor",
    "SplitModel": "fedsplit.model.split",
    "SplitStrategy": "fedsplit.server.rounds",
    "simulate": "fedsplit.runs.simulation",
}


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: torch and Flower take seconds."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fedsplit' has no attribute {name!r}")
