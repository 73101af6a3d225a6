"""What a prediction costs with encryption, and with what dropping leaves: on the same records and the same model.

    python -m simulations encryption runs/mnist-private --repeats 200

Every scheme takes raw records of the run's test devices (their raw numbers, as bytes where they fit) to the server's
outputs in one process and one thread; times are medians over repetitions, all schemes in turns. "Device" is all until
the upload is there, "server" all from there to the outputs, which go down as float32. The times at the end add what
upload and answer take at a rate; no network is in between, and both sides are the same processor: no phone was
measured. The attack is `fedsplit audit`'s strongest on one release. With `pip install 'fedsplit[he]'` a few single
records go through homomorphic encryption as well, see `homomorphic.py`. Without a run one of small digits is trained.
"""

from simulations.encryption.measuring import Options, study
from simulations.encryption.report import tables

__all__ = ["Options", "study", "tables"]
