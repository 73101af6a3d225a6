"""The errors a user can cause or must know about; every text is one line and never holds a record's values."""


class FedsplitError(Exception):
    """Base of all errors raised on purpose; the command line prints its text and exits with 2."""


class ConfigError(FedsplitError):
    """A setting is unknown, missing or outside what is allowed."""


class DataError(FedsplitError):
    """A data file or a device's records are missing, damaged or of the wrong shape."""


class WireError(FedsplitError):
    """A message from the other side is malformed; the text names the field."""


class RunError(FedsplitError):
    """A run cannot go on: too few nodes answered, or a checkpoint does not fit."""


class EngineError(RunError):
    """What runs the simulated nodes has stopped; the run can go on from its checkpoint on a new one."""


class StateError(FedsplitError):
    """A device's own state (secret, ledger, limits) is missing, damaged or another's: nothing may leave."""
