"""Recipes of methods: parsing, loading by name, and conversion to another method."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..config import Recipe, build, check, flags, hint, load_settings, parse_toml, sections, shipped_recipes
from ..errors import ConfigError, SettingsError
from . import METHODS


def recipe_type(method: str, context: str = "method") -> type[Recipe]:
    """The class of a method's recipes. Raises a ConfigError that lists the methods and starts with
    `context`."""
    if method not in tuple(METHODS):
        raise SettingsError(
            f"{context} must be one of {', '.join(METHODS)}, not {method!r}{hint(str(method), METHODS)}"
        )
    return METHODS[method].recipe_type


def parse_recipe(text: str, source: str) -> Recipe:
    """TOML text to a checked recipe of the method that it names (default: rcmae). Raises a ConfigError that
    starts with `source`, the name of the file."""
    tree = parse_toml(text, source)
    method = tree.get("method", "rcmae")
    cls = recipe_type(method, f"{source}: method")
    for key in tree.keys() - {"method", *sections(cls)}:
        if owners := [name for name, other in METHODS.items() if key in sections(other.recipe_type)]:
            raise ConfigError(
                f"{source}: [{key}] is a section of {join_names(owners)}; this recipe's method is {method}"
            )
    for name, part in sections(cls).items():
        known = {f.name for f in fields(part)}
        for key in (tree[name].keys() if isinstance(tree.get(name), dict) else set()) - known:
            if owners := [
                other for other, kind in METHODS.items() if flags(kind.recipe_type).get(key) == name
            ]:
                raise ConfigError(
                    f"{source}: {name}.{key} is a setting of {join_names(owners)}; this recipe's method is "
                    f"{method}"
                )
    return check(build(cls, tree, source))


def load_recipe(name: str) -> Recipe:
    """A recipe by name (`rcmae list`) or by the path of a TOML file.

    Raises ConfigError with the file, the key and the nearest legal name.
    """
    shipped = shipped_recipes()
    if name in METHODS and name not in shipped and not Path(name).is_file():
        names = join_names([recipe for recipe in shipped if recipe.startswith(f"{name}-")])
        raise ConfigError(
            f"there is no recipe {name!r}, which is a method: give --method {name}, or one of its recipes: "
            f"{names}"
        )
    if name not in shipped and Path(name).is_dir():
        run = (Path(name) / "recipe.toml").exists()
        advice = f"`--out {name}` alone continues this run" if run else f"give one, and --data {name}"
        raise ConfigError(f"{name} is a folder, not a recipe (`rcmae list` shows all); {advice}")
    return load_settings(name, shipped, parse_recipe)


def with_method(recipe: Recipe, method: str) -> Recipe:
    """The recipe for another method: common settings are copied, other settings of the method have their
    defaults."""
    cls = recipe_type(method)
    if type(recipe) is cls:
        return recipe
    common: dict[str, Any] = {
        f.name: getattr(recipe, f.name) for f in fields(cls) if f.name != "method" and hasattr(recipe, f.name)
    }
    for name in sections(cls).keys() & common.keys():
        default, old = getattr(cls, name), common[name]
        if type(old) is not type(default):  # `network`: one of the methods has a decoder, the other has none
            values = {f.name: getattr(old, f.name) for f in fields(default) if hasattr(old, f.name)}
            common[name] = replace(default, **values)
    return cls(**common)


def digits_recipe(method: str) -> Recipe:
    """The recipe of a method for the bundled digits: `METHOD-bundled`, or `bundled` with the method
    replaced."""
    recipe_type(method)
    name = f"{method}-bundled"
    return with_method(load_recipe(name if name in shipped_recipes() else "bundled"), method)


def join_names(names: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
