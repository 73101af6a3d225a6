"""Which settings name code: what a node's owner must allow, and what travels or is found beside a settings file."""

from fedsplit.plan.settings import Settings

_SERVER_ALONE = ("first-layer.strategy", "run.observers")


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
        "model.builder": settings.model.builder,
        "dropping.policy": settings.dropping.policy if settings.dropping.own else None,
        "first-layer.strategy": settings.first_layer.strategy if ":" in settings.first_layer.strategy else None,
        **{f"run.observers.{place}": name for place, name in enumerate(settings.run.observers)},
    }
    return {key: name for key, name in found.items() if name and not (on_nodes and key.startswith(_SERVER_ALONE))}
