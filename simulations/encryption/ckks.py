"""CKKS (tenseal's SEAL), through all layers of a network."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np

from simulations.encryption.stages import BOUND, LeftOut, Meter, Row, Stage, Vector, checked

# Bits of the primes by degree, half of which are the slots: enough for one product, at 128 bits of security. The second
# is the scale's; what the first has more is for numbers before the point, up to 128 with the least degree.
DEGREES = {4096: [39, 31, 39], 8192: [60, 40, 60], 16384: [60, 40, 60]}
T = TypeVar("T")


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
            errors.append(checked("CKKS", x, right))
    row = {key: median(each[key] for each in spent) for key in spent[0]}
    said = (
        f"CKKS: {len(records)} records, {len(layers)} round trips each, degree {seal.degree}; largest error of an "
        f"output {max(errors):.1e} (at most {BOUND:g}); the device's keys, {len(device.rotations):,} bytes, go up once "
        "and are not counted; the device gets every layer's pre-activations"
    )
    return "CKKS, activations on the device", row, said
