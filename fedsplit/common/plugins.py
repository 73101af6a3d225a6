"""Objects that settings name by "module:name"."""

import importlib
from collections.abc import Callable
from typing import Any

from fedsplit.common.errors import ConfigError


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
