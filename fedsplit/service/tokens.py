"""Bearer tokens: a file holds their hashes, whoever has one may ask."""

import hmac
import secrets
from hashlib import sha256
from pathlib import Path

from fedsplit.common.certs import write_private
from fedsplit.common.errors import ConfigError
from fedsplit.common.files import replacing


class Tokens:
    """Bearer tokens, of which a file holds a name and the SHA-256 each.

    Parameters
    ----------
    path : Path

    Raises
    ------
    ConfigError
        If the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            self._hashes = {name: bytes.fromhex(digest) for name, digest in lines}
        except OSError as error:
            raise ConfigError(f"tokens {path} cannot be read: {error.strerror}; fedsplit token makes one") from None
        except ValueError:
            raise ConfigError(f"tokens {path} is damaged: each line must be a name and a SHA-256") from None
        if not self._hashes:
            raise ConfigError(f"tokens {path} holds none: fedsplit token makes one")

    @property
    def names(self) -> list[str]:
        """Whose tokens there are."""
        return list(self._hashes)

    def owner(self, header: str) -> str | None:
        """Return whose token an Authorization header has; None if it is nobody's."""
        kind, _, token = header.partition(" ")
        given = sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = [name for name, known in self._hashes.items() if hmac.compare_digest(known, given)]  # all, always
        return found[0] if found and kind.lower() == "bearer" else None


def add_token(path: Path, name: str) -> str:
    """Make a token, add its hash to a file, and return it; raises ConfigError."""
    if not name or name.split() != [name]:
        raise ConfigError(f"a token's name must be one word, got {name!r}")
    token = secrets.token_urlsafe(32)
    try:
        before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if name in [line.split()[0] for line in before if line.strip()]:
            raise ConfigError(f"{path} has a token of {name} already: remove its line to make another")
        lines = [*before, f"{name} {sha256(token.encode()).hexdigest()}", ""]
        with replacing(path) as new:
            write_private(new, "\n".join(lines).encode())
    except OSError as error:
        raise ConfigError(f"tokens {path} cannot be written: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"tokens {path} is damaged") from None
    return token
