"""What is done before a run's first round: what would end it half-way is refused, public records are learned from."""

from fedsplit.audit.transcript import Subjects
from fedsplit.common.errors import ConfigError
from fedsplit.plan.experiment import Experiment
from fedsplit.runs.folder import RunFolder
from fedsplit.server.rounds import SplitStrategy
from fedsplit.server.warmup import PublicOnly, WarmUp, public_release, warm_up


def check_startable(experiment: Experiment, strategy: SplitStrategy) -> None:
    """Refuse what would end a simulation half-way: read every device's records once, look at the clock's settings.

    Raises
    ------
    FedsplitError
    """
    source, settings = experiment.source, experiment.settings
    records = {device: len(source.device(device).train) for device in range(source.count)}
    strategy.pace.check_startable({d: n for d, n in records.items() if n and d not in settings.donors})


def choose_subjects(experiment: Experiment, folder: RunFolder) -> None:
    """Note the originals of the records that an audit will attack, unless it has been done."""
    settings, recordings = experiment.settings, folder.recordings
    targets = settings.audit.targets
    if targets and not Subjects.are_in(recordings):
        chosen = Subjects.choose(experiment.source, experiment.public, settings.donors, targets, settings.run.seed)
        chosen.save(recordings)


def learn_from_public_records(experiment: Experiment, strategy: SplitStrategy) -> None:
    """Warm both halves up; in a resumed run again, since the public-only model begins there."""
    settings, model, records = experiment.settings, experiment.model, experiment.public
    chosen = settings.public
    if chosen is None or records is None or not chosen.epochs:
        return
    seed, policy = settings.run.seed, experiment.policy
    options = WarmUp(chosen.epochs, chosen.lr, settings.protocol.batch_size, chosen.penalty)
    warm_up(model, records, experiment.source.task, policy, options, seed)
    public = public_release(model, records, policy, settings.protocol.dtype, seed)
    strategy.first_layer.weights = model.first_layer.initial_weights()
    if not strategy.options.mode.teaches:
        most = strategy.options.replay_bytes
        if most is not None and public.nbytes > most:
            raise ConfigError(f"trunk.replay-mb must be at least {public.nbytes / 1e6:.3g}, which public records take")
        strategy.progress.replay = {0: public}
    strategy.learner.compare = PublicOnly(strategy.trunk, public, settings.run.rounds).compare
