"""Simulations: the same ClientApp and strategy on Ray or in this process."""

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsplit.assemble import limits, num_nodes
from fedsplit.client_app import client_app
from fedsplit.config import Settings, load_settings
from fedsplit.errors import ConfigError, EngineError, RunError
from fedsplit.grid import InProcessGrid, PollingGrid
from fedsplit.preflight import check_limits
from fedsplit.training import (
    Report,
    TrainingRun,
    check_data,
    default_folder,
    forget_node_states,
    open_run_folder,
)

log = logging.getLogger(__name__)
_UNKNOWN = 0  # Flower's error code for what was raised around a ClientApp, not in it


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


def _on_ray(run: TrainingRun, app: ClientApp, nodes: int) -> dict[str, Any]:
    """Train on Flower's simulation runtime; where an actor dies, on a new one from the last checkpoint."""
    died = -1
    while True:
        try:
            with _engine(app, nodes, run.settings.run.ray_address) as grid:
                return run.train(grid)
        except EngineError as error:
            at = run.strategy.progress.round_number
            if at == died:
                raise RunError(f"the simulation engine stopped twice in round {at}: {error}") from None
            died = at
            log.warning("round %d: the simulation engine stopped: starting it anew (%s)", at, error)
            run = run.again()


class _RayGrid(PollingGrid):
    """Flower's simulation grid, which sees when the engine behind it has stopped."""

    def __init__(self, grid: Grid, alive: Callable[[], bool]) -> None:
        super().__init__(grid)
        self._alive = alive

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come; raises EngineError if an actor died, or all of it."""
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            # Flower goes on without an actor that died, and answers for it: with another result, if nobody looked
            if reply.has_error() and reply.error.code == _UNKNOWN:
                raise EngineError((reply.error.reason or "no reason given").strip().splitlines()[0][:200])
        if not self._alive():
            raise EngineError("Flower's simulation runtime ended")
        return replies


@contextmanager
def _engine(app: ClientApp, nodes: int, address: str | None) -> Iterator[Grid]:
    """Start Ray and Flower's simulation runtime, yield its grid, and stop both.

    The runtime gets a thread of its own, and training stays in this one: OpenMP gives every thread that computes its
    own helpers, and lets all of them sleep between any two operations once there are more than cores.
    """
    from flwr.simulation import run_simulation

    grids: Queue[Grid | None] = Queue()
    finished = threading.Event()
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        grids.put(grid)
        finished.wait()

    def simulate() -> None:
        try:
            run_simulation(
                server_app,
                app,
                num_supernodes=nodes,
                backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
            )
        except Exception as error:  # seen by _RayGrid
            log.debug("Flower's simulation runtime: %s", error)
        finally:
            grids.put(None)

    _start_ray(address)
    import ray

    thread = threading.Thread(target=simulate, name="flower-simulation", daemon=True)
    thread.start()
    try:
        if (grid := grids.get()) is None:
            raise RunError("Flower's simulation runtime did not start: see its log with --verbose")
        yield _RayGrid(grid, thread.is_alive)
    finally:
        finished.set()
        thread.join()
        ray.shutdown()


def _start_ray(address: str | None) -> None:
    """Start a private Ray, or join the one at an address; raises RunError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what later versions of Ray do; saves a warning
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    import ray

    # Started here and not by Flower, so that a failure is raised here; "local", so that no other cluster of this
    # machine is joined. Actors need this process's import path.
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
    except Exception as error:
        where = f" at run.ray-address {address!r}" if address else ""
        raise RunError(f"Ray did not start{where}: {str(error).splitlines()[0]}") from None
