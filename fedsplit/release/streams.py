"""The random streams of a device: masks, noise and orders, from a secret that the server does not have.

AES-256 on explicit counter blocks (counter mode, laid out so that one call serves a whole chunk): block = (purpose,
round, record, counter), four little-endian uint32. Any runtime with AES can reproduce them.
"""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

KEYED_ROUND = 0  # training rounds count from 1; keyed masks (all of prediction) ignore the round
DROPPING, ORDER, NOISE = 0, 1, 2  # purposes: no two uses of a secret share a counter block


def simulation_secret(seed: int, device_id: int) -> bytes:
    """Return a simulated device's 32-byte secret: HKDF-SHA256 of the run's seed (RFC 5869)."""
    info = b"fedsplit simulation secret %d" % device_id
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(seed.to_bytes(8, "little"))


def keystream(
    secret: bytes, purpose: int, round_number: int, records: NDArray[np.int64], width: int
) -> NDArray[np.uint8]:
    """Return ``(records, width)`` pseudo-random bytes, one independent stream per record.

    Parameters
    ----------
    secret : bytes
        32 bytes: the key of AES-256.
    purpose : int
        What the bytes are for, one of this module's constants: each purpose has its own streams.
    round_number : int
    records : int64 array (records,)
        The records' indices on their device.
    width : int
        Bytes per record.
    """
    blocks = -(-width // 16)
    counters = np.empty((len(records), blocks, 4), dtype="<u4")
    counters[..., 0] = purpose
    counters[..., 1] = round_number
    counters[..., 2] = records[:, None]
    counters[..., 3] = np.arange(blocks)
    # ECB of distinct counters is counter mode's key stream; nothing else is ever encrypted with this key.
    cipher = Cipher(algorithms.AES256(secret), modes.ECB()).encryptor()
    stream = np.frombuffer(cipher.update(counters.tobytes()), dtype=np.uint8)
    return stream.reshape(len(records), blocks * 16)[:, :width]


def record_order(secret: bytes, pass_number: int, count: int) -> NDArray[np.int64]:
    """Return the device's own random order of its records in one pass over them.

    Parameters
    ----------
    secret : bytes
        The device's, 32 bytes.
    pass_number : int
    count : int
        Records on the device.

    Returns
    -------
    int64 array (count,)
        A permutation of the records' indices.
    """
    words = keystream(secret, ORDER, pass_number, np.arange(count), 8)
    return np.argsort(np.ascontiguousarray(words).view("<u8").ravel(), kind="stable")
