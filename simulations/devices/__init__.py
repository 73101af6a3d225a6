"""What training would take on real devices: accuracy against simulated time, bytes and multiply-adds of a device.

    python -m simulations devices

The network and the devices of configs/wearables.toml on a virtual clock, for each preset of `[devices.profile]`. Every
row is tested again and again on all records of the same held-out devices, outside the training, which takes no
simulated time and no bytes:

naive split         a message for every mini-batch and half-step, weights in each, nothing dropped (shared/naive.py)
FedAvg, E epochs    Flower's FedAvg of the whole network, E local epochs in a round
FedAvg, warmed up   the same with one epoch, after training on the records of the donors of release-once
pipelined           one exchange per round with a whole epoch of records, 100 of 800 outputs kept
pipelined, all      the same with nothing dropped
single-pass         every record is released once, 100 of 800 outputs kept
release-once        the same in one exchange, over a first layer that the records of four donors have taught

An exchange ends with the last answer, or at a deadline: each row's own, which 95 % of exchanges would make if many
devices of the preset had these records. Who is away, late or lost is left out of that round or step in all rows. What
the rivals' settings were chosen from is the study `rivals`.
"""

from simulations.devices.measuring import Options, study
from simulations.devices.report import draw, tables

__all__ = ["Options", "draw", "study", "tables"]
