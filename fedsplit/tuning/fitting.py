"""Whether settings can give what a study looks for."""

from fedsplit.common.errors import ConfigError
from fedsplit.common.figures import AUDITED
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings, check_settings
from fedsplit.runs.assembly import split_strategy
from fedsplit.tuning.study import _check_figure
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
    split_strategy(experiment, run=0)
    _ = experiment.public  # raises
