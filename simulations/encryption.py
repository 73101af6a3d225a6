"""What a prediction costs with encryption, and with what dropping leaves: on the same records and the same model.

    python simulations/encryption.py runs/mnist-private --repeats 200

Every scheme takes raw records of the run's test devices (their raw numbers, as bytes where they fit) to the server's
outputs in one process and one thread; times are medians over repetitions, all schemes in turns. "Device" is all until
the upload is there, "server" all from there to the outputs, which go down as float32. The times at the end add what
upload and answer take at a rate; no network is in between, and both sides are the same processor: no phone was
measured. The attack is `fedsplit audit`'s strongest on one release. With `pip install 'fedsplit[he]'` a few single
records go through homomorphic encryption as well, see `homomorphic.py`. Writes `simulations/results/encryption.json`.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from homomorphic import measured
from numpy.typing import NDArray

from fedsplit.audit.audit import audit
from fedsplit.audit.evidence import rehearsed
from fedsplit.audit.transcript import Subjects
from fedsplit.data import Scaling
from fedsplit.device.bundle import Bundle
from fedsplit.device.home import Home
from fedsplit.device.predictor import Predictor
from fedsplit.model.layer import FirstLayer
from fedsplit.plan.experiment import Experiment
from fedsplit.release.making import Chunk, forward
from fedsplit.release.streams import KEYED_ROUND
from fedsplit.runs.folder import RunFolder
from fedsplit.service.served import Served
from fedsplit.wire.exchange import weights_digest
from fedsplit.wire.query import Query
from fedsplit.wire.release import Release

RESULTS = Path(__file__).parent / "results" / "encryption.json"
RATES = (0.1, 1.0, 10.0, 100.0)  # Mbit/s
BATCHES = (1, 64)
OURS = "fedsplit"
_NONCE = 12
_OAEP = padding.OAEP(mgf=padding.MGF1(algorithm=SHA256()), algorithm=SHA256(), label=None)
Raw = NDArray[Any]


@dataclass(frozen=True)
class Scheme:
    """How a record reaches the outputs: ``device`` makes an upload of raw records, ``server`` outputs of an upload."""

    name: str
    device: Callable[[Raw], bytes]
    server: Callable[[bytes], NDArray[np.float32]]


class Whole:
    """The whole network on the server, from raw bytes."""

    def __init__(self, served: Served, like: Raw) -> None:
        self._layer: FirstLayer = served.bundle.layer
        self._weights = self._layer.initial_weights()
        self._trunk, self._scaling = served.trunk, served.bundle.scaling
        self._dtype, self._shape = like.dtype, like.shape[1:]

    def __call__(self, plain: bytes) -> NDArray[np.float32]:
        """Return the outputs."""
        x = self.scaled(np.frombuffer(plain, self._dtype).reshape(-1, *self._shape))
        with torch.no_grad():
            cut = self._layer.activation(self._layer.pre_activations(self._weights, x))
            found: NDArray[np.float32] = self._trunk(cut).numpy()
        return found

    def scaled(self, raw: Raw) -> NDArray[np.float32]:
        """Return what the network takes."""
        return self._scaling.apply(raw.astype(np.float64))


def schemes(served: Served, raw: Raw, home: Home) -> list[Scheme]:
    """Return all schemes for records like ``raw``."""
    whole, key = Whole(served, raw), AESGCM.generate_key(256)
    session = AESGCM(key)
    private = X25519PrivateKey.generate()
    rsa_private = rsa.generate_private_key(65537, 2048)
    rsa_public = rsa_private.public_key()
    public = private.public_key()

    def sealed(cipher: AESGCM, plain: bytes) -> bytes:
        nonce = os.urandom(_NONCE)
        return nonce + cipher.encrypt(nonce, plain, None)

    def opened(cipher: AESGCM, upload: bytes) -> bytes:
        return cipher.decrypt(upload[:_NONCE], upload[_NONCE:], None)

    def derived(shared: bytes) -> AESGCM:
        return AESGCM(HKDF(SHA256(), 32, None, b"prediction").derive(shared))

    def agreed(records: Raw) -> bytes:
        own = X25519PrivateKey.generate()
        return own.public_key().public_bytes_raw() + sealed(derived(own.exchange(public)), records.tobytes())

    def from_agreed(upload: bytes) -> bytes:
        return opened(derived(private.exchange(X25519PublicKey.from_public_bytes(upload[:32]))), upload[32:])

    def wrapped(records: Raw) -> bytes:
        fresh = AESGCM.generate_key(256)
        return rsa_public.encrypt(fresh, _OAEP) + sealed(AESGCM(fresh), records.tobytes())

    def from_wrapped(upload: bytes) -> bytes:
        return opened(AESGCM(rsa_private.decrypt(upload[:256], _OAEP)), upload[256:])

    def chunked(records: Raw) -> bytes:
        plain, most = records.tobytes(), 190  # bytes that OAEP with SHA-256 leaves of 2048 bits
        return b"".join(rsa_public.encrypt(plain[i : i + most], _OAEP) for i in range(0, len(plain), most))

    def from_chunked(upload: bytes) -> bytes:
        return b"".join(rsa_private.decrypt(upload[i : i + 256], _OAEP) for i in range(0, len(upload), 256))

    split, guarded = Split(served.bundle, home), Predictor(served.bundle, home, _nobody)

    def trunk(payload: bytes) -> NDArray[np.float32]:
        return served.outputs([served.read(payload)])

    return [
        Scheme("plaintext", lambda r: r.tobytes(), whole),
        Scheme("AES-256-GCM, session key", lambda r: sealed(session, r.tobytes()), lambda u: whole(opened(session, u))),
        Scheme("X25519 + AES-GCM, a key a message", agreed, lambda u: whole(from_agreed(u))),
        Scheme("RSA-2048-wrapped key + AES-GCM", wrapped, lambda u: whole(from_wrapped(u))),
        Scheme("RSA-2048 alone, in chunks", chunked, lambda u: whole(from_chunked(u))),
        Scheme(OURS, split, trunk),
        Scheme(f"{OURS} inside AES-GCM", lambda r: sealed(session, split(r)), lambda u: trunk(opened(session, u))),
        Scheme(f"{OURS} with guard and ledger", lambda r: guarded.release(r)[0].to_bytes(), trunk),
    ]


def _nobody(payload: bytes) -> NDArray[np.float32]:
    raise AssertionError("nobody is asked")


class Split:
    """The device's half without guard and ledger: scaling, first layer, dropping, packing."""

    def __init__(self, bundle: Bundle, home: Home) -> None:
        self._bundle, self._weights, self._secret = bundle, bundle.weights, home.device_secret(home.devices[0])
        self._layer = weights_digest(self._weights)

    def __call__(self, raw: Raw) -> bytes:
        """Return a packed query."""
        bundle, n = self._bundle, len(raw)
        x = bundle.scaling.apply(raw.astype(np.float64)).astype(np.float64)
        count, index = np.array([n]), np.arange(n)
        chunk = Chunk(np.array([0]), count, index, index[:, None], x, np.zeros(n))
        parts = (bundle.layer, bundle.dropping, lambda _: self._secret, chunk, self._weights, KEYED_ROUND, b"")
        kept = forward(*parts, want_slopes=False).kept
        release = Release.pack(kept, chunk.devices, count, np.zeros(n, np.int64), bundle.dtype, bundle.dropping.bits)
        return Query(self._layer, release).to_bytes()


