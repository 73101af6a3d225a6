"""What faults do to a real deployment on this machine: every fault that docs/deployment.md lists is injected.

    python -m simulations faults

Into the wearables run with four warm nodes, which are those of the study `deployment`. A node whose link is cut, and a
disk that is full, need root; clocks that are wrong need Debian's package faketime.
"""

from simulations.faults.measuring import Options, study
from simulations.faults.report import tables

__all__ = ["Options", "study", "tables"]
