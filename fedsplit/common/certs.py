"""Keys and certificates of a deployment: a private authority, the server's certificate, a node's key pair."""

import os
import ssl
from base64 import b64decode, b64encode
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import load_pem_x509_certificates
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsplit.common.errors import ConfigError
from fedsplit.common.files import writing

CA, CERTIFICATE, KEY = "ca.crt", "server.crt", "server.key"
DAYS = 365  # that certificates are good for, if nobody says otherwise
_MOST_DAYS = 36500
_CLOCKS = timedelta(hours=1)  # by which a node's clock may be behind the server's when it is new


def make_certificates(folder: Path, hosts: Sequence[str], days: int = DAYS) -> None:
    """Write an authority and a server certificate that it has signed: ``ca.crt``, ``server.crt``, ``server.key``.

    The authority's own key is thrown away: it signs this one certificate, so nobody can steal it to sign another.

    Parameters
    ----------
    folder : Path
        Made if it is missing; must not hold any of the files.
    hosts : sequence of str
        Names and addresses under which nodes reach the server (subject alternative names).
    days : int
        How long both are good for.

    Raises
    ------
    ConfigError
        If a file is there already or cannot be written, or a host is no name or address.
    """
    names = [_alternative(host) for host in hosts]
    if not names:
        raise ConfigError("certs needs at least one --host: a name or address under which nodes reach the server")
    if not 1 <= days <= _MOST_DAYS:
        raise ConfigError(f"days must be in 1..{_MOST_DAYS}, got {days}")
    if there := [name for name in (CA, CERTIFICATE, KEY) if (folder / name).exists()]:
        raise ConfigError(f"{folder / there[0]} exists: certificates are not replaced, choose another folder")
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedsplit authority")])
    usage = {name: False for name in _KEY_USAGES}
    ca = (
        _builder(issuer, issuer, authority.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**{**usage, "key_cert_sign": True, "crl_sign": True}), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA384())
    )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    certificate = (
        _builder(subject, issuer, server.public_key(), days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**{**usage, "digital_signature": True}), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(server.public_key()), critical=False)
        .sign(authority, hashes.SHA384())
    )
    with writing(f"folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(folder / KEY, _private_bytes(server, serialization.PrivateFormat.PKCS8))
        (folder / CERTIFICATE).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (folder / CA).write_bytes(ca.public_bytes(serialization.Encoding.PEM))


_KEY_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS)
        .not_valid_after(now + timedelta(days=days))
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        address: IPv4Address | IPv6Address = ip_address(host)
        return x509.IPAddress(address)
    except ValueError:
        pass
    labels = host.removeprefix("*.").split(".")
    if not all(label and label.replace("-", "").isalnum() and label.isascii() for label in labels):
        raise ConfigError(f"--host must be a host's name or address without a port, got {host!r}")
    return x509.DNSName(host)


def read_authority(path: Path) -> bytes:
    """Return the authority's certificate; raises ConfigError if it cannot be read or is none."""
    try:
        found = path.read_bytes()
        load_pem_x509_certificates(found)  # refuses a file without any, which ssl would take for the system's
        ssl.create_default_context(cadata=found.decode("ascii"))
    except OSError as error:
        raise ConfigError(f"authority {path} cannot be read: {error.strerror or 'not a certificate'}") from None
    except ValueError:
        raise ConfigError(f"authority {path} is not a certificate in PEM") from None
    return found


def make_key_pair(path: Path, comment: str) -> None:
    """Write a node's ECDSA P-384 key pair in OpenSSH's formats, the private one to ``path`` and readable by its owner.

    ``path`` with ``.pub`` behind it is the public key, which the server's operator registers.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    write_private(path, _private_bytes(key, serialization.PrivateFormat.OpenSSH))
    path.with_suffix(".pub").write_text(f"{openssh_line(key.public_key())} {comment}\n", encoding="utf-8")


def read_public_key(public_key: bytes) -> ec.EllipticCurvePublicKey:
    """Return a node's public key.

    Parameters
    ----------
    public_key : bytes
        An OpenSSH line or PEM.

    Raises
    ------
    ConfigError
        If it is no public key on an elliptic curve.
    """
    try:
        pem = public_key.lstrip().startswith(b"-----")
        load = serialization.load_pem_public_key if pem else serialization.load_ssh_public_key
        key = load(public_key)
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError("not a public key: it must be an OpenSSH line or PEM") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError("the public key must be on an elliptic curve (ECDSA P-384)")
    return key


def openssh_line(key: ec.EllipticCurvePublicKey) -> str:
    """Return a public key as OpenSSH writes it, without a comment."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """Return the name of a public key, as ``ssh-keygen -l`` prints it."""
    digest = sha256(b64decode(openssh_line(key).split()[1])).digest()
    return "SHA256:" + b64encode(digest).decode().rstrip("=")


def _private_bytes(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def write_private(path: Path, content: bytes) -> None:
    """Write a new file that only its owner can read; raises OSError."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
