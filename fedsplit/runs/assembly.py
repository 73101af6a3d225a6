"""From settings to the server's strategy."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from fedsplit.plan.experiment import Experiment
from fedsplit.plan.schedule import Schedule
from fedsplit.plan.settings import ProfileSettings, Settings
from fedsplit.runs.folder import RunFolder
from fedsplit.server.aggregation import FirstLayerServer, build_strategy
from fedsplit.server.at_home import AtHomeStrategy
from fedsplit.server.body import Body
from fedsplit.server.novelty.trunk import NoveltyTrunk
from fedsplit.server.progress import ProtocolOptions
from fedsplit.server.roster import Owners, Roster
from fedsplit.server.rounds import SplitStrategy
from fedsplit.server.trunk import Trunk, TrunkOptions
from fedsplit.server.virtual.calibration import record_seconds
from fedsplit.server.virtual.clock import VirtualClock
from fedsplit.server.virtual.profile import Profile
from fedsplit.server.virtual.strategy import VirtualStrategy
from fedsplit.wire.sizes import Sizes


def split_strategy(
    experiment: Experiment,
    run: int,
    owners: Owners | None = None,
    *,
    secret_noise: bool = False,
) -> SplitStrategy:
    """Return the server's strategy before its first round; ``owners`` as in :class:`fedsplit.server.roster.Roster`.

    With ``secret_noise`` what the first layer's strategy draws does not follow from the seed, which nodes know.
    """
    settings, source, model = experiment.settings, experiment.source, experiment.model
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
        and (settings.dropping.mask == "keyed" or experiment.policy.deterministic),
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
        kind = partial(VirtualStrategy, **_virtual(experiment, devices.profile))
    return kind(trunk, first_layer, layer, schedule, options, run, roster=roster)


def _virtual(experiment: Experiment, profile: ProfileSettings) -> dict[str, Any]:
    settings, source, layer = experiment.settings, experiment.source, experiment.model.first_layer
    protocol, seed, policy = settings.protocol, settings.run.seed, experiment.policy
    limit = min(protocol.timeout, protocol.deadline or protocol.timeout)
    columns = source.outputs if source.task == "regression" else None
    return {
        "clock": VirtualClock(Profile.of(profile, source.count, seed), limit, seed),
        "sizes": Sizes(layer.size, layer.width, 2 if protocol.dtype == "float16" else 4, policy.bits, columns),
        "record_seconds": _record_seconds(experiment, profile),
        "min_devices": protocol.min_nodes,
    }


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
