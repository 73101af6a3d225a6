"""From settings to the parts of a run: data source, model, dropping, a node's devices, the server's strategy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsplit.audit.transcript import record_exchange
from fedsplit.common.errors import ConfigError, DataError
from fedsplit.data import DeviceData, Records, Source, open_own, open_source, read_records
from fedsplit.data.loading import resolve_function
from fedsplit.device.at_home import AtHomeNode
from fedsplit.device.home import Home
from fedsplit.device.node import Node
from fedsplit.device.pending import NodeState
from fedsplit.guard.accountant import ExposureAccountant
from fedsplit.guard.guard import Guard
from fedsplit.guard.limits import SHIPPED, Limits, load_limits
from fedsplit.model.head import Head, cut_head
from fedsplit.model.layer import SplitModel, build_model
from fedsplit.plan.preflight import check_limits
from fedsplit.plan.schedule import Schedule, seed_of
from fedsplit.plan.settings import ProfileSettings, Settings, load_settings
from fedsplit.release.policies import Dropping, simulation_secret
from fedsplit.server.aggregation import FirstLayerServer, build_strategy
from fedsplit.server.at_home import AtHomeStrategy
from fedsplit.server.body import Body
from fedsplit.server.novelty.trunk import NoveltyTrunk
from fedsplit.server.roster import Owners, Roster
from fedsplit.server.rounds import ProtocolOptions, SplitStrategy
from fedsplit.server.trunk import Trunk, TrunkOptions
from fedsplit.server.virtual.calibration import record_seconds
from fedsplit.server.virtual.clock import VirtualClock
from fedsplit.server.virtual.profile import Profile
from fedsplit.server.virtual.strategy import VirtualStrategy
from fedsplit.wire.sizes import Sizes

_KNOWN_DEVICES = 256  # of a real node: those whose records were compared with the ones it knows
_CACHED_BYTES = 2**28  # of a user's own data, in each process of a run; packaged data sets are shared arrays


def data_source(settings: Settings) -> Source:
    """Open the data that the settings name; raises ConfigError or DataError."""
    data, devices = settings.data, settings.devices
    source = open_source(
        name=data.name,
        folder=data.folder,
        builder=data.builder,
        task=data.task,
        outputs=data.outputs,
        count=devices.count,
        test=tuple(devices.test) if isinstance(devices.test, list) else devices.test,
        partition=devices.partition,
        alpha=devices.alpha,
        seed=settings.run.seed,
        overlap=data.overlap,
        novel=data.novel,
        shape=tuple(data.shape) if data.shape else None,
    )
    if source.task == "novelty" and settings.protocol.mode != "release-once":
        raise ConfigError(
            f"a novelty task is for protocol.mode 'release-once', not {settings.protocol.mode!r}: only releases of one "
            "first layer tell what is normal"
        )
    return source


def _trunk_outputs(settings: Settings, source: Source) -> int:
    """Return how many outputs the trunk has: of a novelty task also those for the recordings of ``public.file``."""
    also = source.task == "novelty" and settings.public is not None and settings.public.file is not None
    return source.trunk_outputs + (source.outputs if also else 0)


def public_records(settings: Settings, source: Source) -> Records | None:
    """Return the records that nobody has to protect, if the settings name any.

    Raises
    ------
    ConfigError
        If a device that gives its records is also one that is tested, or there is no such device.
    DataError
        If they cannot be read, or share a record with a device that does not give it.
    """
    chosen = settings.public
    if chosen is None:
        return None
    donors = settings.donors
    if tested := sorted(set(donors) & set(source.test_devices)):
        raise ConfigError(f"public.devices: device {tested[0]} is a test device")
    if wrong := [d for d in donors if d >= source.count]:
        raise ConfigError(f"public.devices: device {wrong[0]} does not exist: ids are 0..{source.count - 1}")
    if chosen.file is not None:
        public = read_records(chosen.file, source)
        if source.task == "novelty":  # as if of one device more
            public = Records(public.x, public.y + source.trunk_outputs)
    else:
        given = [source.device(device).train for device in donors]
        first = [device * source.outputs if source.task == "novelty" else 0 for device in donors]  # their recordings
        labels = [records.y + n for records, n in zip(given, first, strict=True)]
        public = Records(np.concatenate([r.x for r in given]), np.concatenate(labels))
    if not len(public):
        raise ConfigError("public: there are no records")
    _check_disjoint(public, source, donors)
    return public


def _check_disjoint(public: Records, source: Source, donors: Sequence[int]) -> None:
    known = {row.tobytes() for row in public.x}
    if source.absent:
        return  # each node has its own, and nobody can compare them
    for device in range(source.count):
        data = source.device(device)
        if device not in donors and any(row.tobytes() in known for part in (data.train, data.test) for row in part.x):
            raise DataError(f"public records overlap with those of device {device}, which does not give them")


def split_model(settings: Settings, source: Source) -> SplitModel:
    """Build the model with the run's seed and check that data and dropping fit it; raises ConfigError."""
    model = settings.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(settings.run.seed, "model"))
        if model.builder is not None:
            built = resolve_function(model.builder, "model.builder")()
            if not isinstance(built, SplitModel):
                raise ConfigError(
                    f"model.builder {model.builder!r} must return a SplitModel, not {type(built).__name__}"
                )
        else:
            assert model.name is not None
            outputs = _trunk_outputs(settings, source)
            built = build_model(model.name, source.input_shape, outputs, model.width, model.activation)
    _check_fit(built, source, _trunk_outputs(settings, source))
    if settings.protocol.labels == "at-home":
        cut_head(built.trunk)  # raises
    dropping(settings).check_layer(built.first_layer.width, built.first_layer.positive_only)
    return built


