"""The ways of training that are compared, and what the rivals' settings were chosen from."""

from dataclasses import dataclass, field

from simulations.shared.settings import Changes


@dataclass(frozen=True)
class Row:
    """A way of training: ``fedsplit``, ``naive`` or ``FedAvg``; ``epochs`` are FedAvg's in each round."""

    kind: str
    changes: Changes = field(default_factory=dict)
    epochs: int = 0


ALL: Changes = {"dropping": {"policy": "none", "k": None}}
DONORS: Changes = {"public": {"devices": [0, 1, 2, 3], "epochs": 40}}
EPOCHS: Changes = {"run": {"rounds": 20}, "protocol": {"mode": "pipelined", "chunk": "epoch"}}
PIPELINED: Changes = {**EPOCHS, "first-layer": {"lr": 0.01}}
ONCE: Changes = {"run": {"rounds": 40}, "protocol": {"mode": "release-once", "chunk": "epoch"}}


def _rival(kind: str, rounds: int, lr: float, epochs: int = 0, public: Changes | None = None) -> Row:
    own: Changes = {"run": {"rounds": rounds}, "trunk": {"lr": lr}, "protocol": {"dtype": "float32"}}
    return Row(kind, {**own, **ALL, **(public or {})}, epochs)


ROWS = {
    "naive split": _rival("naive", 300, 0.005),
    "FedAvg, 1 epoch": _rival("FedAvg", 100, 0.01, 1),
    "FedAvg, 5 epochs": _rival("FedAvg", 30, 0.01, 5),
    "FedAvg, warmed up": _rival("FedAvg", 50, 0.01, 1, DONORS),
    "pipelined": Row("fedsplit", PIPELINED),
    "pipelined, all": Row("fedsplit", {**PIPELINED, **ALL}),
    "single-pass": Row("fedsplit"),
    "release-once": Row("fedsplit", {**ONCE, **DONORS}),
}
CHOICES = {
    "pipelined": ROWS["pipelined"],
    **{f"naive split, {lr:g}": _rival("naive", 300, lr) for lr in (0.002, 0.005, 0.01)},
    **{
        f"FedAvg, {epochs}, {lr:g}": _rival("FedAvg", rounds, lr, epochs)
        for epochs, rounds in ((1, 100), (5, 30), (20, 10))
        for lr in (0.002, 0.005, 0.01, 0.02)
    },
    "FedAvg, 1, 0.01, longer": _rival("FedAvg", 200, 0.01, 1),
    **{
        f"FedAvg, warmed up, {epochs}, {lr:g}": _rival("FedAvg", rounds, lr, epochs, DONORS)
        for epochs, rounds in ((1, 50), (5, 20))
        for lr in (0.002, 0.005, 0.01)
    },
}
"""What the rivals' local epochs and learning rates were chosen from."""
