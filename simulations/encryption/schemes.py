"""How a record reaches the server's outputs: in the clear, encrypted in five ways, and as fedsplit's release."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedsplit.device.home import Home
from fedsplit.device.predictor import Predictor
from fedsplit.service.served import Served
from simulations.encryption.halves import Raw, Split, Whole

OURS = "fedsplit"
_NONCE = 12
_OAEP = padding.OAEP(mgf=padding.MGF1(algorithm=SHA256()), algorithm=SHA256(), label=None)
_RSA = 256  # bytes of a message
_OAEP_MOST = 190  # bytes that OAEP with SHA-256 leaves of them
Outputs = NDArray[np.float32]
Seal = Callable[[bytes], bytes]
Spent = tuple[float, float, int]
"""Seconds of device and server, and bytes of the upload."""


@dataclass(frozen=True)
class Scheme:
    """How a record reaches the outputs: ``device`` makes an upload of raw records, ``server`` outputs of an upload."""

    name: str
    device: Callable[[Raw], bytes]
    server: Callable[[bytes], Outputs]

    def timed(self, raw: Raw) -> tuple[Outputs, Spent]:
        """Return outputs, and what they took."""
        began = time.perf_counter()
        upload = self.device(raw)
        there = time.perf_counter()
        outputs = self.server(upload)
        return outputs, (there - began, time.perf_counter() - there, len(upload))


def sealed(cipher: AESGCM, plain: bytes) -> bytes:
    """Encrypt a message, with a nonce before it."""
    nonce = os.urandom(_NONCE)
    return nonce + cipher.encrypt(nonce, plain, None)


def opened(cipher: AESGCM, upload: bytes) -> bytes:
    """Undo :func:`sealed`."""
    return cipher.decrypt(upload[:_NONCE], upload[_NONCE:], None)


def schemes(served: Served, raw: Raw, home: Home) -> list[Scheme]:
    """Return all schemes for records like ``raw``."""
    whole = Whole(served, raw)
    hidden = [_hidden(name, *cipher, whole) for name, cipher in _ciphers().items()]
    return [Scheme("plaintext", lambda records: records.tobytes(), whole), *hidden, *_ours(served, raw, home)]


def _hidden(name: str, seal: Seal, undo: Seal, whole: Whole) -> Scheme:
    return Scheme(name, lambda records: seal(records.tobytes()), lambda upload: whole(undo(upload)))


def _ciphers() -> dict[str, tuple[Seal, Seal]]:
    """Return what encrypts a record, and what undoes it, by name."""
    session = AESGCM(AESGCM.generate_key(256))
    return {
        "AES-256-GCM, session key": (lambda plain: sealed(session, plain), lambda upload: opened(session, upload)),
        "X25519 + AES-GCM, a key a message": _agreed(),
        "RSA-2048-wrapped key + AES-GCM": _wrapped(),
        "RSA-2048 alone, in chunks": _chunked(),
    }


def _agreed() -> tuple[Seal, Seal]:
    private = X25519PrivateKey.generate()
    public = private.public_key()

    def derived(shared: bytes) -> AESGCM:
        return AESGCM(HKDF(SHA256(), 32, None, b"prediction").derive(shared))

    def seal(plain: bytes) -> bytes:
        own = X25519PrivateKey.generate()
        return own.public_key().public_bytes_raw() + sealed(derived(own.exchange(public)), plain)

    def undo(upload: bytes) -> bytes:
        return opened(derived(private.exchange(X25519PublicKey.from_public_bytes(upload[:32]))), upload[32:])

    return seal, undo


def _wrapped() -> tuple[Seal, Seal]:
    private = rsa.generate_private_key(65537, 2048)
    public = private.public_key()

    def seal(plain: bytes) -> bytes:
        fresh = AESGCM.generate_key(256)
        return public.encrypt(fresh, _OAEP) + sealed(AESGCM(fresh), plain)

    def undo(upload: bytes) -> bytes:
        return opened(AESGCM(private.decrypt(upload[:_RSA], _OAEP)), upload[_RSA:])

    return seal, undo


def _chunked() -> tuple[Seal, Seal]:
    private = rsa.generate_private_key(65537, 2048)
    public = private.public_key()

    def seal(plain: bytes) -> bytes:
        return b"".join(public.encrypt(plain[i : i + _OAEP_MOST], _OAEP) for i in range(0, len(plain), _OAEP_MOST))

    def undo(upload: bytes) -> bytes:
        return b"".join(private.decrypt(upload[i : i + _RSA], _OAEP) for i in range(0, len(upload), _RSA))

    return seal, undo


def _ours(served: Served, raw: Raw, home: Home) -> list[Scheme]:
    split, guarded = Split(served.bundle, home), Predictor(served.bundle, home, _nobody)
    session = AESGCM(AESGCM.generate_key(256))

    def trunk(payload: bytes) -> Outputs:
        return served.outputs([served.read(payload)])

    found = [
        Scheme(OURS, split, trunk),
        Scheme(f"{OURS} inside AES-GCM", lambda r: sealed(session, split(r)), lambda u: trunk(opened(session, u))),
    ]
    if not guarded.release(raw)[1].any():  # limits that refuse a record leave nothing to measure
        found.append(Scheme(f"{OURS} with guard and ledger", lambda r: guarded.release(r)[0].to_bytes(), trunk))
    return found


def _nobody(payload: bytes) -> Outputs:
    raise AssertionError("nobody is asked")