def raw_records(scaling: Scaling, x: NDArray[np.float32]) -> Raw:
    """Return raw numbers: bytes if they are whole and fit, else float32."""
    raw = scaling.undo(x)
    whole = np.rint(raw)
    fits = np.abs(whole - raw).max() < 1e-3 and whole.min() >= 0 and whole.max() <= 255
    return whole.astype(np.uint8) if fits else raw.astype(np.float32)


def measure(found: list[Scheme], raw: Raw, repeats: int) -> dict[str, dict[str, Any]]:
    """Return medians over repetitions of each scheme's times and bytes, per record."""
    expected = found[0].server(found[0].device(raw))
    times: dict[str, list[tuple[float, float, int]]] = {scheme.name: [] for scheme in found}
    for number in range(repeats + 3):
        for scheme in found:
            began = time.perf_counter()
            upload = scheme.device(raw)
            there = time.perf_counter()
            outputs = scheme.server(upload)
            done = time.perf_counter()
            if OURS not in scheme.name and not np.allclose(outputs, expected, atol=1e-3):
                raise RuntimeError(f"{scheme.name}: another prediction")
            if number >= 3:
                times[scheme.name].append((there - began, done - there, len(upload)))
    return {
        name: {
            "device_us": 1e6 * median(t[0] for t in rows) / len(raw),
            "server_us": 1e6 * median(t[1] for t in rows) / len(raw),
            "bytes_up": median(t[2] for t in rows) / len(raw),
            "bytes_down": expected.nbytes / len(raw),
            "seen": "activations" if OURS in name else "the record",
        }
        for name, rows in times.items()
    }


