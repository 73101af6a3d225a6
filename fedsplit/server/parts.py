"""What a run is composed of and lasts through all of its rounds."""

from dataclasses import dataclass

from fedsplit.model.layer import FirstLayer
from fedsplit.model.tasks.targets import Targets
from fedsplit.plan.schedule import Schedule
from fedsplit.server.aggregation import Aggregation
from fedsplit.server.progress import Progress, ProtocolOptions
from fedsplit.server.roster import Roster
from fedsplit.server.trunk import Trunk


@dataclass(frozen=True)
class Parts:
    """The parts of a run.

    Attributes
    ----------
    trunk : Trunk
        Never leaves the server.
    first_layer : Aggregation
        Its weights, and what steps them.
    layer : FirstLayer
        The shapes of the first layer.
    schedule : Schedule
        Which records each device releases in which round.
    roster : Roster
        The nodes, and who may register which devices.
    options : ProtocolOptions
    progress : Progress
        What changes from round to round.
    targets : Targets
        Which targets come with releases.
    """

    trunk: Trunk
    first_layer: Aggregation
    layer: FirstLayer
    schedule: Schedule
    roster: Roster
    options: ProtocolOptions
    progress: Progress
    targets: Targets

    @property
    def can_do_without(self) -> bool:
        """Whether a round may bring nothing new: the trunk learns from earlier releases, and perhaps few were asked."""
        return self.options.mode.replays and bool(self.progress.replay)
