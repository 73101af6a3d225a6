"""Predictions of encrypted records, for the table of `encryption.py`: CKKS (tenseal's SEAL) and Paillier (phe).

The server computes a linear layer on what it cannot read; the device decrypts, applies the activation, and encrypts
again for the next layer. So outputs are the whole network's but for rounding, which is checked; each layer is a round
trip. CKKS goes through all layers, Paillier through the first alone. The server gets ciphertexts and nothing else. The
device, though, gets all layers' pre-activations, and from enough of them the trunk's weights.

Both take models of which all layers are Linear, in the trunk with ReLU between them. It needs `pip install
'fedsplit[he]'`.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedsplit.model.layer import FirstLayer
from fedsplit.service.served import Served

CKKS_RECORDS = 3
PAILLIER_BITS = 2048
LONGEST = 20.0  # seconds that Paillier may take of a record; of the outputs that are left the time is extrapolated
BOUND = 1e-3  # largest error of an output that is taken for rounding
# Bits of the primes by degree, half of which are the slots: enough for one product, at 128 bits of security. The second
# is the scale's; what the first has more is for numbers before the point, up to 128 with the least degree.
DEGREES = {4096: [39, 31, 39], 8192: [60, 40, 60], 16384: [60, 40, 60]}
_FRACTION = 1 << 16  # Paillier computes with integers: numbers of 16 binary places
Vector = NDArray[np.float64]
Row = dict[str, Any]
T = TypeVar("T")
SEEN = "ciphertexts"


class LeftOut(Exception):
    """A scheme cannot be measured; the text says why."""


@dataclass(frozen=True)
class Stage:
    """A linear layer, of the server, and what the device applies to its outputs."""

    weight: Vector
    bias: Vector
    activation: nn.Module

    def activated(self, outputs: Vector) -> Vector:
        """Return the activation of outputs."""
        return np.asarray(self.activation(torch.from_numpy(outputs)).numpy())


def stages(first: FirstLayer, trunk: nn.Module) -> list[Stage]:
    """Return a network's linear layers, each with what follows it; raises LeftOut if there is anything else in it."""
    if not isinstance(first.layer, nn.Linear) or len(first.cut_shape) > 1:
        raise LeftOut(f"the first layer is {first.layer}, which is not one product with the flat record")
    found: list[tuple[nn.Linear, list[nn.Module]]] = [(first.layer, [first.activation])]
    for module in trunk if isinstance(trunk, nn.Sequential) else [trunk]:
        if isinstance(module, nn.Linear):
            found.append((module, []))
        elif isinstance(module, nn.ReLU):
            found[-1][1].append(nn.ReLU())  # in place, it would change what it is given
        else:
            raise LeftOut(f"the trunk has {type(module).__name__}, and these protocols know Linear and ReLU alone")
    return [Stage(*_parameters(layer), nn.Sequential(*after)) for layer, after in found]


def _parameters(layer: nn.Linear) -> tuple[Vector, Vector]:
    weight = layer.weight.detach().numpy().astype(np.float64)
    bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().numpy().astype(np.float64)
    return weight, bias


class Meter:
    """What both sides spend on a record."""

    def __init__(self) -> None:
        self.seconds = {"device": 0.0, "server": 0.0}
        self.up = self.down = 0

    def on(self, side: str, work: Callable[..., T], *arguments: Any) -> T:
        """Do some work of one side."""
        began = time.perf_counter()
        found = work(*arguments)
        self.seconds[side] += time.perf_counter() - began
        return found

    def row(self) -> Row:
        """Return it as a row of the table."""
        spent = {f"{side}_us": 1e6 * seconds for side, seconds in self.seconds.items()}
        return {**spent, "bytes_up": self.up, "bytes_down": self.down}


# ------------------------------------------------------------------------------------------------------------- CKKS


