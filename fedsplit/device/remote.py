"""Asking a service over the network."""

import json
import math
import ssl
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from fedsplit.common.arrays import FloatArray
from fedsplit.common.certs import read_authority
from fedsplit.common.errors import ConfigError, RunError

_TIMEOUT = 30.0  # seconds
_LARGEST = 2**26  # bytes of an answer
_TRIES = 5
_REFUSED = "certificate verify failed: "  # how Python's ssl begins to say why
_PAUSE = 0.2  # seconds before the second try; twice as long before each other


class Remote:
    """A service's answers about one model, over a connection that stays open.

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
            raise ConfigError("a token is not sent without TLS: unset FEDSPLIT_TOKEN, or ask https://HOST:PORT")
        known = read_authority(authority).decode("ascii") if authority else None
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise ConfigError("the token in FEDSPLIT_TOKEN is none: it must be what fedsplit token printed")
        headers = {"Content-Type": "application/octet-stream", "Accept-Encoding": "identity"}
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        context = ssl.create_default_context(cadata=known)
        try:
            self._client = httpx.Client(base_url=url, verify=context, headers=headers, timeout=_TIMEOUT)
            if not self._client.base_url.host:
                raise ValueError
        except (httpx.InvalidURL, ValueError):
            raise ConfigError(f"--server must be https://HOST:PORT, got {url!r}") from None
        self._url, self._path = url, f"/v1/models/{model}/"

    def __call__(self, payload: bytes) -> FloatArray:
        """Send a query and return the outputs; raises as :meth:`ask`."""
        return _outputs(self.ask("predict", payload))

    def ask(self, what: str, payload: bytes) -> Any:
        """Send a query to one of the model's endpoints and return the JSON of the answer, None if it is none.

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
                status, answer = self._post(self._path + what, payload)
            except httpx.RequestError as error:
                if _REFUSED in str(error):
                    why = str(error).partition(_REFUSED)[2].partition(" (_ssl")[0]
                    raise RunError(f"{self._url}: its certificate is refused: {why}") from None
                said = "does not answer"
                continue
            if status == httpx.codes.OK:
                return answer
            said = f"refuses: {_detail(answer) or f'HTTP status {status}'}"
            if status not in (429, 502, 503, 504):
                break
        raise RunError(f"{self._url} {said}")

    def _post(self, path: str, payload: bytes) -> tuple[int, Any]:
        """Return the status and the JSON of an answer, None if it is none; it may be neither large nor slow."""
        deadline, parts, size = time.monotonic() + _TIMEOUT, [], 0
        with self._client.stream("POST", path, content=payload) as response:
            for part in response.iter_raw():
                parts.append(part)
                size += len(part)
                if size > _LARGEST or time.monotonic() > deadline:
                    raise RunError(f"{self._url}: the answer is too large, or takes too long")
        try:
            return response.status_code, json.loads(b"".join(parts))
        except (ValueError, RecursionError):
            return response.status_code, None


def _outputs(answer: Any) -> FloatArray:
    try:
        found = np.asarray(answer["outputs"], dtype=np.float32)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise RunError("the answer is no prediction") from None
    if found.ndim != 2 or not math.prod(found.shape):
        raise RunError("the answer is no prediction")
    return found


def _detail(answer: Any) -> str:
    said = str(answer.get("detail", "")) if isinstance(answer, dict) else ""
    return "".join(c for c in said[:300] if c.isprintable())
