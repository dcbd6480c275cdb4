"""The settings of a run. `Recipe` holds those that change the result, and is hashed; `RuntimeConfig` the
others.

All settings are frozen dataclasses. A recipe file is TOML with one table per section. Every field is also a
flag of `rcmae pretrain`, named without its section (`[images] size = 224` is `--size 224`), so the sections
of a method must not share field names.
"""
# ruff: noqa: F401  # the names are imported for other packages

from .recipe import LENGTHS, Images, Network, Optim, Probe, Recipe, Rules, Section, broken, check
from .runtime import BaseRuntimeConfig, RuntimeConfig
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
    reset_by,
    sections,
    shipped_recipes,
    to_toml,
)
from .units import how_many, parse_half_life, parse_time, readable, readable_size
