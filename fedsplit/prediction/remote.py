"""Asking a service over the network."""

import math
import ssl
import time
from pathlib import Path

import httpx
import numpy as np

from fedsplit.deployment.node import read_authority
from fedsplit.errors import ConfigError, RunError
from fedsplit.packing import FloatArray

_TIMEOUT = 30.0  # seconds
_TRIES = 5
_PAUSE = 0.2  # seconds before the second try; twice as long before each other


class Remote:
    """A service's predictions of one model, over a connection that stays open.

    Parameters
    ----------
    url : str
        Where the service is, ``https://HOST:PORT``.
    model : str
        The model's name.
    token : str or None
    authority : Path or None
        The certificate that the server's must be signed by; None: the system's.

    Raises
    ------
    ConfigError
        If the address or the authority cannot be used.
    """

    def __init__(self, url: str, model: str, token: str | None, authority: Path | None) -> None:
        if not url.startswith(("https://", "http://")):
            raise ConfigError(f"--server must be https://HOST:PORT, got {url!r}")
        if token and url.startswith("http://"):
            raise ConfigError("a token is not sent without TLS: --server must be https://HOST:PORT")
        known = read_authority(authority).decode("ascii") if authority else None
        headers = {"Content-Type": "application/octet-stream"} | ({"Authorization": f"Bearer {token}"} if token else {})
        context = ssl.create_default_context(cadata=known)
        try:
            self._client = httpx.Client(base_url=url, verify=context, headers=headers, timeout=_TIMEOUT)
            if not self._client.base_url.host:
                raise ValueError
        except (httpx.InvalidURL, ValueError):
            raise ConfigError(f"--server must be https://HOST:PORT, got {url!r}") from None
        self._url, self._path = url, f"/v1/models/{model}/predict"

    def __call__(self, payload: bytes) -> FloatArray:
        """Send a query and return the outputs.

        A service that is busy or away is asked again, ever later. Nothing new leaves by it: the bytes are the same.

        Raises
        ------
        RunError
            If it refuses, or stays away.
        """
        said = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            try:
                response = self._client.post(self._path, content=payload)
            except httpx.TransportError as error:
                if "CERTIFICATE_VERIFY_FAILED" in str(error):
                    raise RunError(f"{self._url}: its certificate is refused") from None
                said = "does not answer"
                continue
            if response.status_code == httpx.codes.OK:
                return _outputs(response)
            said = f"refuses: {_detail(response)}"
            if response.status_code not in (429, 502, 503, 504):
                break
        raise RunError(f"{self._url} {said}")


def _outputs(response: httpx.Response) -> FloatArray:
    try:
        found = np.asarray(response.json()["outputs"], dtype=np.float32)
    except (ValueError, KeyError, TypeError):
        raise RunError("the answer is no prediction") from None
    if found.ndim != 2 or not math.prod(found.shape):
        raise RunError("the answer is no prediction")
    return found


def _detail(response: httpx.Response) -> str:
    try:
        said = str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        said = ""
    return "".join(c for c in said[:300] if c.isprintable()) or f"HTTP status {response.status_code}"
