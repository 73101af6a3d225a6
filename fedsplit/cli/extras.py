"""What commands need besides the packages that every device has, and how to get it."""

from importlib.util import find_spec

from fedsplit.common.errors import ConfigError

EXTRAS = {
    "node": ("flwr",),
    "pictures": ("matplotlib",),
    "server": ("flwr", "matplotlib"),
    "simulation": ("flwr", "matplotlib", "ray"),
    "tune": ("flwr", "matplotlib", "ray", "optuna"),
    "serve": ("fastapi", "fastapi_offline", "prometheus_client", "uvicorn"),
}
"""The modules of each extra in ``pyproject.toml``."""


def need(extra: str) -> None:
    """Refuse a command before it has done anything if a package of an extra is missing; raises ConfigError."""
    for module in EXTRAS[extra]:
        if not _found(module):
            package = module.replace("_", "-")
            raise ConfigError(f"this command needs the package {package}: pip install 'fedsplit[{extra}]'")


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:
        return False
