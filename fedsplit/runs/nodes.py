"""The nodes of a simulation, from what each needs to know of the run; and a run's terms from its settings file."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Self

import numpy as np

from fedsplit.audit.transcript import record_exchange
from fedsplit.common.errors import ConfigError
from fedsplit.common.tables import Section
from fedsplit.data import DeviceData, Source
from fedsplit.device.home import Home
from fedsplit.device.node import Node
from fedsplit.device.nodes import check_allowed, node_kind, open_records
from fedsplit.device.pending import NodeState
from fedsplit.guard.accountant import ExposureAccountant
from fedsplit.guard.guard import Guard
from fedsplit.guard.limits import Limits
from fedsplit.model.layer import FirstLayer
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.named_code import names_code
from fedsplit.plan.settings import load_settings
from fedsplit.release.policy import Policy
from fedsplit.release.streams import simulation_secret
from fedsplit.runs.folder import RunFolder
from fedsplit.wire.terms import Terms

_CACHED_BYTES = 2**28  # of a user's own data, in each process of a run; packaged data sets are shared arrays


class Simulated(Section):
    """What a simulation tells its nodes: the terms, and what real nodes have from their owners.

    Attributes
    ----------
    terms : Terms
        Their seed makes the devices' secrets, too.
    limits : Limits
    enforce : bool
        Whether the guard refuses, or counts what it would refuse.
    audited : bool
        Whether every exchange is recorded.
    """

    terms: Terms
    limits: Limits
    enforce: bool
    audited: bool

    @classmethod
    def of(cls, experiment: Experiment) -> Self:
        """Return what a run's nodes are told; raises FedsplitError."""
        settings, limits = experiment.settings, experiment.limits
        enforce = limits.enforce and settings.guard.enforces
        return cls(terms=experiment.terms, limits=limits, enforce=enforce, audited=bool(settings.audit.targets))

    def to_json(self) -> str:
        """Return it as one line."""
        return self.model_dump_json(by_alias=True)


@lru_cache(maxsize=4)
def _opened(simulated_json: str) -> tuple[Simulated, Policy, FirstLayer, Source]:
    simulated = Simulated.model_validate_json(simulated_json)
    source = open_records(simulated.terms)
    if simulated.terms.data.name is None:
        source = replace(source, load=_cached(source.load))
    named = simulated.terms.named().values()  # the settings' own
    policy = simulated.terms.model.dropping.built(named)
    return simulated, policy, simulated.terms.model.build(policy, named), source


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
def simulated_node(simulated_json: str, partition: int, partitions: int, folder: str) -> Node:
    """Return a virtual node. It is the same object as long as this process lives.

    Devices are dealt to nodes in order. Their secrets derive from the seed.

    Parameters
    ----------
    simulated_json : str
        A :class:`Simulated` as JSON.
    partition, partitions : int
        The node's number from 0, and how many nodes there are.
    folder : str
        Holds below it everything of the node that must outlive the process.

    Raises
    ------
    ConfigError
        If there are more nodes than devices.
    """
    simulated, policy, layer, source = _opened(simulated_json)
    if partitions > source.count:
        raise ConfigError(f"{partitions} nodes for {source.count} devices: lower the number of nodes")
    seed = simulated.terms.seed
    owner = sha256(b"%d %d %d" % (seed, partition, partitions)).digest()

    def home(run: int) -> Path:
        return Path(folder) / f"{run:x}" / str(partition)

    def guard(run: int, ledger: str) -> Guard:
        path = home(run) / f"ledger-{ledger}.npz"
        if not home(run).exists():  # a virtual node is born with its first exchange; a ledger lost later is refused
            home(run).mkdir(parents=True, mode=0o700)
            for name in ("train", "test"):
                ExposureAccountant.create(home(run) / f"ledger-{name}.npz", owner)
        accountant = ExposureAccountant(path, owner, durable=False)
        return Guard(simulated.limits, accountant, layer, enforce=simulated.enforce)

    recorder = partial(record_exchange, RunFolder(Path(folder).parent).recordings, partition)
    return node_kind(simulated.terms)(
        layer,
        policy,
        np.array_split(np.arange(source.count), partitions)[partition].tolist(),
        source.device,
        lambda device: simulation_secret(seed, device),
        lambda run: NodeState(home(run)),
        guard,
        record=recorder if simulated.audited else None,
    )


@lru_cache(maxsize=4)
def simulated_by(path: str) -> str:
    """Return what a settings file tells the nodes of its simulation; raises FedsplitError."""
    return Simulated.of(Experiment(load_settings(path))).to_json()


@lru_cache(maxsize=4)
def terms_by(path: str, home: str) -> str:
    """Return the terms that a settings file means, to a real node whose owner allows what it names.

    Raises
    ------
    FedsplitError
    """
    settings = load_settings(path)
    folder = {} if settings.data.folder is None else {"data.folder": settings.data.folder}
    named = {**names_code(settings, on_nodes=True), **folder}  # the model's, too: it is built here, and data are opened
    check_allowed(named, Home(Path(home)).allowed)
    return Experiment(settings).terms.to_json()
