"""Whether settings can give what a study looks for."""

from fedsplit.audit.attack import attacks_named
from fedsplit.audit.standard import STANDARD
from fedsplit.common.errors import ConfigError
from fedsplit.common.figures import AUDITED, OBJECTIVES
from fedsplit.model.tasks import TASKS, task_of
from fedsplit.model.tasks.base import Task
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings, check_settings
from fedsplit.runs.assembly import split_strategy
from fedsplit.tuning.trial import Plan, with_seed


def check_fit(settings: Settings, plan: Plan) -> None:
    """Refuse settings that cannot give what is asked for, before anything runs; raises ConfigError."""
    settings = check_settings(with_seed(settings, plan.seeds - 1).tables())
    experiment = Experiment(settings)
    source = experiment.source
    for name in plan.names:
        if name in AUDITED and not settings.audit.targets:
            raise ConfigError(f"{name!r} is an audit's: audit.targets must be at least 1, got 0")
        if name.startswith("test_") and not source.test_devices:
            raise ConfigError(f"{name!r} needs test devices, devices.test names none")
        if name.startswith("test_"):
            _check_figure(name, source.task)
    attacks_named(settings.audit.attacks, [attack.name for attack in STANDARD])
    split_strategy(experiment, run=0)
    _ = experiment.public  # raises


def _check_figure(name: str, task: Task) -> None:
    if name in task.figures:
        return
    owners = [other for other in map(task_of, TASKS) if name in other.figures]
    if len(owners) == 1:
        raise ConfigError(f"{name!r} is for {owners[0].noun}, not for {task.name}")
    instead = [known for known in task.figures if known in OBJECTIVES][:1]
    raise ConfigError(f"{task.noun} has no {name!r}{''.join(f', use {known!r}' for known in instead)}")
