"""Recipes of methods: from a file, by name, of another method."""

from collections.abc import Sequence
from dataclasses import fields, replace

from ..config import Recipe, build, check, flags, hint, load_settings, parse_toml, sections, shipped_recipes
from ..errors import ConfigError
from . import METHODS


def recipe_type(method: str, where: str = "method") -> type[Recipe]:
    """The class of a method's recipes. Raises ConfigError that names the methods there are; `where` the name stands."""
    if method not in tuple(METHODS):
        raise ConfigError(f"{where} must be one of {', '.join(METHODS)}, not {method!r}{hint(str(method), METHODS)}")
    return METHODS[method].recipe_type


def parse_recipe(text: str, source: str) -> Recipe:
    """TOML text to a checked recipe of the method that it names (default: rcmae). Raises ConfigError; `source` names the file in it."""
    tree = parse_toml(text, source)
    method = tree.get("method", "rcmae")
    cls = recipe_type(method, f"{source}: method")
    for key in tree.keys() - {"method", *sections(cls)}:
        if owners := [name for name, other in METHODS.items() if key in sections(other.recipe_type)]:
            raise ConfigError(f"{source}: [{key}] is a section of {spoken(owners)}; this recipe's method is {method}")
    for name, part in sections(cls).items():
        known = {f.name for f in fields(part)}
        for key in (tree[name].keys() if isinstance(tree.get(name), dict) else set()) - known:
            if owners := [other for other, kind in METHODS.items() if flags(kind.recipe_type).get(key) == name]:
                raise ConfigError(f"{source}: {name}.{key} is a setting of {spoken(owners)}; this recipe's method is {method}")
    return check(build(cls, tree, source))


def load_recipe(name: str) -> Recipe:
    """A recipe by name (`rcmae list`) or by the path of a TOML file.

    Raises ConfigError with the file, the key and the nearest legal name.
    """
    return load_settings(name, shipped_recipes(), parse_recipe)


def with_method(recipe: Recipe, method: str) -> Recipe:
    """The recipe for another method: settings that both have are kept, others are left out or as they are by default."""
    cls = recipe_type(method)
    if type(recipe) is cls:
        return recipe
    kept = {name: getattr(recipe, name) for name in (f.name for f in fields(cls)) if name != "method" and hasattr(recipe, name)}
    for name in sections(cls).keys() & kept.keys():
        own, given = getattr(cls, name), kept[name]
        if type(given) is not type(own):  # the network of a method with a decoder, or of one without
            kept[name] = replace(own, **{f.name: getattr(given, f.name) for f in fields(own) if hasattr(given, f.name)})
    return cls(**kept)


def digits_recipe(method: str) -> Recipe:
    """The recipe of a method for the bundled digits: its own, or `embedded` with the method replaced."""
    recipe_type(method)
    own = f"{method}-embedded"
    return with_method(load_recipe(own if own in shipped_recipes() else "embedded"), method)


def spoken(names: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
