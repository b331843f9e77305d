"""The exceptions a user can meet. Every message names what is wrong and what to do about it."""


class LRAgentError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigError(LRAgentError, ValueError):
    """A model or adapter configuration asks for mathematics that is not supported here; names the field."""


class CheckpointError(LRAgentError, ValueError):
    """A folder of weights is missing, truncated, mis-shaped or not what it claims to be; lists every problem."""


class AdapterError(LRAgentError, ValueError):
    """An adapter is unknown, loaded twice, made for another base, or larger than the engine has room for."""


class InputError(LRAgentError, ValueError):
    """Token ids, text, sampling parameters or a trajectory file that cannot be run as given."""


class OutOfPagesError(LRAgentError, RuntimeError):
    """The page pool cannot hold what was asked for. Nothing was run."""


class TrajectoryBusyError(LRAgentError, RuntimeError):
    """Two calls want to extend one trajectory at once; give the second one a fork."""


class EngineBusyError(LRAgentError, RuntimeError):
    """A call from inside another call of the same engine, for whose end it would have to wait."""


class TrajectoryClosedError(LRAgentError, RuntimeError):
    """The trajectory was closed and its pages returned."""
