"""Strategies, attacks, and the settings of one run."""

from typing import Any

from fedsplit.plan.settings import Settings, check_settings

DEVICES, HOSTILE, TEST, CLASSES = 15, 3, 3, 10
ATTACKS = ("none", "flipped", "scaled", "random", "labels")
PARTITIONS: dict[str, dict[str, Any]] = {
    "iid": {"partition": "iid"},
    "skewed": {"partition": "dirichlet", "alpha": 0.1},
}
MODES = {"pipelined": {"chunk": "epoch"}, "single-pass": {"chunk": "spread"}}
# learning rates that were good without an attack: for Adam, and for a plain step
ADAM, PLAIN = {"pipelined": 0.01, "single-pass": 0.001}, {"pipelined": 0.03, "single-pass": 0.003}
ARGS: dict[str, dict[str, Any]] = {
    "FedTrimmedAvg": {"beta": 0.25},
    "MultiKrum": {"num_malicious_nodes": HOSTILE, "num_nodes_to_select": 9},
    "Bulyan": {"num_malicious_nodes": HOSTILE},
}
ROWS = {name: (name, False) for name in ("frozen", "FedAvg", "FedAdam", "FedMedian", *ARGS)}
ROWS["FedAdam, trimmed trunk"] = ("FedAdam", True)
"""By row: the first layer's strategy, and whether the trunk is trimmed."""
ON_TRUNK = ("none", "labels")  # attacks that tell something of rows whose first layer is not what is looked at


def told(row: str, attack: str) -> bool:
    """Whether an attack tells something of a row."""
    return attack in ON_TRUNK or not (row == "frozen" or ROWS[row][1])


def settings_for(seed: int, mode: str, partition: str, row: str, rounds: int) -> Settings:
    """Return the settings of one run."""
    strategy = ROWS[row][0]
    rate = (ADAM if strategy == "FedAdam" else PLAIN)[mode]
    return check_settings(
        {
            "run": {"name": "strategies", "rounds": rounds, "engine": "inline", "seed": seed},
            "data": {"name": "digits"},
            "devices": {"count": DEVICES + TEST, "test": TEST, **PARTITIONS[partition]},
            "model": {"name": "mlp", "width": 24},
            "dropping": {"policy": "top-k", "k": 12},
            "protocol": {"mode": mode, **MODES[mode]},
            "first-layer": {"strategy": strategy, "lr": rate, "args": ARGS.get(strategy, {})},
            "trunk": {"lr": 0.01},
        }
    )
