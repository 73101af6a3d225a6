"""Simulations: the same ClientApp and strategy on Ray or in this process."""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.serverapp import Grid

from fedsplit.common.errors import ConfigError, EngineError, RunError
from fedsplit.plan.settings import Settings, default_folder, load_settings
from fedsplit.runs.engine import Start, engine
from fedsplit.runs.folder import RunFolder

if TYPE_CHECKING:
    from fedsplit.runs.observing import Report
    from fedsplit.runs.training import TrainingRun

log = logging.getLogger(__name__)


def simulate(
    config: Settings | Path | str,
    *,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    resume: bool = False,
    report: "Report | None" = None,
) -> dict[str, Any]:
    """Train over simulated devices and return what ``result.json`` holds.

    Parameters
    ----------
    config : Settings, Path or str
        Settings, or the file that holds them.
    overrides : sequence of str
        ``section.key=value``; only with a file.
    out : Path or str, optional
        The run folder; default ``runs/NAME-TIMESTAMP``.
    resume : bool
        Go on from the run folder's checkpoint.
    report : callable, optional
        Called after every round with its metrics.

    Raises
    ------
    FedsplitError
        With one line that names what is wrong.
    """
    if isinstance(config, Settings) and overrides:
        raise ConfigError("overrides are for a settings file, not for Settings")
    settings = config if isinstance(config, Settings) else load_settings(config, overrides)
    folder = RunFolder(Path(out) if out is not None else default_folder(settings))
    run: TrainingRun | None = None
    stopped_after = -1
    while True:
        try:
            with engine(settings.run) as start:
                grid = _start_nodes(start, settings, folder.states)
                run = run.again() if run else _prepared(settings, folder, report, resume=resume)
                result = run.train(grid())
            shutil.rmtree(folder.states, ignore_errors=True)  # patterns of chunks that nobody will ask for
            run.finish()
            return result
        except EngineError as error:
            done = run.rounds_done if run else 0
            if done == stopped_after:
                raise RunError(f"the simulation's engine stopped twice after round {done}: {error}") from None
            stopped_after = done
            log.warning("the simulation's engine stopped after round %d, a new one is started (%s)", done, error)


def _start_nodes(start: Start, settings: Settings, states: Path) -> Callable[[], Grid]:
    # these imports bring torch: Ray starts meanwhile
    from fedsplit.plan.experiment import Experiment
    from fedsplit.runs.client_app import client_app
    from fedsplit.runs.nodes import Simulated

    experiment = Experiment(settings)
    return start(client_app(Simulated.of(experiment).to_json(), str(states.resolve())), experiment.nodes)


def _prepared(settings: Settings, folder: RunFolder, report: "Report | None", *, resume: bool) -> "TrainingRun":
    """Return the run after all that can be refused before training; raises FedsplitError."""
    from fedsplit.plan.preflight import check_limits
    from fedsplit.runs.assembly import calibrated
    from fedsplit.runs.training import TrainingRun

    settings = calibrated(settings, folder if resume else None)
    run = TrainingRun(settings, folder.path, report)
    run.check_startable()
    if settings.guard.enforces and (own := run.experiment.limits).enforce:
        check_limits(run.experiment.terms, run.source, run.model.first_layer, run.experiment.policy, own)
    folder.open(settings, resume=resume)
    return run
