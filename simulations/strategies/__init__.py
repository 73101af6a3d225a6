"""What hostile devices do to the first layer under each strategy, and what poisoned labels do to the trunk.

    python -m simulations strategies

Small digits on 15 devices, each a node of its own, and 3 that test. Three of the 15 are hostile, and send in place of
what their node would: their gradient turned round (`flipped`), turned round and ten times as large (`scaled`), noise
ten times as large (`random`); or, with honest gradients, labels one class too high (`labels`). Devices hold records
alike (`iid`) or mostly of few classes (`skewed`, Dirichlet 0.1); training is pipelined or single-pass. In the row
`trimmed trunk` the trunk leaves out the fifth of each mini-batch with the largest loss. A run that stops because
something is not finite counts as a guess, 0.1. The tables have means and standard deviations over seeds.

Takes 8 minutes on two cores.
"""

from simulations.strategies.measuring import Options, study
from simulations.strategies.report import draw, tables

__all__ = ["Options", "draw", "study", "tables"]
