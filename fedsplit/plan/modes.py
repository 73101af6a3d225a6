"""The modes of the protocol: what each one is, as facts that everything else goes by."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mode:
    """How a round goes.

    Attributes
    ----------
    name : str
        As in the setting ``protocol.mode``.
    delay : int
        Rounds from a release to the gradients of the first layer that it leads to. With 0 a round has an exchange for
        each; with 1 releases travel together with the gradients of the round before.
    replays : bool
        Whether the trunk learns in every round from all that has been released so far.
    teaches : bool
        Whether devices' gradients step the first layer; without it no cut gradient is ever sent.
    once : bool
        Whether every record is released at most once.
    """

    name: str
    delay: int
    replays: bool
    teaches: bool
    once: bool


SYNCHRONOUS = Mode("synchronous", delay=0, replays=False, teaches=True, once=False)
PIPELINED = Mode("pipelined", delay=1, replays=False, teaches=True, once=False)
SINGLE_PASS = Mode("single-pass", delay=1, replays=True, teaches=True, once=True)
RELEASE_ONCE = Mode("release-once", delay=1, replays=True, teaches=False, once=True)
MODES = {mode.name: mode for mode in (SYNCHRONOUS, PIPELINED, SINGLE_PASS, RELEASE_ONCE)}