def attacked(run: Path, served: Served, seed: int = 0) -> dict[str, float]:
    """Return what the strongest attack makes of releases (dB), and the best guess without any."""
    settings = RunFolder(run).trained()
    source = Experiment(settings).source
    subjects = Subjects.choose(source, Experiment(settings).public, settings.donors, 100, seed)
    bundle = served.bundle
    report = audit(rehearsed(bundle.layer, bundle.dropping, bundle.dtype, subjects, seed), seed=seed).report
    guess = max(scores["psnr"] for scores in report["baselines"].values())
    return {"strongest": report["strongest"]["psnr"], "without": guess}


def main() -> None:
    """Measure all schemes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    served = Served.of_run(options.run)
    settings = RunFolder(options.run).trained()
    source = Experiment(settings).source
    test = np.concatenate([source.device(device).test.x for device in source.test_devices])
    raw = raw_records(served.bundle.scaling, test)
    attack = attacked(options.run, served)
    written: dict[str, Any] = {"attack": attack, "batches": {}}
    print(f"strongest attack on a release {attack['strongest']:.1f} dB, without any {attack['without']:.1f} dB")
    with TemporaryDirectory() as folder:
        home = Home.create(Path(folder) / "home", [0])
        for batch in BATCHES:
            rows = measure(schemes(served, raw[:batch], home), raw[:batch], options.repeats // (1 + batch // 16))
            lines: list[str] = []
            if batch == 1:  # these encrypt each record by itself
                whole = Whole(served, raw)
                encrypted, lines = measured(served, whole.scaled(raw), whole(raw.tobytes()))
                rows |= encrypted
            written["batches"][batch] = rows
            show(batch, rows, attack)
            for line in lines:
                print(line)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(written, indent=2) + "\n")


def show(batch: int, rows: dict[str, dict[str, Any]], attack: dict[str, float]) -> None:
    """Print one table."""
    rates = " ".join(f"{f'{rate:g} Mbit/s':>12}" for rate in RATES)
    wide = max(map(len, rows))
    print(f"\n{batch} record(s) a request, per record:")
    print(f"{'':{wide}}   device us   server us bytes up    down {rates}  the server sees")
    for name, row in rows.items():
        took, travels = row["device_us"] + row["server_us"], row["bytes_up"] + row["bytes_down"]
        ends = " ".join(f"{(took + 8 * travels / rate) / 1000:9.2f} ms" for rate in RATES)
        seen = row["seen"] + (f" ({attack['strongest']:.1f} dB)" if OURS in name else "")
        sizes = f"{row['bytes_up']:8.0f} {row['bytes_down']:7.0f}"
        print(f"{name:{wide}} {row['device_us']:11.1f} {row['server_us']:11.1f} {sizes} {ends}  {seen}")


if __name__ == "__main__":
    main()