def _check_fit(model: SplitModel, source: Source, outputs: int) -> None:
    first = model.first_layer
    if first.input_shape != source.input_shape:
        raise ConfigError(f"the model takes records of shape {first.input_shape}, the data's have {source.input_shape}")
    model.trunk.eval()  # a trial must not change running statistics
    try:
        shape = tuple(model.trunk(torch.zeros(2, *first.cut_shape, requires_grad=True)).shape)
    except RuntimeError:  # also where it begins with a module that changes them in place
        raise ConfigError(f"the trunk does not take cut activations of shape {first.cut_shape}") from None
    model.trunk.train()
    if shape != (2, outputs):
        raise ConfigError(
            f"the trunk must return {outputs} outputs per record (the data's), it returns shape {shape[1:]}"
        )


def dropping(settings: Settings) -> Dropping:
    """Return the dropping policy."""
    chosen = settings.dropping
    return Dropping(
        chosen.policy,
        keep=chosen.keep or 1.0,
        k=chosen.k or 0,
        bits=chosen.bits or 0,
        clip=chosen.clip or 0.0,
        noise=chosen.noise or 0.0,
    )


def limits(settings: Settings) -> Limits:
    """Return the limits that a simulation's guard goes by."""
    return load_limits(settings.guard.limits or SHIPPED)


def num_nodes(settings: Settings, source: Source) -> int:
    """Return how many nodes a simulation has."""
    return math.ceil(source.count / settings.devices.per_node)


