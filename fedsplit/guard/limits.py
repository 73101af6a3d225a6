"""The owner's limits: a file on the device that says what may leave it, and that nothing a server sends can loosen."""

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from fedsplit.common.errors import ConfigError
from fedsplit.common.tables import Section, one_line

SHIPPED = Path(__file__).with_name("limits.toml")
Share = Annotated[float, Field(gt=0, le=1)]


class Limits(Section):
    """What may leave a device.

    Attributes
    ----------
    enforce : bool
        If false, everything leaves, and what the other limits would refuse is counted.
    releases : int
        Times that something new about a record may leave. The same bytes again are nothing new.
    equations : float
        Equations about a record over all its releases, as a share of the record's numbers.
    leverage : float
        Largest leverage of any of a record's numbers in all that was released of it: at 1 the number is determined.
    labels : bool
        Whether labels may leave. Where they may not, what leaves in their stead can still give them away; see
        :mod:`fedsplit.server.at_home`.
    gradients : bool
        Whether sums of first-layer gradients may leave at all.
    gradient_records : int
        Records that such a sum is over, at least.
    gradient_share : float
        Equations of activations and gradients together, as a share of the unknowns.
    gradient_leverage : float
        Largest leverage of a record in the sums it was part of, added up over its releases.
    epsilon, delta : float
        Differential privacy that every record must have; without ``epsilon``, noise is not asked for.
    active : float
        Share of relu outputs that weights may make active on the device's records: more is fishing.
    row_norms : float
        Largest norm of a row of weights, over the median of the rows that are not dead (relu).
    refusals : int
        Records that may be refused for what they hold, over the life of the ledger, before everything is refused:
        which ones are refused tells of them.
    """

    enforce: bool = True
    releases: Annotated[int, Field(ge=0)] = 1
    equations: Share = 0.125
    leverage: Share = 0.9
    labels: bool = True
    gradients: bool = False
    gradient_records: Annotated[int, Field(ge=2)] = 16
    gradient_share: Share = 0.5
    gradient_leverage: Share = 0.25
    epsilon: Annotated[float, Field(gt=0)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    active: Share = 0.9
    row_norms: Annotated[float, Field(ge=1)] = 1e3
    refusals: Annotated[int, Field(ge=0)] = 100


def load_limits(path: Path | str = SHIPPED) -> Limits:
    """Read a limits file; by default the shipped one.

    Raises
    ------
    ConfigError
        If it is missing or damaged, or a value is not allowed: there is no falling back to other limits.
    """
    try:
        return Limits.model_validate(tomllib.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"limits file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        raise ConfigError(f"limits file {path}: not valid TOML") from None
    except ValidationError as error:
        raise ConfigError(f"limits file {path}: {one_line(error, Limits)}") from None
