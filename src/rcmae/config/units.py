"""Parsing of durations and half-lives, and counts and sizes as text."""

import math
import re
from collections.abc import Callable
from typing import Any

from ..errors import ConfigError


def how_many(number: int, what: str) -> str:
    """'1 image', '2,000 images', '3 classes'."""
    ending = "" if number == 1 else "es" if what.endswith(("s", "x", "ch")) else "s"
    return f"{number:,} {what}{ending}"


def readable_size(number: int) -> str:
    """1,234,567 bytes -> '1.2 MB'."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e3:,.0f} kB"


def parse_time(text: str) -> float:
    """'90s', '10m', '1.5h' or '2d' in seconds. Raises ConfigError, also if the unit is missing."""
    m = re.fullmatch(r"\s*([0-9]+\.?[0-9]*(?:e[0-9]+)?)\s*([smhd]?)\s*", text)
    if m is None or not 0 < float(m[1]) < math.inf:
        raise ConfigError(f"{text!r} is not a duration; write 90s, 10m, 8h or 2d")
    if not m[2]:
        number = text.strip()
        raise ConfigError(f"{text!r} has no unit; write {number}s, {number}m, {number}h or {number}d")
    return float(m[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[m[2]]


def parse_half_life(text: str) -> tuple[float, str]:
    """'0.5%', '173 steps', '2e6 images' or '0.5 epochs' as (number, unit), with the unit '%' for a fraction
    of the run; 'adaptive' as (0, 'adaptive')."""
    if text.strip() == "adaptive":
        return 0.0, "adaptive"
    m = re.fullmatch(r"\s*([0-9]+\.?[0-9]*(?:e[0-9]+)?)\s*(%|steps?|images?|epochs?)\s*", text)
    if m is None or not 0 < float(m[1]) < math.inf:
        raise ConfigError(
            f"{text!r} is not a half-life; write '0.5%' (of the run), '173 steps', '2e6 images', "
            "'0.5 epochs' or 'adaptive'"
        )
    return float(m[1]), m[2] if m[2] == "%" else m[2].rstrip("s") + "s"


def readable(parse: Callable[[str], Any], text: str | None) -> tuple[bool, str]:
    """A rule, (holds, message), that `parse` accepts the text, if it is not None."""
    try:
        if text is not None:
            parse(text)
    except ConfigError as e:
        return False, str(e)
    return True, ""
