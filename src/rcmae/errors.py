"""What can go wrong, each with the exit code the command ends with. A message is one line: what, where, what to do."""

import importlib
from typing import Any


class RcmaeError(Exception):
    """An expected failure. `rcmae` prints its message as one line and exits with `exit_code`."""

    exit_code = 1


class ConfigError(RcmaeError):
    """The command, the recipe or a flag is wrong."""

    exit_code = 2


class DataError(RcmaeError):
    """The images cannot be used: missing, too few, too many unreadable."""

    exit_code = 3


class CheckpointError(RcmaeError):
    """A checkpoint is missing, damaged, or belongs to another model or recipe."""

    exit_code = 4


class DivergedError(RcmaeError):
    """The loss stayed non-finite; the last good checkpoint is kept."""

    exit_code = 5


class AlarmError(RcmaeError):
    """An alarm ended the run, as `--on-alarm stop` asks; its checkpoint is kept."""

    exit_code = 5


class StorageError(RcmaeError):
    """The disk is full, read-only or gone."""

    exit_code = 6


class ProcessError(RcmaeError):
    """A process of the run was lost or hangs."""

    exit_code = 7


class OutOfMemoryError(RcmaeError):
    """The device or the host has too little memory for this batch."""

    exit_code = 8


class Preempted(RcmaeError):
    """A signal asked the run to stop; the state is saved, and the same command goes on from there."""

    exit_code = 75


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the error's kind where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def optional(module: str, extra: str) -> Any:
    """Import a module of an extra. Raises ConfigError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise ConfigError(f"{module} is not installed; it comes with the {extra} extra: pip install 'rcmae[{extra}]'") from e
