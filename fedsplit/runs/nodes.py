"""From settings to the nodes of a run: simulated ones, and real ones in their own folders."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path

import numpy as np

from fedsplit.audit.transcript import record_exchange
from fedsplit.common.errors import ConfigError
from fedsplit.data import DeviceData, open_own
from fedsplit.device.at_home import AtHomeNode
from fedsplit.device.home import Home
from fedsplit.device.node import Node
from fedsplit.device.pending import NodeState
from fedsplit.guard.accountant import ExposureAccountant
from fedsplit.guard.guard import Guard
from fedsplit.model.head import Head
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.named_code import names_code
from fedsplit.plan.preflight import check_limits
from fedsplit.plan.settings import Settings
from fedsplit.release.streams import simulation_secret
from fedsplit.runs.folder import RunFolder

_KNOWN_DEVICES = 256  # of a real node: those whose records were compared with the ones it knows
_CACHED_BYTES = 2**28  # of a user's own data, in each process of a run; packaged data sets are shared arrays


@lru_cache(maxsize=4)
def _opened(settings_json: str) -> Experiment:
    experiment = Experiment(Settings.from_json(settings_json))
    if experiment.settings.data.name is None:
        experiment.source = replace(experiment.source, load=_cached(experiment.source.load))
    return experiment


def _cached(load: Callable[[int], DeviceData]) -> Callable[[int], DeviceData]:
    """Keep what is loaded while there is room, first come first served: devices come in turns, so the last would go."""
    kept: dict[int, DeviceData] = {}
    room = _CACHED_BYTES

    def cached(device: int) -> DeviceData:
        nonlocal room
        if device in kept:
            return kept[device]
        data = load(device)
        arrays = [a for r in (data.train, data.test) for a in (r.x, r.y, r.segments) if a is not None]
        size = sum(a.nbytes for a in arrays)
        if size <= room:
            kept[device], room = data, room - size
        return data

    return cached


@lru_cache(maxsize=4096)
def simulated_node(settings_json: str, partition: int, partitions: int, folder: str) -> Node:
    """Return a virtual node, the same object as long as this process lives.

    Devices are dealt to nodes in order. Secrets derive from the seed; what must outlive the process is below
    ``folder``.

    Raises
    ------
    ConfigError
        If there are more nodes than devices.
    """
    experiment = _opened(settings_json)
    settings, source, layer = experiment.settings, experiment.source, experiment.model.first_layer
    if partitions > source.count:
        raise ConfigError(f"{partitions} nodes for {source.count} devices: lower the number of nodes")
    seed = settings.run.seed
    own_limits = experiment.limits
    enforce = own_limits.enforce and settings.guard.mode == "enforce"
    owner = sha256(b"%d %d %d" % (seed, partition, partitions)).digest()

    def home(run: int) -> Path:
        return Path(folder) / f"{run:x}" / str(partition)

    def guard(run: int, ledger: str) -> Guard:
        path = home(run) / f"ledger-{ledger}.npz"
        if not home(run).exists():  # a virtual node is born with its first exchange; a ledger lost later is refused
            home(run).mkdir(parents=True, mode=0o700)
            for name in ("train", "test"):
                ExposureAccountant.create(home(run) / f"ledger-{name}.npz", owner)
        return Guard(own_limits, ExposureAccountant(path, owner, durable=False), layer, enforce=enforce)

    recorder = partial(record_exchange, RunFolder(Path(folder).parent).recordings, partition)
    return _node_kind(experiment)(
        layer,
        experiment.policy,
        np.array_split(np.arange(source.count), partitions)[partition].tolist(),
        source.device,
        lambda device: simulation_secret(seed, device),
        lambda run: NodeState(home(run)),
        guard,
        dtype=settings.protocol.dtype,
        keyed=settings.dropping.mask == "keyed",
        record=recorder if settings.audit.targets else None,
    )


@lru_cache(maxsize=4)
def real_node(settings_json: str, folder: str, data: str | None = None) -> Node:
    """Return a real node, whose folder ``fedsplit node init`` has made; its guard enforces the owner's limits.

    ``data`` is the folder or file with the node's own records; without it they are those that the settings name.

    Raises
    ------
    FedsplitError
        If something of the folder is missing or damaged, or its owner does not allow the run.
    """
    home = Home(Path(folder))
    _check_allowed(Settings.from_json(settings_json), home.allowed)
    experiment = _opened(settings_json)
    settings, source, layer = experiment.settings, experiment.source, experiment.model.first_layer
    if data is not None:
        source = open_own(data, home.devices, source)
    if home.limits.enforce:
        check_limits(settings, source, layer, home.limits, home.devices)
    return _node_kind(experiment)(
        layer,
        experiment.policy,
        home.devices,
        lru_cache(maxsize=_KNOWN_DEVICES)(lambda device: home.known(device, source.device(device))),
        home.device_secret,
        lambda run: NodeState(home.run_folder(run)),
        lambda run, ledger: home.guard(ledger, layer),
        dtype=settings.protocol.dtype,
        keyed=settings.dropping.mask == "keyed",
    )


def _node_kind(experiment: Experiment) -> Callable[..., Node]:
    if experiment.settings.protocol.labels == "shared":
        return Node
    return partial(AtHomeNode, head=Head.of(experiment.model.trunk, experiment.source.task))


def _check_allowed(settings: Settings, allowed: Sequence[str]) -> None:
    """Refuse settings, which are the server's, that name code or files of this machine; raises ConfigError."""
    folder = {"data.folder": settings.data.folder} if settings.data.folder is not None else {}
    for key, name in {**names_code(settings, on_nodes=True), **folder}.items():
        if name not in allowed:
            raise ConfigError(f"{key} {name!r} is not among what the node's owner allows (allow in node.toml)")
