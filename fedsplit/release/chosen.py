"""From a policy's name and numbers, as settings and ``device.json`` have them, to the policy, and back."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from fedsplit.common.errors import ConfigError, FedsplitError
from fedsplit.common.plugins import resolve_function
from fedsplit.release.noise import Noisy
from fedsplit.release.policies import BUILT_IN, settings_name
from fedsplit.release.policy import FACTS, Policy

_SETTING = "dropping.policy"


def takes(name: str) -> tuple[str, ...]:
    """Return the keys that a built-in policy takes; raises ConfigError if there is none of this name."""
    if name not in BUILT_IN:
        raise ConfigError(f"policy must be one of {', '.join(BUILT_IN)}, got {name!r}")
    return tuple(field.name for field in fields(BUILT_IN[name]))  # type: ignore[arg-type]


def built_in(name: str, *, clip: float = 0.0, noise: float = 0.0, **numbers: Any) -> Policy:
    """Return a policy that comes with fedsplit.

    Parameters
    ----------
    name : str
        A key of :data:`BUILT_IN`.
    clip, noise : float
        As in :func:`with_noise`.
    **numbers
        The policy's fields. Numbers that are not its fields are ignored.

    Raises
    ------
    ConfigError
        If no policy has this name, or a number is missing or not allowed.

    Examples
    --------
    >>> built_in("top-k", k=6, keep=1.0)
    TopK(k=6)
    """
    own = {key: numbers[key] for key in takes(name) if key in numbers}
    if missing := [key for key in takes(name) if key not in own]:
        raise ConfigError(f"policy {name!r} takes {missing[0]}")
    return with_noise(BUILT_IN[name](**own), clip, noise)


def from_outside(reference: str, values: Mapping[str, Any]) -> Policy:
    """Return somebody's own policy: ``reference`` is ``module:Name`` of its class, ``values`` are its fields.

    Raises
    ------
    ConfigError
        If there is no such class, it does not state all facts itself, or the values are not those it takes.
    """
    kind: Any = resolve_function(reference, _SETTING, "class")
    _check_class(reference, kind)
    own = {key.replace("-", "_"): value for key, value in values.items()}
    known = [field.name for field in fields(kind) if field.init]
    if taken := [name for name in ("clip", "noise") if name in known]:
        raise ConfigError(f"{_SETTING} {reference!r} may not have a field {taken[0]!r}: it is that of the noise on top")
    if unknown := sorted(set(own) - set(known)):
        raise ConfigError(f"dropping.{unknown[0]}: policy {reference!r} takes {' and '.join(known) or 'nothing'}")
    if odd := [key for key, value in own.items() if not isinstance(value, bool | int | float | str)]:
        raise ConfigError(f"dropping.{odd[0]} must be a number, a text, true or false, got {own[odd[0]]!r}")
    try:
        policy = kind(**own)
    except FedsplitError:
        raise
    except Exception as error:  # somebody's own code: also a value that is missing
        raise ConfigError(f"{_SETTING} {reference!r} with {own}: raised {type(error).__name__}: {error}") from None
    assert isinstance(policy, Policy)
    return policy


def _check_class(reference: str, kind: Any) -> None:
    if not (isinstance(kind, type) and is_dataclass(kind) and kind.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise ConfigError(f"{_SETTING} {reference!r} must be a frozen dataclass")
    if Policy not in kind.__mro__:
        raise ConfigError(f"{_SETTING} {reference!r} must derive from fedsplit.release.policy.Policy")
    stated = {name for base in kind.__mro__ if not base.__module__.startswith("fedsplit.") for name in vars(base)}
    if unsaid := sorted(FACTS - stated):  # one that is inherited would be another policy's
        raise ConfigError(f"{_SETTING} {reference!r} does not say itself: {', '.join(unsaid)}")


def with_noise(policy: Policy, clip: float, noise: float) -> Policy:
    """Return a policy behind Gaussian noise, or the policy itself if ``clip`` and ``noise`` are 0.

    Parameters
    ----------
    policy : Policy
    clip, noise : float
        As in :class:`fedsplit.release.policies.Noisy`.
    """
    return Noisy(policy, clip, noise) if clip or noise else policy


def numbers_of(policy: Policy) -> tuple[str, dict[str, Any]]:
    """Return what undoes :func:`built_in` and :func:`from_outside`: name and numbers, ``clip`` and ``noise`` too."""
    noisy = policy.noisy
    if noisy is not None:
        name, numbers = numbers_of(noisy.policy)
        return name, {**numbers, "clip": noisy.clip, "noise": noisy.noise}
    return settings_name(policy), {f.name: getattr(policy, f.name) for f in fields(policy)}  # type: ignore[arg-type]
