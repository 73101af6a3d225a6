"""Finding what others installed: data files inside packages, and a user's own functions."""

import hashlib
import importlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from fedsplit.common.errors import ConfigError, DataError


def resolve_function(reference: str, setting: str, kind: str = "function") -> Callable[..., Any]:
    """Import the function (or what else can be called) that a setting names.

    Parameters
    ----------
    reference : str
        ``module:function``, the module as in an import statement.
    setting : str
        The setting's name, for the errors: for example ``data.builder``.
    kind : str
        ``function`` or ``class``, for the errors.

    Raises
    ------
    ConfigError
        If the text has another form, the module cannot be imported, or it has no such function.
    """
    module_name, _, name = reference.partition(":")
    if not (module_name and name):
        raise ConfigError(f"{setting} must be 'module:{kind}', got {reference!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        hint = "install it or add its folder to PYTHONPATH"
        raise ConfigError(f"{setting} {reference!r}: there is no module {error.name!r}; {hint}") from None
    except Exception as error:  # the module's own code ran: its text could hold records
        kind = type(error).__name__
        raise ConfigError(f"{setting} {reference!r}: importing {module_name} raised {kind}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{setting} {reference!r}: module {module_name} has no {kind} {name!r}")
    return function  # type: ignore[no-any-return]


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
