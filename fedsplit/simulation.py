"""Simulations: the same ClientApp and strategy on Ray or in this process."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsplit.assemble import limits, num_nodes
from fedsplit.client_app import client_app
from fedsplit.config import Settings, load_settings
from fedsplit.errors import ConfigError, RunError
from fedsplit.grid import InProcessGrid
from fedsplit.preflight import check_limits
from fedsplit.training import (
    Report,
    TrainingRun,
    check_data,
    default_folder,
    forget_node_states,
    open_run_folder,
)


def simulate(
    config: Settings | Path | str,
    *,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    resume: bool = False,
    report: Report | None = None,
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
    folder = Path(out) if out is not None else default_folder(settings)
    run = TrainingRun(settings, folder, report)
    check_data(run.source)
    if settings.guard.mode == "enforce":
        check_limits(settings, run.source, run.model.first_layer, limits(settings))
    open_run_folder(folder, settings, resume=resume)
    states = (folder / "nodes").resolve()
    app = client_app(settings.to_json(), str(states))
    nodes = num_nodes(settings, run.source)
    result = run.train(InProcessGrid(app, nodes)) if settings.run.engine == "inline" else _on_ray(run, app, nodes)
    forget_node_states(states)
    return result


def _on_ray(run: TrainingRun, app: Any, nodes: int) -> dict[str, Any]:
    """Train on Flower's simulation runtime with a private local Ray."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what later versions of Ray do; saves a warning
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    import ray
    from flwr.simulation import run_simulation

    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        run.train(grid)

    # Started here and not by Flower, so that a failure is raised here instead of leaving the ServerApp waiting;
    # "local", so that no other cluster of this machine is joined. Actors need this process's import path.
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
    except Exception as error:
        raise RunError(f"Ray did not start: {str(error).splitlines()[0]}") from None
    try:
        run_simulation(
            server_app,
            app,
            num_supernodes=nodes,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        )
    finally:
        ray.shutdown()
    if run.result is None:
        raise RunError("the simulation ended before the training did")
    return run.result
