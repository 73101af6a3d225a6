"""What a model is trained for: an object that knows all facts about itself, found by the name that settings give it.

To import this package loads neither torch nor numpy: settings are checked before anything runs.
"""

from functools import cache
from typing import TYPE_CHECKING

from fedsplit.common.errors import ConfigError
from fedsplit.common.plugins import resolve_function

if TYPE_CHECKING:
    from fedsplit.model.tasks.base import Task

TASKS = {
    "classification": "fedsplit.model.tasks.classes:Classification",
    "binary": "fedsplit.model.tasks.classes:Binary",
    "regression": "fedsplit.model.tasks.regression:Regression",
    "novelty": "fedsplit.model.tasks.novelty:Novelty",
}
"""Where the tasks with a name of their own are; all others are named by ``module:Name``."""


def is_task_name(name: str) -> bool:
    """Whether a task can be called so: it need not exist, since nothing is imported."""
    return name in TASKS or all(name.partition(":"))


@cache
def task_of(name: str) -> "Task":
    """Return the task of a name, one of :data:`TASKS` or ``module:Name`` of a :class:`fedsplit.model.tasks.base.Task`.

    Raises
    ------
    ConfigError
        If there is no such task, or a class is not a whole one.

    >>> task_of("binary")
    Binary(name='binary')
    """
    from fedsplit.model.tasks.base import Task

    if not is_task_name(name):
        raise ConfigError(f"task must be one of {', '.join(TASKS)} or 'module:Name', got {name!r}")
    kind = resolve_function(TASKS.get(name, name), "data.task", "class")
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        raise ConfigError(f"data.task {name!r} must be a subclass of fedsplit.model.tasks.base.Task")
    if kind.__abstractmethods__:
        raise ConfigError(f"data.task {name!r} lacks {', '.join(sorted(kind.__abstractmethods__))}")
    return kind(name)
