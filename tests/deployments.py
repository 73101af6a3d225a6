"""Settings of small deployments, and of the simulations that they must equal."""

from pathlib import Path

import tomli_w

HONEST = 4


RECORDS = {
    "run": {"rounds": 5, "seed": 3},
    "data": {"name": "digits"},
    "devices": {"partition": "iid"},
    "model": {"name": "mlp", "width": 16},
    "dropping": {"policy": "top-k", "k": 6},
    "protocol": {"mode": "pipelined", "chunk": 40, "batch-size": 32, "timeout": 20.0, "dtype": "float32"},
    "first-layer": {"strategy": "FedAvg", "lr": 0.1},
    "trunk": {"optimizer": "sgd", "lr": 0.1},
}
"""The simulation; what is deployed knows of the data only what a record is."""


def written(path: Path, settings: dict) -> Path:
    path.write_text(tomli_w.dumps(settings))
    return path


def simulated(count: int) -> dict:
    return {**RECORDS, "devices": {"partition": "iid", "count": count, "test": [3]}}


def deployed(count: int) -> dict:
    data = {"shape": [64], "task": "classification", "outputs": 10}
    return {**RECORDS, "data": data, "devices": {"count": count, "test": [3]}}
