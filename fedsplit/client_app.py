"""The address of the ClientApp that ``pyproject.toml`` and apps name."""

from fedsplit.runs.client_app import app as app

__all__ = ["app"]
