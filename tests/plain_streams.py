"""Policies on outputs, and the streams that they draw from, plainly."""

import struct

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedsplit.release.policy import Policy
from fedsplit.release.streams import simulation_secret

SECRET, OTHER = simulation_secret(1, 2), simulation_secret(1, 3)


def outputs(records: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(records, width)).astype(np.float32)


def mask(dropping: Policy, x: np.ndarray, secret: bytes = SECRET, round_number: int = 1) -> np.ndarray:
    found = dropping.mask(x, secret, round_number, np.arange(len(x)))
    assert found.dtype == bool
    assert found.shape == x.shape
    return found


def reference_keystream(secret: bytes, purpose: int, round_number: int, record: int, width: int) -> bytes:
    """One record's bytes, block by block."""
    stream = b""
    for counter in range(-(-width // 16)):
        block = struct.pack("<4I", purpose, round_number, record, counter)
        encryptor = Cipher(algorithms.AES(secret), modes.CTR(block)).encryptor()
        stream += encryptor.update(bytes(16)) + encryptor.finalize()
    return stream[:width]
