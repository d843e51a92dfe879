"""Every error that a user can cause or has to know about.

The library raises these; only ``cli/`` prints them and turns them into exit codes. A message says what
is wrong (with the file, row or flag), what exists instead, and what to type next.
"""

from __future__ import annotations


class MiripError(Exception):
    """Base of every error that mirip-fast raises on purpose."""


class ConfigError(MiripError, ValueError):
    """A setting is unknown, has the wrong type, or is out of range."""


class DataError(MiripError, ValueError):
    """A folder, CSV file or set of grades cannot be used as it is."""


class ImageError(MiripError, ValueError):
    """One image cannot be decoded; the message is the reason alone, without the path."""


class BackboneError(MiripError, OSError):
    """A backbone cannot be found, downloaded or understood."""


class StoreError(MiripError, OSError):
    """A feature store is damaged, foreign, or lacks what was asked of it."""


class StoreLockedError(StoreError):
    """Another run is writing to the feature store."""


class DiskFullError(StoreError):
    """The disk has no room for what was about to be written; nothing committed is lost."""


class CheckpointError(MiripError, ValueError):
    """A checkpoint cannot be read, or does not fit the model or the features."""


class TrainingError(MiripError, RuntimeError):
    """Training cannot go on (loss not finite, nothing to learn from, …)."""


class PreemptedError(TrainingError):
    """A training run was told to stop by a signal; all is saved, and it can be resumed."""


class RunNotFoundError(MiripError, FileNotFoundError):
    """No run, data set or cache fits what was asked for."""


class StoppedError(Exception):
    """Work was given up because the run stops; never shown to users."""
