"""Lengths of time, half-lives and numbers of things, as one writes them."""

import math
import re
from collections.abc import Callable
from typing import Any

from ..errors import ConfigError


def how_many(number: int, what: str) -> str:
    """'1 image', '2,000 images', '3 classes'."""
    ending = "" if number == 1 else "es" if what.endswith(("s", "x", "ch")) else "s"
    return f"{number:,} {what}{ending}"


def parse_time(text: str) -> float:
    """'90s', '10m', '1.5h' or '2d' in seconds. Raises ConfigError, also without a unit: one meant minutes, or hours."""
    m = re.fullmatch(r"\s*([0-9]+\.?[0-9]*(?:e[0-9]+)?)\s*([smhd]?)\s*", text)
    if m is None or not 0 < float(m[1]) < math.inf:
        raise ConfigError(f"{text!r} is no length of time; write 90s, 10m, 8h or 2d")
    if not m[2]:
        number = text.strip()
        raise ConfigError(f"{text!r} is no length of time; write {number}s, {number}m, {number}h or {number}d")
    return float(m[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[m[2]]


def parse_half_life(text: str) -> tuple[float, str]:
    """'0.5%', '173 steps', '2e6 images' or '0.5 epochs' as (number, unit), the unit of a share is '%'; 'auto' as (0, 'auto')."""
    if text.strip() == "auto":
        return 0.0, "auto"
    m = re.fullmatch(r"\s*([0-9]+\.?[0-9]*(?:e[0-9]+)?)\s*(%|steps?|images?|epochs?)\s*", text)
    if m is None or not 0 < float(m[1]) < math.inf:
        raise ConfigError(f"{text!r} is no half-life; write '0.5%' (of the run), '173 steps', '2e6 images', '0.5 epochs' or 'auto'")
    return float(m[1]), m[2] if m[2] == "%" else m[2].rstrip("s") + "s"


def readable(parse: Callable[[str], Any], text: str | None) -> tuple[bool, str]:
    """The rule that `parse` can read a text, if there is one: (fine, message)."""
    try:
        if text is not None:
            parse(text)
    except ConfigError as e:
        return False, str(e)
    return True, ""
