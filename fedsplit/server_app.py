"""The address of the ServerApp that ``pyproject.toml`` and apps name."""

from fedsplit.runs.server_app import app as app

__all__ = ["app"]
