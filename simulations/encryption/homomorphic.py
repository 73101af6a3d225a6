"""Predictions of encrypted records: CKKS (tenseal's SEAL) and Paillier (phe).

The server computes a linear layer on what it cannot read; the device decrypts, applies the activation, and encrypts
again for the next layer. So outputs are the whole network's but for rounding, which is checked; each layer is a round
trip. CKKS goes through all layers, Paillier through the first alone. The server gets ciphertexts and nothing else. The
device, though, gets all layers' pre-activations, and from enough of them the trunk's weights.

Both take models of which all layers are Linear, in the trunk with ReLU between them. It needs `pip install
'fedsplit[he]'`.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.service.served import Served
from simulations.encryption.ckks import ckks
from simulations.encryption.paillier import paillier
from simulations.encryption.stages import LeftOut, Row, Stage, stages

CKKS_RECORDS = 3
SEEN = "ciphertexts"


def measured(served: Served, records: NDArray[np.float32], expected: Any) -> tuple[dict[str, Row], list[str]]:
    """Return the rows, and a line about each scheme.

    Parameters
    ----------
    served : Served
    records : float32 array (records, *input_shape)
        Scaled; not all of them are taken.
    expected : array (records, outputs)
        The whole network's outputs.
    """
    rows: dict[str, Row] = {}
    lines = []
    flat = records[:CKKS_RECORDS].astype(np.float64).reshape(-1, math.prod(records.shape[1:]))
    schemes: dict[str, Callable[[list[Stage]], tuple[str, Row, str]]] = {
        "CKKS": lambda layers: ckks(layers, flat, expected[: len(flat)]),
        "Paillier": lambda layers: paillier(layers[0], flat[0]),
    }
    for scheme, measure in schemes.items():
        try:
            name, row, said = measure(stages(served.bundle.layer, served.trunk))
        except LeftOut as why:
            lines.append(f"{scheme} is left out: {why}")
        else:
            rows[name] = {**row, "seen": SEEN}
            lines.append(said)
    return rows, lines
