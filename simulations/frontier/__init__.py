"""Accuracy against the strongest attack, for every policy family and two published defences.

    python -m simulations frontier configs/mnist-private.toml --seeds 3

The network learns from public and private records together, dropping as the policy does, and every private record is
released once under the final weights: what one release gives away. The attacker knows the public records. One half of
the targets chooses the recommended policy, the other half is reported.
"""

from simulations.frontier.measuring import Options, study
from simulations.frontier.report import draw, tables

__all__ = ["Options", "draw", "study", "tables"]
