"""What a run is told. `Recipe` is all that changes a result and is hashed; `Machine` is all that does not.

All settings are frozen dataclasses. A recipe file is TOML with one table a section; every field is also a flag of
`rcmae pretrain`, named without its section (`[images] size = 224` is `--size 224`), so no two sections of a method share a name.
"""

from .recipe import Images, Network, Optim, Probe, Recipe, Rules, Section, check, with_settings
from .runtime import Machine, Workplace
from .toml import (
    build,
    changed,
    flags,
    flat,
    hint,
    load_settings,
    parse_settings,
    parse_toml,
    recipe_hash,
    replaced,
    replaced_by,
    sections,
    shipped_recipes,
    to_toml,
)  # fmt: skip
from .units import how_many, parse_half_life, parse_time, readable

__all__ = [
    "Images", "Machine", "Network", "Optim", "Probe", "Recipe", "Rules", "Section", "Workplace",
    "build", "changed", "check", "flags", "flat", "hint", "how_many", "load_settings", "parse_half_life", "parse_settings", "parse_time",
    "parse_toml", "readable", "recipe_hash", "replaced", "replaced_by", "sections", "shipped_recipes", "to_toml", "with_settings",
]  # fmt: skip
