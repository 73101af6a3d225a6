"""A prediction service under load, beside the same service that gets encrypted records and runs the whole network.

    python -m simulations serving runs/mnist-private --seconds 30 --clients 64

Both services are processes of their own, with TLS and a token, and the same code: one gets what dropping left and runs
the trunk, the other opens an AES-256-GCM message with a session key and runs the whole network. Clients with one record
a request keep both saturated in turns, first the one first, then the other, in a third process. Measured are errors,
latencies, records a second, CPU time of the service per record and its memory. Without a run one of small digits is
trained.
"""

from simulations.serving.measuring import Options, study
from simulations.serving.report import tables

__all__ = ["Options", "study", "tables"]