@lru_cache(maxsize=4)
def _opened(settings_json: str) -> tuple[Settings, Source, SplitModel]:
    settings = Settings.from_json(settings_json)
    source = data_source(settings)
    if settings.data.name is None:
        source = replace(source, load=_cached(source.load))
    return settings, source, split_model(settings, source)


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
    settings, source, model = _opened(settings_json)
    if partitions > source.count:
        raise ConfigError(f"{partitions} nodes for {source.count} devices: lower the number of nodes")
    seed = settings.run.seed
    own_limits = limits(settings)
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
        return Guard(own_limits, ExposureAccountant(path, owner, durable=False), model.first_layer, enforce=enforce)

    node = _node_kind(settings, source, model)
    recorder = partial(record_exchange, Path(folder).parent / "audit" / "exchanges", partition)
    return node(
        model.first_layer,
        dropping(settings),
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
    settings, source, model = _opened(settings_json)
    if data is not None:
        source = open_own(data, home.devices, source)
    if home.limits.enforce:
        check_limits(settings, source, model.first_layer, home.limits, home.devices)
    node = _node_kind(settings, source, model)
    return node(
        model.first_layer,
        dropping(settings),
        home.devices,
        lru_cache(maxsize=_KNOWN_DEVICES)(lambda device: home.known(device, source.device(device))),
        home.device_secret,
        lambda run: NodeState(home.run_folder(run)),
        lambda run, ledger: home.guard(ledger, model.first_layer),
        dtype=settings.protocol.dtype,
        keyed=settings.dropping.mask == "keyed",
    )


def _node_kind(settings: Settings, source: Source, model: SplitModel) -> Callable[..., Node]:
    if settings.protocol.labels == "shared":
        return Node
    return partial(AtHomeNode, head=Head.of(model.trunk, source.task))


def _check_allowed(settings: Settings, allowed: Sequence[str]) -> None:
    """Refuse settings, which are the server's, that name code or files of this machine; raises ConfigError."""
    data, model = settings.data, settings.model
    for key, name in {"model.builder": model.builder, "data.builder": data.builder, "data.folder": data.folder}.items():
        if name is not None and name not in allowed:
            raise ConfigError(f"{key} {name!r} is not among what the node's owner allows (allow in node.toml)")


def split_strategy(
    settings: Settings,
    source: Source,
    model: SplitModel,
    run: int,
    owners: Owners | None = None,
    *,
    secret_noise: bool = False,
) -> SplitStrategy:
    """Return the server's strategy before its first round; ``owners`` as in :class:`fedsplit.server.roster.Roster`.

    With ``secret_noise`` what the first layer's strategy draws does not follow from the seed, which nodes know.
    """
    chosen, protocol, seed, rounds = settings.first_layer, settings.protocol, settings.run.seed, settings.run.rounds
    layer = model.first_layer
    first_layer = None
    if chosen.strategy != "frozen" and protocol.mode != "release-once":
        strategy = build_strategy(chosen.strategy, chosen.args)
        first_layer = FirstLayerServer(
            strategy,
            layer.initial_weights(),
            chosen.lr,
            chosen.schedule,
            rounds,
            seed=None if secret_noise else seed,
        )
    trunk_options = TrunkOptions(
        **settings.trunk.model_dump(exclude={"replay_mb"}), batch_size=protocol.batch_size, epochs=protocol.trunk_epochs
    )
    at_home = protocol.labels == "at-home"
    half = Body if at_home else NoveltyTrunk if source.task == "novelty" else Trunk
    trunk = half(model.trunk, layer.cut_shape, source.task, source.outputs, trunk_options, rounds, seed)
    options = ProtocolOptions(
        mode=protocol.mode,
        rounds=rounds,
        dtype=protocol.dtype,
        max_staleness=protocol.max_staleness,
        staleness_weight=protocol.staleness_weight,
        min_nodes=protocol.min_nodes,
        timeout=protocol.timeout,
        max_offences=protocol.max_offences,
        devices=source.count,
        test_devices=source.test_devices,
        evaluate_every=settings.run.evaluate_every,
        donors=settings.donors,
        deadline=protocol.deadline,
        asks_again=protocol.mode == "release-once"
        and (settings.dropping.mask == "keyed" or dropping(settings).deterministic),
        replay_bytes=None if settings.trunk.replay_mb is None else int(settings.trunk.replay_mb * 1e6),
    )
    devices = settings.devices
    schedule = Schedule(
        protocol.once, protocol.chunk, devices.fraction, rounds, seed, devices.sampling, devices.over_sampling
    )
    roster = Roster(source.count, protocol.max_offences, owners)
    kind: Callable[..., SplitStrategy] = AtHomeStrategy if at_home else SplitStrategy
    if devices.profile:
        options = replace(options, min_nodes=1, deadline=None)  # which are the clock's matter
        kind = partial(VirtualStrategy, **_virtual(settings, devices.profile, source, model))
    return kind(trunk, first_layer, layer, schedule, options, run, roster=roster)


def _virtual(settings: Settings, profile: ProfileSettings, source: Source, model: SplitModel) -> dict[str, Any]:
    protocol, seed, layer, policy = settings.protocol, settings.run.seed, model.first_layer, dropping(settings)
    limit = min(protocol.timeout, protocol.deadline or protocol.timeout)
    columns = source.outputs if source.task == "regression" else None
    return {
        "clock": VirtualClock(Profile.of(profile, source.count, seed), limit, seed),
        "sizes": Sizes(layer.size, layer.width, 2 if protocol.dtype == "float16" else 4, policy.bits, columns),
        "record_seconds": _record_seconds(settings, profile, model),
        "min_devices": protocol.min_nodes,
    }


def _record_seconds(settings: Settings, profile: ProfileSettings, model: SplitModel) -> tuple[float, float]:
    release, gradient = profile.release_seconds, profile.gradient_seconds
    if release is None or gradient is None:
        measured = record_seconds(model.first_layer, dropping(settings), settings.protocol.dtype)
        release, gradient = (m if g is None else g for g, m in zip((release, gradient), measured, strict=True))
    return release, gradient


def calibrated(settings: Settings, folder: Path | None = None) -> Settings:
    """Return the settings with what a profile says of this machine, measured where it is not given.

    ``folder`` is that of a run that goes on: what it has noted is not measured again.
    """
    profile = settings.devices.profile
    if profile is None or None not in (profile.release_seconds, profile.gradient_seconds):
        return settings
    if folder is not None and (folder / "config.toml").exists():
        noted = load_settings(folder / "config.toml").devices.profile or profile
        missing = [name for name in ("release_seconds", "gradient_seconds") if getattr(profile, name) is None]
        profile = profile.model_copy(update={name: getattr(noted, name) for name in missing})
    release, gradient = _record_seconds(settings, profile, split_model(settings, data_source(settings)))
    measured = profile.model_copy(update={"release_seconds": release, "gradient_seconds": gradient})
    return settings.model_copy(update={"devices": settings.devices.model_copy(update={"profile": measured})})
