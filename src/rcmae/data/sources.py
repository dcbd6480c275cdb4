"""All kinds of sources, and opening one from the value of --data. No other module refers to a kind."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import hint
from ..errors import ConfigError, DataError
from .base import OpenOptions, Source, Subset, printable, silent
from .digits import DigitsSource, ScenesSource
from .files import Folder
from .hub import Hub
from .lists import ListFile
from .pixels import measure_bits
from .shards import Shards

__all__ = [
    "SOURCES",
    "Source",
    "Subset",
    "forms",
    "kind_of",
    "open_source",
    "parts_of",
    "recipe_for",
    "similar_forms",
]

SOURCES: tuple[type[Source], ...] = (ScenesSource, DigitsSource, Hub, Shards, ListFile, Folder)
"The first kind that matches is used, so specific ones come first. Help lists them in reverse order."


def forms() -> str:
    """All forms of --data as one phrase."""
    *most, last = [kind.form for kind in reversed(SOURCES)]
    return f"{', '.join(most)} or {last}"


def kind_of(spec: str) -> type[Source] | None:
    """The kind that matches the spec, if any. Raises DataError if the path is not readable."""
    with _translate_errors(spec):
        return next((kind for kind in SOURCES if spec.strip() and kind.matches(spec)), None)


def parts_of(spec: str) -> tuple[str, str] | None:
    """The specs of the training part and the test part; None if the set is not divided. Raises DataError."""
    kind = kind_of(spec)
    with _translate_errors(spec):
        return kind.parts(spec) if kind else None


def recipe_for(spec: str) -> str:
    """The default recipe for the images."""
    return (kind_of(spec) or Source).recipe


def similar_forms(spec: str) -> list[str]:
    """The forms that start like the spec, up to the colon."""
    return [kind.form for kind in reversed(SOURCES) if kind.form.startswith(spec.partition(":")[0] + ":")]


def open_source(
    spec: str,
    channels: int = 3,
    size: int = 32,
    seed: int = 0,
    tick: Callable[[float], None] = silent,
    value_range: str = "data",
    max_pixels: float = Source.pixel_limit,
) -> Source:
    """Open the source that matches `spec`; `size` and `seed` are for generated images, `tick` is called with
    the fraction of the images indexed. With the `value_range` "dtype", 65,535 is white in 16-bit images even
    if they use fewer bits. Images of more than `max_pixels` are unreadable.

    Raises DataError or ConfigError.
    """
    if not spec.strip():
        raise ConfigError(f"--data is empty; give --data FOLDER, or another source: {forms()}")
    if kind := kind_of(spec):
        with _translate_errors(spec):
            source = kind.open(spec, OpenOptions(channels, size, seed, tick))
            source.pixel_limit = int(max_pixels)
            if value_range == "data":
                measure_bits([source], channels)
            else:
                source.bits = 16
            return source
    if known := similar_forms(spec):
        raise ConfigError(f"there is no {spec}{hint(spec, known) or '; there is ' + ' and '.join(known)}")
    if Path(spec).exists():
        raise DataError(f"{spec} is none of these: {forms()}; give the folder that holds the images")
    raise DataError(f"{spec} does not exist; give --data a {forms()}")


@contextmanager
def _translate_errors(spec: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as e:
        raise DataError(
            f"no permission to read {printable(os.fsencode(e.filename or spec))}; change it, or leave that "
            "folder out"
        ) from e
    except OSError as e:
        raise DataError(f"{printable(os.fsencode(e.filename or spec))} cannot be read: {e.strerror}") from e
