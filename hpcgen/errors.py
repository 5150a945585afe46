"""Errors a user can mend, each with the exit code its command ends with."""

from collections.abc import Mapping
from types import MappingProxyType

DONE = 0
TOO_MANY_FAILED = 5


class HpcgenError(Exception):
    """One clear sentence: the file, id or key, the value met and what was expected."""

    exit_code = 70
    origin: Mapping[str, object] = MappingProxyType({})  # rank and kind, where another process met it first


class UsageError(HpcgenError):
    """A wrong argument, config key or setting."""

    exit_code = 2


class SiteError(HpcgenError):
    """The environment does not fit: ranks, GPUs, MPI, locking, a missing package."""

    exit_code = 3


class InputError(HpcgenError):
    """Input data that is missing, broken or of another kind than asked."""

    exit_code = 4


class TooManyFailed(HpcgenError):
    """The work is finished, but more units failed than allowed."""

    exit_code = TOO_MANY_FAILED


class Diverged(HpcgenError):
    """Training ran to non-finite numbers."""

    exit_code = 6


class StorageError(HpcgenError):
    """Space, quota, permissions, or a folder that another run owns."""

    exit_code = 7


class StoppedEarly(HpcgenError):
    """Stopped by a signal or the clock; the same command goes on from here."""

    exit_code = 75
