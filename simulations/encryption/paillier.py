"""Paillier (phe), through the first layer of a network."""

from collections.abc import Sequence

import numpy as np

from simulations.encryption.stages import BOUND, LeftOut, Meter, Row, Stage, Vector, checked

BITS = 2048
LONGEST = 20.0  # seconds that may be taken of a record; of the outputs that are left the time is extrapolated
_FRACTION = 1 << 16  # integers are computed with: numbers of 16 binary places


class Paillier:
    """Both sides' arithmetic, with a new pair of keys; raises LeftOut without the package phe."""

    def __init__(self, bits: int) -> None:
        try:
            from phe import paillier
            from phe.util import invert, powmod
        except ImportError:
            raise LeftOut("it needs the package phe: pip install 'fedsplit[he]'") from None
        self._public, self._private = paillier.generate_paillier_keypair(n_length=bits)
        self._invert, self._powmod = invert, powmod
        self.size = bits // 4  # bytes of a ciphertext

    def sealed(self, x: Vector) -> list[bytes]:
        """Return a record, encrypted number by number; the device's."""
        whole = (int(v) % self._public.n for v in np.rint(x * _FRACTION))
        return [self._public.raw_encrypt(v).to_bytes(self.size, "big") for v in whole]

    def output(self, secret: Sequence[int], row: Sequence[int], bias: int) -> bytes:
        """Return an encrypted output of the first layer; the server's."""
        modulus = self._public.nsquare
        over, under = self._public.raw_encrypt(bias % self._public.n, r_value=1), 1
        for number, weight in zip(secret, row, strict=True):
            if weight >= 0:
                over = over * self._powmod(number, weight, modulus) % modulus
            else:  # inverted all at once
                under = under * self._powmod(number, -weight, modulus) % modulus
        return int(over * self._invert(under, modulus) % modulus).to_bytes(self.size, "big")

    def opened(self, answers: Sequence[bytes]) -> Vector:
        """Return decrypted outputs; the device's."""
        n = self._public.n
        found = [self._private.raw_decrypt(int.from_bytes(answer, "big")) for answer in answers]
        return np.array([v - n if v > n // 2 else v for v in found], dtype=np.float64) / _FRACTION**2


def paillier(layer: Stage, x: Vector, bits: int = BITS) -> tuple[str, Row, str]:
    """Return Paillier's name, row, and what there is to say about it, for the first layer and one flat record."""
    scheme, meter = Paillier(bits), Meter()
    uploads = meter.on("device", scheme.sealed, x)
    answers = _answers(scheme, layer, uploads, meter)
    sealing = meter.seconds["device"]
    outputs = meter.on("device", scheme.opened, answers)
    error = checked("Paillier", outputs, (layer.weight @ x + layer.bias)[: len(answers)])
    share = len(layer.bias) / len(answers)
    meter.seconds["device"] = sealing + share * (meter.seconds["device"] - sealing)
    meter.seconds["server"] *= share
    meter.up, meter.down = len(uploads) * scheme.size, len(layer.bias) * scheme.size
    said = f"Paillier: 1 record, {bits} bits, first layer; largest error of an output {error:.1e} (at most {BOUND:g})"
    if share == 1:
        return "Paillier, first layer", meter.row(), said
    part = f"{len(answers)} of {len(layer.bias)} outputs"
    said += f"; {part} were computed, and their times scaled up to all"
    return f"Paillier, first layer, from {part}", meter.row(), said


def _answers(scheme: Paillier, layer: Stage, uploads: Sequence[bytes], meter: Meter) -> list[bytes]:
    """Compute encrypted outputs, as many as there is time for."""
    whole = [[int(w) for w in row] for row in np.rint(layer.weight * _FRACTION)]
    biases = [int(b) for b in np.rint(layer.bias * _FRACTION**2)]
    secret = meter.on("server", lambda: [int.from_bytes(upload, "big") for upload in uploads])
    answers: list[bytes] = []
    for row, bias in zip(whole, biases, strict=True):
        answers.append(meter.on("server", scheme.output, secret, row, bias))
        if sum(meter.seconds.values()) > LONGEST:
            break
    return answers
