"""Which settings name code: what a node's owner must allow, and what travels or is found beside a settings file."""

from fedsplit.model.tasks import TASKS
from fedsplit.plan.settings import Settings

_SERVER_ALONE = (
    "first-layer.strategy",
    "first-layer.schedule",
    "trunk.optimizer",
    "trunk.schedule",
    "protocol.pace",
    "run.observers",
    "audit.attacks",
)


def names_code(settings: Settings, *, on_nodes: bool = False) -> dict[str, str]:
    """Return the settings that name code as ``module:name``, by dotted key; of a list each by its place in it.

    Parameters
    ----------
    settings : Settings
    on_nodes : bool
        Only those whose code nodes would run, too.
    """
    found = {
        "data.builder": settings.data.builder,
        "data.task": None if settings.data.task in TASKS else settings.data.task,
        "model.builder": settings.model.builder,
        "dropping.policy": settings.dropping.policy if settings.dropping.own else None,
        "first-layer.strategy": settings.first_layer.strategy,
        "first-layer.schedule": settings.first_layer.schedule,
        "trunk.optimizer": settings.trunk.optimizer,
        "trunk.schedule": settings.trunk.schedule,
        "protocol.pace": settings.protocol.pace,
        **{f"run.observers.{place}": name for place, name in enumerate(settings.run.observers)},
        **{f"audit.attacks.{place}": name for place, name in enumerate(settings.audit.attacks)},
    }
    wanted = {key: name for key, name in found.items() if not (on_nodes and key.startswith(_SERVER_ALONE))}
    return {key: name for key, name in wanted.items() if name and (":" in name or key not in _SERVER_ALONE)}
