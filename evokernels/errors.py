"""Every error a user can cause. A message says what was given, what is allowed and what to do."""

__all__ = [
    "ArchitectureError",
    "BackendError",
    "DatasetError",
    "EvokernelsError",
    "ExportError",
    "FitnessError",
    "GenomeError",
    "JournalError",
    "OptimizerError",
    "ReportWarning",
    "SettingsError",
    "StrategyError",
    "TermError",
    "TermWarning",
    "UnknownTermError",
    "WorkerError",
]


class EvokernelsError(Exception):
    """Base of all errors raised on purpose by this package."""


class GenomeError(EvokernelsError, ValueError):
    """A genome field, or a genome file, is not valid."""


class UnknownTermError(GenomeError):
    """A genome has a term that is not registered in this process."""


class ArchitectureError(EvokernelsError, ValueError):
    """An architecture, or its file, is not valid."""


class OptimizerError(EvokernelsError, ValueError):
    """The optimizer was given tensors, options or a state that it cannot use."""


class BackendError(EvokernelsError, RuntimeError):
    """The backend asked for cannot run here; the message carries its reason."""


class DatasetError(EvokernelsError, RuntimeError):
    """A data set is missing, unreadable or not of the documented form."""


class ExportError(EvokernelsError, ValueError):
    """A file that was to be written exists already, or cannot be written."""


class FitnessError(EvokernelsError, ValueError):
    """A search was told something else than one number for each candidate."""


class JournalError(EvokernelsError, RuntimeError):
    """A run folder or its journal is damaged, foreign, or belongs to another configuration."""


class SettingsError(EvokernelsError, ValueError):
    """A setting of a search or of a run is out of its range."""


class StrategyError(EvokernelsError, ValueError):
    """An evolution strategy was given a model, an optimizer, options or scores it cannot use."""


class TermError(EvokernelsError, ValueError):
    """A term that cannot be registered, or the file that registers it."""


class ReportWarning(UserWarning):
    """A run is complete, but its report could not be written."""


class TermWarning(UserWarning):
    """A term of a user's own can make something that is not finite out of finite numbers."""


class WorkerError(EvokernelsError, RuntimeError):
    """A worker process ended in the middle of its work."""
