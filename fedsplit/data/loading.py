"""Data files inside installed packages."""

import hashlib
from importlib import metadata
from pathlib import Path

from fedsplit.common.errors import DataError


def installed_file(package: str, path: str, *, missing: str) -> Path:
    """Return where a file of an installed package lies, without importing the package.

    Parameters
    ----------
    package : str
        Name of the distribution, as pip knows it.
    path : str
        Relative to the folder of installed packages.
    missing : str
        Text of the error if the package is not installed.

    Raises
    ------
    DataError
        If the package is not installed.
    """
    try:
        return Path(str(metadata.distribution(package).locate_file(path)))
    except metadata.PackageNotFoundError:
        raise DataError(missing) from None


def verified_bytes(path: Path, sha256: str) -> bytes:
    """Return a file's bytes if their SHA-256 is ``sha256`` (hexadecimal).

    Raises
    ------
    DataError
        If the file cannot be read or has another checksum.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__})") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(f"{path}: damaged or of another version: expected SHA-256 {sha256}, found {found}")
    return content
