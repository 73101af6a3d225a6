"""What runs the nodes of a simulation: this process, or Flower's simulation runtime on Ray.

Nothing here imports torch, so that Ray starts while the rest of fedsplit is being imported.
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp

from fedsplit.common.errors import EngineError, RunError
from fedsplit.flower.grid import InProcessGrid, PollingGrid
from fedsplit.plan.sections import RunSettings

Start = Callable[[ClientApp, int], Callable[[], Grid]]
_PATIENCE = 3.0  # seconds
_UNKNOWN = 0  # Flower's error code for what was raised around a ClientApp, not in it


@contextmanager
def engine(settings: RunSettings) -> Iterator[Start]:
    """Bring up the engine that the settings name, and stop it in the end.

    Yields
    ------
    callable
        Takes the ClientApp and the number of nodes, starts them, and returns a function that waits for their grid:
        it raises RunError if the engine does not come up. The grid raises EngineError if it stops later.
    """
    if settings.engine == "inline":
        yield lambda app, nodes: lambda: InProcessGrid(app, nodes)
        return
    # Training stays in the main thread: OpenMP gives every thread that computes its own helpers, and lets all of them
    # sleep between any two operations as soon as there are more than cores.
    runtime = _Flower(settings.ray_address)
    runtime.start()
    try:
        yield runtime.start_nodes
    finally:
        runtime.stop()


class _Flower(threading.Thread):
    """Flower's simulation runtime, in a thread that starts Ray and leaves it again.

    Ray is called from Flower's threads only. It ends the whole process if another thread calls it while it is being
    left, and on Linux its own processes are killed as soon as the thread that started them ends.

    Parameters
    ----------
    address : str or None
        Of the Ray to join; None starts a private one.
    """

    def __init__(self, address: str | None) -> None:
        super().__init__(name="flower-simulation", daemon=True)
        self.failure = "Flower's simulation runtime ended"
        self._address = address
        self._nodes: Queue[tuple[ClientApp, int] | None] = Queue()
        self._grids: Queue[Grid | None] = Queue()
        self._finished = threading.Event()
        self._sigterm = signal.getsignal(signal.SIGTERM)

    def start_nodes(self, app: ClientApp, nodes: int) -> Callable[[], Grid]:
        """Start some nodes; return the function that waits for their grid."""
        self._nodes.put((app, nodes))
        return self._grid

    def _grid(self) -> Grid:
        """Wait for the nodes' grid; raises RunError."""
        grid = self._grids.get()
        _set_sigterm(self._sigterm)
        if grid is None:
            raise RunError(self.failure)
        return _RayGrid(grid, self)

    def stop(self) -> None:
        """Stop Flower's runtime and leave Ray; what actors are still at is not waited for."""
        self._finished.set()
        self._nodes.put(None)
        self.join()
        _set_sigterm(self._sigterm)

    def run(self) -> None:
        """Start Ray, then Flower's runtime as soon as its nodes are known."""
        try:
            with running_ray(self._address):
                if (nodes := self._nodes.get()) is not None and not self._finished.is_set():
                    self._simulate(*nodes)
        except RunError as error:
            self.failure = str(error)
        except BaseException as error:  # Flower exits, too, where it does not like something
            while error.__cause__:
                error = error.__cause__
            self.failure = f"Flower's simulation runtime failed: {(str(error).splitlines() or ['no reason given'])[0]}"
        finally:
            self._grids.put(None)

    def _simulate(self, app: ClientApp, nodes: int) -> None:
        from flwr.simulation import run_simulation

        server_app = ServerApp()

        @server_app.main()
        def main(grid: Grid, context: Context) -> None:
            self._grids.put(grid)
            self._finished.wait()
            _kill_actors()  # which ends Flower's waiting for them: it leaves Ray after this function has returned

        run_simulation(
            server_app,
            app,
            num_supernodes=nodes,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        )


class _RayGrid(PollingGrid):
    """Flower's simulation grid, which sees when the engine behind it has stopped."""

    def __init__(self, grid: Grid, runtime: _Flower) -> None:
        super().__init__(grid)
        self._runtime = runtime

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes; raises EngineError if there is nothing left that runs them."""
        self._check_alive()
        return super().get_nodes()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come; raises EngineError if an actor died, or all of it."""
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            # Flower goes on without an actor that died, and answers for it: with another result, if nobody looked
            if reply.has_error() and reply.error.code == _UNKNOWN:
                raise EngineError((reply.error.reason or "no reason given").strip().splitlines()[0][:200])
        self._check_alive()
        return replies

    def _check_alive(self) -> None:
        if not self._runtime.is_alive():
            raise EngineError(self._runtime.failure)


def _kill_actors() -> None:
    """Kill all actors of this process; Flower has the handles for which Ray has a public function."""
    import ray
    from ray import ActorID
    from ray._private import state
    from ray._private.worker import global_worker

    if not ray.is_initialized():
        return  # Flower could not start its actors, and has left Ray by itself
    for identifier, actor in state.actors(job_id=global_worker.current_job_id).items():
        if actor["State"] != "DEAD":
            global_worker.core_worker.kill_actor(ActorID.from_hex(identifier), True)  # type: ignore[attr-defined]


@contextmanager
def running_ray(address: str | None = None, cpus: int | None = None) -> Iterator[None]:
    """Start a private Ray (with so many CPUs, or this machine's) or join the one at an address; leave it in the end.

    Raises
    ------
    RunError
        If Ray does not start.
    """
    sigterm = signal.getsignal(signal.SIGTERM)
    _start_ray(address, cpus)
    import ray

    _set_sigterm(sigterm)
    try:
        yield
    finally:
        ray.shutdown()


def _set_sigterm(handler: Any) -> None:
    """Put back what Python does at SIGTERM: Ray's own handler prints a stack trace of its C++ code first."""
    if threading.current_thread() is threading.main_thread():  # Python takes it from no other
        signal.signal(signal.SIGTERM, handler)


def _start_ray(address: str | None, cpus: int | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what later versions of Ray do; saves a warning
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    import ray

    if ray.is_initialized():
        raise RunError("Ray is in use in this process already: call ray.shutdown() first")
    # Started here and not by Flower, so that a failure is raised here; "local", so that no other cluster of this
    # machine is joined. Actors need this process's import path: those of a private Ray inherit it, which is quicker
    # than a runtime environment, for which no worker waits ready.
    path = {"PYTHONPATH": os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])}
    if address:
        _check_reachable(address)
    own = {"address": "local", "include_dashboard": False, "num_cpus": cpus}
    joined = {"address": address, "runtime_env": {"env_vars": path}}
    try:
        with _environment(path):
            ray.init(**(joined if address else own), log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        where = f" at run.ray-address {address!r}" if address else ""
        raise RunError(f"Ray did not start{where}: {str(error).splitlines()[0]}") from None


def _check_reachable(address: str) -> None:
    """Refuse an address at which nothing listens, for which Ray would wait for minutes; raises RunError."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as error:  # the latter for a port beyond 65535
        raise RunError(f"no Ray at run.ray-address {address!r}: {getattr(error, 'strerror', error)}") from None


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
