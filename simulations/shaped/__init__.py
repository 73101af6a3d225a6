"""Whether the virtual clock is right: the same runs on real nodes behind slow links, and simulated with their figures.

    python -m simulations shaped

Each node reaches the server over loopback, TLS and keys included, through a proxy of its own that is as slow as the
node's figures say (`proxy.py`); the simulation gets these figures as a trace. Compared is the time of a round without
the trunk's, without the first and the last: first every node alone, then all four together. Then the round trips of an
exchange are counted: by how many of them it is longer if each takes longer.
"""

from simulations.shaped.comparison import Options, study
from simulations.shaped.report import tables

__all__ = ["Options", "study", "tables"]
