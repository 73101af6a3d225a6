"""Keys and certificates: what is made can be used, by others' programs too, and what is private stays so."""

import shutil
import socket
import ssl
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedsplit.common.certs import (
    CA,
    CERTIFICATE,
    DAYS,
    KEY,
    fingerprint,
    make_certificates,
    make_key_pair,
    read_public_key,
)
from fedsplit.common.errors import ConfigError

HOSTS = ["server.example.org", "127.0.0.1", "::1", "*.example.org", "localhost"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs") / "server"
    make_certificates(folder, HOSTS)
    return folder


def read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_the_certificate_names_every_host(server: Path) -> None:
    names = read(server / CERTIFICATE).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["server.example.org", "*.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address("127.0.0.1"), ip_address("::1")]


def test_only_the_authority_may_sign_and_only_certificates(server: Path) -> None:
    authority, certificate = read(server / CA), read(server / CERTIFICATE)
    found = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert found.critical and found.value.ca and found.value.path_length == 0
    usage = authority.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical and usage.value.key_cert_sign and not usage.value.digital_signature
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [x509.ExtendedKeyUsageOID.SERVER_AUTH]
    certificate.verify_directly_issued_by(authority)
    assert authority.public_key() != certificate.public_key()


def test_they_are_good_for_as_long_as_asked(server: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path / "short", ["localhost"], days=3)
    now = datetime.now(UTC)
    for folder, days in ((server, DAYS), (tmp_path / "short", 3)):
        for name in (CA, CERTIFICATE):
            certificate = read(folder / name)
            assert certificate.not_valid_before_utc < now  # a node's clock may be behind
            assert abs(certificate.not_valid_after_utc - now - timedelta(days=days)) < timedelta(hours=1)


def test_the_servers_key_is_its_alone_and_the_authoritys_is_nowhere(server: Path) -> None:
    assert sorted(path.name for path in server.iterdir()) == sorted([CA, CERTIFICATE, KEY])
    assert (server / KEY).stat().st_mode & 0o777 == 0o600 and server.stat().st_mode & 0o077 == 0
    key = serialization.load_pem_private_key((server / KEY).read_bytes(), None)
    assert key.public_key() == read(server / CERTIFICATE).public_key()
    assert not any(b"PRIVATE" in (server / name).read_bytes() for name in (CA, CERTIFICATE))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "server.example.org", "node.example.org"])
def test_a_client_that_knows_the_authority_connects(host: str, server: Path) -> None:
    assert handshake(server, server / CA, host) == b"hello"


def test_a_client_refuses_another_host_or_authority(server: Path, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(server, server / CA, "example.com")
    make_certificates(tmp_path / "other", HOSTS)
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        handshake(server, tmp_path / "other" / CA, "localhost")


def handshake(server: Path, authority: Path, host: str) -> bytes:
    """Connect to a server with the certificate as ``host`` and return what it says."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / CERTIFICATE, server / KEY)

    def serve(listener: socket.socket) -> None:
        try:
            with context.wrap_socket(listener.accept()[0], server_side=True) as connection:
                connection.sendall(b"hello")
        except OSError:
            pass  # refused by the client

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            client = ssl.create_default_context(cafile=str(authority))
            with socket.create_connection(listener.getsockname(), timeout=20) as plain:
                with client.wrap_socket(plain, server_hostname=host) as connection:
                    return connection.recv(5)
        finally:
            thread.join()


@pytest.mark.parametrize("host", ["a b", "x:1", "", "a..b", "a.", "-", "https://a", "ü.org", "*", "a/b", "10.0.0.0/8"])
def test_what_is_no_host_is_refused(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--host must be a host's name or address without a port"):
        make_certificates(tmp_path / "server", ["localhost", host])
    assert not (tmp_path / "server").exists()


def test_no_hosts_and_no_days_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one --host"):
        make_certificates(tmp_path / "server", [])
    for days in (0, -1):
        with pytest.raises(ConfigError, match=rf"days must be in 1\.\.36500, got {days}"):
            make_certificates(tmp_path / "server", ["localhost"], days)
    assert not (tmp_path / "server").exists()


@pytest.mark.parametrize("days", [4_000_000, 10**10])
def test_more_days_than_there_are_are_refused(days: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="days"):
        make_certificates(tmp_path / "server", ["localhost"], days)


@pytest.mark.parametrize("name", [CA, CERTIFICATE, KEY])
def test_certificates_are_never_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ConfigError, match=f"{tmp_path / name} exists: certificates are not replaced"):
        make_certificates(tmp_path, ["localhost"])
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == b"mine"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written: "):
        make_certificates(tmp_path / "file" / "server", ["localhost"])


def test_a_node_key_is_in_openssh_formats(tmp_path: Path) -> None:
    make_key_pair(tmp_path / "key", "fedsplit-devices=0,3")
    private = serialization.load_ssh_private_key((tmp_path / "key").read_bytes(), None)
    line = (tmp_path / "key.pub").read_bytes()
    public = serialization.load_ssh_public_key(line)
    assert isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name == "secp384r1"
    assert private.public_key() == public
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert line.startswith(b"ecdsa-sha2-nistp384 ") and line.endswith(b" fedsplit-devices=0,3\n")
    with pytest.raises(FileExistsError):
        make_key_pair(tmp_path / "key", "another")
    assert (tmp_path / "key.pub").read_bytes() == line


def name_of(key: bytes) -> str:
    return fingerprint(read_public_key(key))


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_a_fingerprint_is_what_ssh_keygen_prints(tmp_path: Path) -> None:
    make_key_pair(tmp_path / "key", "comment")
    for name in ("key.pub", "key"):
        command = ["ssh-keygen", "-l", "-f", str(tmp_path / name)]
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
        assert said.split()[:2] == ["384", name_of((tmp_path / "key.pub").read_bytes())]


def test_a_fingerprint_is_of_the_key_not_of_its_form(tmp_path: Path) -> None:
    for name in ("key", "other"):
        make_key_pair(tmp_path / name, name)
    line = (tmp_path / "key.pub").read_bytes()
    pem = serialization.load_ssh_public_key(line).public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    forms = [line, line.rsplit(b" ", 1)[0], line.replace(b" key\n", b" another comment"), pem, b"\n" + pem]
    assert len({name_of(form) for form in forms}) == 1
    assert name_of(line).startswith("SHA256:") and "=" not in name_of(line)
    assert name_of((tmp_path / "other.pub").read_bytes()) != name_of(line)


def test_what_is_no_public_key_of_a_node_is_refused(tmp_path: Path) -> None:
    make_key_pair(tmp_path / "key", "comment")
    line = (tmp_path / "key.pub").read_bytes()
    pem = b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"
    for garbage in (b"", b"garbage", b"\xff\xfe", line[:60], pem, (tmp_path / "key").read_bytes(), b"ssh-dss AAAA x"):
        with pytest.raises(ConfigError, match="not a public key: it must be an OpenSSH line or PEM"):
            read_public_key(garbage)
    other = ed25519.Ed25519PrivateKey.generate().public_key()
    form = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    with pytest.raises(ConfigError, match="must be on an elliptic curve"):
        read_public_key(other.public_bytes(*form))
