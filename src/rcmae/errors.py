"""Expected failures with their exit codes. A message is one line: what is wrong, where, and what to do."""

import importlib
from collections.abc import Iterable
from typing import Any


class RcmaeError(Exception):
    """An expected failure. `rcmae` prints the message as one line and exits with `exit_code`."""

    exit_code = 1


class ConfigError(RcmaeError):
    """The command, the recipe or a flag is wrong."""

    exit_code = 2


class SettingsError(ConfigError):
    """Settings have invalid values. Each problem begins with the name of the setting in a recipe file."""


class DataError(RcmaeError):
    """The images cannot be used: missing, too few, or too many unreadable."""

    exit_code = 3


class CheckpointError(RcmaeError):
    """A checkpoint is missing, damaged, or belongs to another model or recipe."""

    exit_code = 4


class DivergedError(RcmaeError):
    """The loss stayed non-finite; the last good checkpoint is kept."""

    exit_code = 5


class AlarmError(RcmaeError):
    """An alarm ended the run (`--on-alarm stop`); its checkpoint is kept."""

    exit_code = 5


class StorageError(RcmaeError):
    """The disk is full, read-only or not available."""

    exit_code = 6


class ProcessError(RcmaeError):
    """A process of the run died or hangs."""

    exit_code = 7


class OutOfMemoryError(RcmaeError):
    """The device or the host has too little memory."""

    exit_code = 8


class Preempted(RcmaeError):
    """A signal stopped the run; the state is saved, and the same command resumes the run."""

    exit_code = 75


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, or the error's type if it has no message."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def optional(module: str, extra: str) -> Any:
    """Import a module of an extra. Raises ConfigError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise ConfigError(
            f"{module} is not installed; it comes with the {extra} extra: pip install 'rcmae[{extra}]'"
        ) from e


def refuse(problems: Iterable[str]) -> None:
    """Raises SettingsError with all problems in one message, if there are any."""
    if text := "; ".join(problems):
        raise SettingsError(text)
