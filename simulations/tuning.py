"""How many trials a search gets through with two at a time, beside one at a time; one core for a trial in both.

    python -m simulations tuning configs/tune/wearables.toml --trials 6 --repeats 3

Searches of the trunk's learning rate alone, so that all trials are the same work, with one seed; in turns. A search's
time is that from its first trial's beginning to its last one's end: Ray's start is left out, the import of torch in its
processes is not.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from fedsplit.common.errors import ConfigError
from fedsplit.plan.settings import Settings, load_settings
from fedsplit.tuning.study import Study
from simulations.shared.options import option
from simulations.shared.results import Results
from simulations.shared.study import CONFIGS
from simulations.shared.tables import markdown


@dataclass(frozen=True)
class Options:
    """What is searched, and how often."""

    config: Path = option(CONFIGS / "tune" / "wearables.toml", positional=True)
    trials: int = option(6, quick=2)
    repeats: int = option(3, quick=1)
    parallel: int = option(2, help="trials at a time")
    rounds: int = option(0, quick=2, help="of a trial; 0: as the settings say")


def settings_for(options: Options) -> Settings:
    """Return the settings of a search whose trials are all the same work; raises ConfigError."""
    settings = load_settings(options.config, [f"run.rounds={options.rounds}"] if options.rounds else [])
    if settings.tune is None:
        raise ConfigError(f"{options.config} has no section [tune]")
    changes = {"trials": options.trials, "seeds": 1, "objectives": ["test_accuracy"], "constraints": {}}
    lr = settings.trunk.lr
    tune = settings.tune.model_copy(update={**changes, "space": {"trunk": {"lr": {"low": lr / 2, "high": lr}}}})
    return settings.model_copy(update={"tune": tune})


def trials_a_minute(settings: Settings, parallel: int) -> float:
    """Run a search and return its throughput."""
    with TemporaryDirectory() as folder:
        search = Study(settings, Path(folder) / "study", resume=False)
        search.run(parallel)
        begun = [trial.datetime_start for trial in search.trials if trial.datetime_start]
        ended = [trial.datetime_complete for trial in search.trials if trial.datetime_complete]
    return 60 * len(ended) / (max(ended) - min(begun)).total_seconds()


def study(options: Options) -> Results:
    """Return trials a minute, one at a time and several, in pairs."""
    settings, pairs = settings_for(options), []
    for _ in range(options.repeats):
        pairs.append([trials_a_minute(settings, parallel) for parallel in (1, options.parallel)])
        print("trials a minute: {:.2f} one at a time, {:.2f} side by side".format(*pairs[-1]), file=sys.stderr)
    return {"pairs": pairs}


def tables(results: Results) -> str:
    """Return the medians of both, and of their ratio."""
    serial, parallel = (f"{median(column):.2f}" for column in zip(*results["pairs"], strict=True))
    ratio = median(many / one for one, many in results["pairs"])
    columns = ("trials a minute: one at a time", f"{results['options']['parallel']} at a time", "ratio")
    return markdown(columns, [(serial, parallel, f"{ratio:.2f}")])
