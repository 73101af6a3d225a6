"""From settings to the server's strategy."""

from fedsplit.common.seeds import scheduled
from fedsplit.model.tasks.targets import Withheld
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.profiles import ProfileSettings
from fedsplit.plan.schedule import Schedule
from fedsplit.plan.settings import Settings
from fedsplit.runs.folder import RunFolder
from fedsplit.server.aggregation import Aggregation, FirstLayerServer, Frozen, build_strategy
from fedsplit.server.at_home import LabelsAtHome
from fedsplit.server.body import Body
from fedsplit.server.learning import SharedLabels
from fedsplit.server.novelty.trunk import NoveltyTrunk
from fedsplit.server.pace import Pace, RealTime, own_pace
from fedsplit.server.parts import Parts
from fedsplit.server.progress import Progress, ProtocolOptions
from fedsplit.server.roster import Owners, Roster
from fedsplit.server.rounds import SplitStrategy
from fedsplit.server.trunk import Trunk, TrunkOptions
from fedsplit.server.virtual.calibration import record_seconds
from fedsplit.server.virtual.clock import VirtualClock
from fedsplit.server.virtual.pace import OnClock
from fedsplit.server.virtual.profile import Profile
from fedsplit.wire.sizes import Sizes


def split_strategy(
    experiment: Experiment,
    run: int,
    owners: Owners | None = None,
    *,
    secret_noise: bool = False,
    kind: type[Trunk] | None = None,
) -> SplitStrategy:
    """Return the server's strategy before its first round.

    Parameters
    ----------
    experiment : Experiment
    run : int
        Names the run in the nodes' state folders.
    owners : callable, optional
        As in :class:`fedsplit.server.roster.Roster`.
    secret_noise : bool
        Whether the random numbers of the first layer's strategy are independent of the seed, which nodes know.
    kind : type of Trunk, optional
        Default: the trunk of the task and of where the labels are.
    """
    settings, source = experiment.settings, experiment.source
    at_home = settings.protocol.at_home
    trunk = _trunk(experiment, kind or (Body if at_home else NoveltyTrunk if source.task.watches else Trunk))
    parts = Parts(
        trunk=trunk,
        first_layer=_aggregation(experiment, secret_noise=secret_noise),
        layer=experiment.model.first_layer,
        schedule=_schedule(settings),
        roster=Roster(source.count, settings.protocol.max_offences, owners),
        options=_options(experiment),
        progress=Progress(run),
        targets=Withheld() if at_home else source.task.targets(source.outputs),
    )
    pace = _pace(experiment, parts)
    learner = LabelsAtHome(parts, trunk, pace) if isinstance(trunk, Body) else SharedLabels(parts)
    return SplitStrategy(parts, pace, learner)


def _trunk(experiment: Experiment, kind: type[Trunk]) -> Trunk:
    settings, source, model = experiment.settings, experiment.source, experiment.model
    options = TrunkOptions(
        **settings.trunk.model_dump(exclude={"replay_mb"}),
        batch_size=settings.protocol.batch_size,
        epochs=settings.protocol.trunk_epochs,
    )
    shape, run = model.first_layer.cut_shape, settings.run
    scheduled(options.lr, options.schedule, 1, run.rounds)  # raises, before anything starts
    built = kind(model.trunk, shape, source.task, source.outputs, options, run.rounds, run.seed)
    if options.args or ":" in options.optimizer:
        built.optimizer  # noqa: B018  raises
    return built


def _aggregation(experiment: Experiment, *, secret_noise: bool) -> Aggregation:
    settings, weights = experiment.settings, experiment.model.first_layer.initial_weights()
    if not settings.teaches:
        return Frozen(weights)
    chosen, run = settings.first_layer, settings.run
    scheduled(chosen.lr, chosen.schedule, 1, run.rounds)  # raises, before anything starts
    strategy, seed = build_strategy(chosen.strategy, chosen.args), None if secret_noise else run.seed
    return FirstLayerServer(strategy, weights, chosen.lr, chosen.schedule, run.rounds, seed=seed)


def _schedule(settings: Settings) -> Schedule:
    protocol, devices, run = settings.protocol, settings.devices, settings.run
    return Schedule(
        protocol.facts.once,
        protocol.chunk,
        devices.fraction,
        run.rounds,
        run.seed,
        devices.sampling,
        devices.over_sampling,
    )


def _options(experiment: Experiment) -> ProtocolOptions:
    settings, source = experiment.settings, experiment.source
    protocol, mode, replay_mb = settings.protocol, settings.protocol.facts, settings.trunk.replay_mb
    on_clock = settings.devices.profile is not None  # whose matter are the least devices and the deadline
    same = settings.dropping.mask == "keyed" or experiment.policy.deterministic
    return ProtocolOptions(
        mode=mode,
        rounds=settings.run.rounds,
        dtype=protocol.dtype,
        max_staleness=protocol.max_staleness,
        staleness_weight=protocol.staleness_weight,
        min_nodes=1 if on_clock else protocol.min_nodes,
        timeout=protocol.timeout,
        max_offences=protocol.max_offences,
        devices=source.count,
        test_devices=source.test_devices,
        evaluate_every=settings.run.evaluate_every,
        donors=settings.donors,
        deadline=None if on_clock else protocol.deadline,
        asks_again=not mode.teaches and same,
        replay_bytes=None if replay_mb is None else int(replay_mb * 1e6),
    )


def _pace(experiment: Experiment, parts: Parts) -> Pace:
    profile, own = experiment.settings.devices.profile, experiment.settings.protocol.pace
    if profile:
        return _on_clock(experiment, profile, parts)
    return own_pace(own, parts) if own else RealTime(parts)


def _on_clock(experiment: Experiment, profile: ProfileSettings, parts: Parts) -> OnClock:
    protocol, source, seed = experiment.settings.protocol, experiment.source, experiment.settings.run.seed
    value = 2 if protocol.dtype == "float16" else 4
    return OnClock(
        parts,
        VirtualClock(
            Profile.of(profile, source.count, seed), min(protocol.timeout, protocol.deadline or protocol.timeout), seed
        ),
        Sizes(parts.layer.size, parts.layer.width, value, experiment.policy.code.bits, parts.targets.columns),
        _record_seconds(experiment, profile),
        protocol.min_nodes,
        alone=experiment.settings.guard.enforces,
    )


def _record_seconds(experiment: Experiment, profile: ProfileSettings) -> tuple[float, float]:
    release, gradient = profile.release_seconds, profile.gradient_seconds
    if release is None or gradient is None:
        measured = record_seconds(experiment.model.first_layer, experiment.policy, experiment.settings.protocol.dtype)
        release, gradient = (m if g is None else g for g, m in zip((release, gradient), measured, strict=True))
    return release, gradient


def calibrated(settings: Settings, folder: RunFolder | None = None) -> Settings:
    """Return the settings with what a profile says of this machine, measured where it is not given.

    ``folder`` is that of a run that goes on: what it has noted is not measured again.
    """
    profile = settings.devices.profile
    if profile is None or None not in (profile.release_seconds, profile.gradient_seconds):
        return settings
    if folder is not None and folder.config.exists():
        noted = folder.settings().devices.profile or profile
        missing = [name for name in ("release_seconds", "gradient_seconds") if getattr(profile, name) is None]
        profile = profile.model_copy(update={name: getattr(noted, name) for name in missing})
    release, gradient = _record_seconds(Experiment(settings), profile)
    measured = profile.model_copy(update={"release_seconds": release, "gradient_seconds": gradient})
    return settings.model_copy(update={"devices": settings.devices.model_copy(update={"profile": measured})})
