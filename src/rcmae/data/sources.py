"""Every kind of source, and how what the user wrote becomes one. Nothing else names a kind."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import hint
from ..errors import ConfigError, DataError
from .base import Asked, Source, Subset, printable, silent
from .digits import DigitsSource, ScenesSource
from .files import Folder, ListFile
from .hub import Hub
from .shards import Shards

__all__ = ["SOURCES", "Source", "Subset", "forms", "kind_of", "namesakes", "open_source", "recipe_for"]

SOURCES: tuple[type[Source], ...] = (
    ScenesSource,
    DigitsSource,
    Hub,
    Shards,
    ListFile,
    Folder,
)
"Narrow kinds before wide ones: the first that matches is meant. Help names them the other way round."


def forms() -> str:
    """How images can be given, in a line."""
    *most, last = [kind.form for kind in reversed(SOURCES)]
    return f"{', '.join(most)} or {last}"


def kind_of(spec: str) -> type[Source] | None:
    """The kind that the user means; None where there is none. Raises DataError where it cannot be looked at."""
    with _in_one_line(spec):
        return next((kind for kind in SOURCES if spec.strip() and kind.matches(spec)), None)


def recipe_for(spec: str) -> str:
    """The recipe that suits the images where none is named."""
    return (kind_of(spec) or Source).recipe


def namesakes(spec: str) -> list[str]:
    """The forms that begin as the spec does, up to a colon."""
    return [kind.form for kind in reversed(SOURCES) if kind.form.startswith(spec.partition(":")[0] + ":")]


def open_source(spec: str, channels: int = 3, size: int = 32, seed: int = 0, tick: Callable[[float], None] = silent) -> Source:
    """A source by what the user wrote; `size` and `seed` are for what is drawn, `tick` is told which share of the index is made.

    Raises DataError or ConfigError in one line.
    """
    if not spec.strip():
        raise ConfigError(f"--data is empty; give a {forms()}")
    if kind := kind_of(spec):
        with _in_one_line(spec):
            return kind.open(spec, Asked(channels, size, seed, tick))
    if known := namesakes(spec):
        raise ConfigError(f"there is no {spec}{hint(spec, known) or '; there is ' + ' and '.join(known)}")
    if Path(spec).exists():
        raise DataError(f"{spec} is none of these: {forms()}; give the folder that holds the images")
    raise DataError(f"{spec} does not exist; give --data a {forms()}")


@contextmanager
def _in_one_line(spec: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as e:
        raise DataError(f"no permission to read {printable(os.fsencode(e.filename or spec))}; change it, or leave that folder out") from e
    except OSError as e:
        raise DataError(f"{printable(os.fsencode(e.filename or spec))} cannot be read: {e.strerror}") from e
