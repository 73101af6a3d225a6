"""Small runs over virtual devices that are away, late and lost, and what is compared of them."""

import json
from pathlib import Path
from typing import Any

from conftest import small_settings

from fedsplit.plan.settings import Settings

KNOWN = {"release-seconds": 1e-3, "gradient-seconds": 2e-3}  # nothing is measured, so that runs are equal
FAST: dict[str, Any] = {**KNOWN, "uplink": 1.0, "downlink": 1.0}


SHAKY: dict[str, Any] = {
    **KNOWN,
    "compute": {"median": 0.5, "sigma": 0.7},
    "uplink": {"median": 0.05, "sigma": 0.6},
    "downlink": {"median": 0.2, "sigma": 0.6},
    "latency": {"median": 0.05, "sigma": 0.3},
    "dropout": 0.1,
}


OF_PACKING = ("seconds", "trunk_seconds", "exchanges", "bytes_up", "bytes_down")
RELEASE_ONCE = {"public": {"devices": [1], "epochs": 1}}


def settings_for(profile: dict[str, Any] | None, mode: str = "pipelined", **changes: dict[str, Any]) -> Settings:
    devices = {**changes.pop("devices", {}), **({"profile": profile} if profile else {})}
    protocol = {"mode": mode, **changes.pop("protocol", {})}
    once = RELEASE_ONCE if mode == "release-once" else {}
    return small_settings(
        devices=devices,
        protocol=protocol,
        trunk={"optimizer": "adam", "lr": 0.01},
        **{"first_layer": {"strategy": "FedAdam", "lr": 0.01}, **once, **changes},
    )


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in OF_PACKING} for line in lines]