class Product:
    """How a matrix times an encrypted vector becomes products slot by slot, and rotations.

    The diagonals of the matrix, as many as it has rows, as in Gazelle (arXiv 1801.05507), in baby and giant steps. The
    vector fills the slots over and over, and so does the product: no slot holds anything else.

    Attributes
    ----------
    rows, length : int
        Of the matrix with zeros around it, both powers of two; the vector repeats itself after ``length`` slots.
    baby : int
        Rotations of the vector by 0, 1, ... that the diagonals share.
    diagonals : array (rows, length)
    """

    def __init__(self, weight: Vector) -> None:
        outputs, inputs = weight.shape
        self.rows = _power(outputs)
        self.length = max(self.rows, _power(inputs))
        self.baby = 1 << (self.rows.bit_length() // 2)
        wide = np.zeros((self.rows, self.length))
        wide[:outputs, :inputs] = weight
        slots, number = np.arange(self.length), np.arange(self.rows)[:, None]
        # rotated back by what the giant step rotates it
        place = slots - number // self.baby * self.baby
        self.diagonals = wide[place % self.rows, (place + number) % self.length]

    @property
    def folds(self) -> list[int]:
        """The rotations by which the sums over parts of a row come together."""
        return [self.rows << i for i in range((self.length // self.rows).bit_length() - 1)]

    @property
    def steps(self) -> set[int]:
        """All rotations there are."""
        return {1, self.baby, *self.folds}

    def run(
        self, x: T, times: Callable[[T, int], T | None], add: Callable[[T, T], T], turn: Callable[[T, int], T]
    ) -> T:
        """Return the product, of ``times`` a diagonal (None: that is zero), sums, and rotations to the left."""
        turned = [x]
        while len(turned) < min(self.baby, self.rows):
            turned.append(turn(turned[-1], 1))
        total: T | None = None
        for giant in reversed(range(0, self.rows, self.baby)):
            total = None if total is None else turn(total, self.baby)
            for number, vector in enumerate(turned):
                part = times(vector, giant + number)
                if part is not None:
                    total = part if total is None else add(total, part)
        assert total is not None
        for step in self.folds:
            total = add(total, turn(total, step))
        return total


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


class Seal:
    """SEAL's parameters for some products, and its objects as bytes, which its Python binding writes to files only."""

    def __init__(self, products: Sequence[Product], folder: Path) -> None:
        try:
            import tenseal.sealapi as api
        except ImportError:
            raise LeftOut("it needs the package tenseal: pip install 'fedsplit[he]'") from None
        self.api, self._file = api, str(folder / "object")
        longest = max(product.length for product in products)
        self.degree = next((degree for degree in DEGREES if degree // 2 >= longest), 0)
        if not self.degree:
            raise LeftOut(f"a layer takes {longest} numbers, which no ciphertext holds")
        parameters = api.EncryptionParameters(api.SCHEME_TYPE.CKKS)
        parameters.set_poly_modulus_degree(self.degree)
        parameters.set_coeff_modulus(api.CoeffModulus.Create(self.degree, DEGREES[self.degree]))
        self.context = api.SEALContext(parameters, True, api.SEC_LEVEL_TYPE.TC128)
        self.encoder = api.CKKSEncoder(self.context)
        self.scale = 2.0 ** DEGREES[self.degree][1]

    def encoded(self, numbers: Vector, like: Any = None) -> Any:
        """Return a plaintext with numbers over and over in its slots, at the level and scale of a ciphertext."""
        plain, slots = self.api.Plaintext(), np.tile(numbers, self.degree // 2 // len(numbers)).tolist()
        if like is None:
            self.encoder.encode(slots, self.scale, plain)
        else:
            self.encoder.encode(slots, like.parms_id(), like.scale, plain)
        return plain

    def to_bytes(self, thing: Any) -> bytes:
        """Return a ciphertext or keys as they travel."""
        thing.save(self._file)
        return Path(self._file).read_bytes()

    def from_bytes(self, thing: Any, content: bytes) -> Any:
        """Fill an empty ciphertext or empty keys."""
        Path(self._file).write_bytes(content)
        thing.load(self.context, self._file)
        return thing


class CkksDevice:
    """Has the secret key."""

    def __init__(self, seal: Seal, products: Sequence[Product]) -> None:
        self._seal, self._products = seal, products
        keys = seal.api.KeyGenerator(seal.context)
        self._encryptor = seal.api.Encryptor(seal.context, keys.secret_key())
        self._decryptor = seal.api.Decryptor(seal.context, keys.secret_key())
        rotations = seal.api.GaloisKeys()
        elements = {pow(3, step, 2 * seal.degree) for product in products for step in product.steps}
        keys.create_galois_keys(sorted(elements), rotations)
        self.rotations = seal.to_bytes(rotations)  # what the server is given, once

    def sealed(self, number: int, x: Vector) -> bytes:
        """Return a layer's encrypted inputs."""
        numbers, secret = np.zeros(self._products[number].length), self._seal.api.Ciphertext()
        numbers[: len(x)] = x
        self._encryptor.encrypt_symmetric(self._seal.encoded(numbers), secret)
        return self._seal.to_bytes(secret)

    def opened(self, answer: bytes, outputs: int) -> Vector:
        """Return a layer's decrypted outputs."""
        plain = self._seal.api.Plaintext()
        self._decryptor.decrypt(self._seal.from_bytes(self._seal.api.Ciphertext(), answer), plain)
        return np.array(self._seal.encoder.decode_double(plain)[:outputs])


class CkksServer:
    """Has the weights, as plaintexts that are made once, and the keys to rotate ciphertexts."""

    def __init__(self, seal: Seal, products: Sequence[Product], layers: Sequence[Stage], rotations: bytes) -> None:
        self._seal, self._products, self._layers = seal, products, layers
        self._evaluator = seal.api.Evaluator(seal.context)
        self._rotations = seal.from_bytes(seal.api.GaloisKeys(), rotations)
        # SEAL refuses products with zero, whose outcome anybody could read
        self._plain = [[seal.encoded(d) if d.any() else None for d in product.diagonals] for product in products]

    def outputs(self, number: int, upload: bytes) -> bytes:
        """Return a layer's outputs, encrypted as its inputs are."""
        seal, product, plain = self._seal, self._products[number], self._plain[number]

        def times(x: Any, diagonal: int) -> Any:
            if plain[diagonal] is None:
                return None
            found = seal.api.Ciphertext()
            self._evaluator.multiply_plain(x, plain[diagonal], found)
            return found

        def add(x: Any, y: Any) -> Any:
            found = seal.api.Ciphertext()
            self._evaluator.add(x, y, found)
            return found

        def turn(x: Any, step: int) -> Any:
            found = seal.api.Ciphertext()
            self._evaluator.rotate_vector(x, step, self._rotations, found)
            return found

        total = product.run(seal.from_bytes(seal.api.Ciphertext(), upload), times, add, turn)
        self._evaluator.rescale_to_next_inplace(total)
        bias = np.zeros(product.rows)
        bias[: len(self._layers[number].bias)] = self._layers[number].bias
        self._evaluator.add_plain_inplace(total, seal.encoded(bias, total))
        return seal.to_bytes(total)


def ckks(layers: Sequence[Stage], records: Vector, expected: Vector) -> tuple[str, Row, str]:
    """Return CKKS's name, row, and what there is to say about it, for flat records and the outputs they must have."""
    products = [Product(layer.weight) for layer in layers]
    spent, errors = [], []
    with TemporaryDirectory() as folder:
        seal = Seal(products, Path(folder))
        device = CkksDevice(seal, products)
        server = CkksServer(seal, products, layers, device.rotations)
        for x, right in zip(records, expected, strict=True):
            meter = Meter()
            for number, layer in enumerate(layers):
                upload = meter.on("device", device.sealed, number, x)
                answer = meter.on("server", server.outputs, number, upload)
                opened = meter.on("device", device.opened, answer, len(layer.bias))
                x = meter.on("device", layer.activated, opened)
                meter.up, meter.down = meter.up + len(upload), meter.down + len(answer)
            spent.append(meter.row())
            errors.append(_checked("CKKS", x, right))
    row = {key: median(each[key] for each in spent) for key in spent[0]}
    said = (
        f"CKKS: {len(records)} records, {len(layers)} round trips each, degree {seal.degree}; largest error of an "
        f"output {max(errors):.1e} (at most {BOUND:g}); the device's keys, {len(device.rotations):,} bytes, go up once "
        "and are not counted; the device gets every layer's pre-activations"
    )
    return "CKKS, activations on the device", row, said


# --------------------------------------------------------------------------------------------------------- Paillier


def paillier(layer: Stage, x: Vector, bits: int = PAILLIER_BITS) -> tuple[str, Row, str]:
    """Return Paillier's name, row, and what there is to say about it, for the first layer and one flat record."""
    try:
        from phe import paillier as scheme
        from phe.util import invert, powmod
    except ImportError:
        raise LeftOut("it needs the package phe: pip install 'fedsplit[he]'") from None
    public, private = scheme.generate_paillier_keypair(n_length=bits)
    modulus, size = public.nsquare, bits // 4
    whole = [[int(w) for w in row] for row in np.rint(layer.weight * _FRACTION)]
    biases = [int(b) for b in np.rint(layer.bias * _FRACTION**2)]

    def sealed() -> list[bytes]:
        return [public.raw_encrypt(int(v) % public.n).to_bytes(size, "big") for v in np.rint(x * _FRACTION)]

    def output(secret: Sequence[int], row: Sequence[int], bias: int) -> bytes:
        over, under = public.raw_encrypt(bias % public.n, r_value=1), 1
        for number, weight in zip(secret, row, strict=True):
            if weight >= 0:
                over = over * powmod(number, weight, modulus) % modulus
            else:  # inverted all at once
                under = under * powmod(number, -weight, modulus) % modulus
        return int(over * invert(under, modulus) % modulus).to_bytes(size, "big")

    def opened(answers: Sequence[bytes]) -> Vector:
        found = [private.raw_decrypt(int.from_bytes(answer, "big")) for answer in answers]
        return np.array([v - public.n if v > public.n // 2 else v for v in found], dtype=np.float64) / _FRACTION**2

    meter, answers = Meter(), []
    uploads = meter.on("device", sealed)
    secret = meter.on("server", lambda: [int.from_bytes(upload, "big") for upload in uploads])
    for row, bias in zip(whole, biases, strict=True):
        answers.append(meter.on("server", output, secret, row, bias))
        if sum(meter.seconds.values()) > LONGEST:
            break
    device = meter.seconds["device"]
    outputs = meter.on("device", opened, answers)
    error = _checked("Paillier", outputs, (layer.weight @ x + layer.bias)[: len(answers)])
    share = len(biases) / len(answers)
    meter.seconds["device"] = device + share * (meter.seconds["device"] - device)
    meter.seconds["server"] *= share
    meter.up, meter.down = len(uploads) * size, len(biases) * size
    part = "" if share == 1 else f", from {len(answers)} of {len(biases)} outputs"
    said = f"Paillier: 1 record, {bits} bits, first layer; largest error of an output {error:.1e} (at most {BOUND:g})"
    if part:
        said += f"; {len(answers)} of {len(biases)} outputs were computed, and their times scaled up to all"
    return f"Paillier, first layer{part}", meter.row(), said


def _checked(scheme: str, found: Vector, expected: Vector) -> float:
    error = float(np.abs(found - expected).max())
    if not error <= BOUND:
        raise RuntimeError(f"{scheme}: another prediction, by {error:g}")
    return error


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
