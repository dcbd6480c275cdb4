"""Settings (frozen dataclasses whose sections are nested dataclasses) as TOML: reading, writing, hashing and
replacing values."""

import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..errors import ConfigError, SettingsError

T = TypeVar("T")


def sections(cls: type) -> dict[str, type]:
    """The sections of a recipe by name, in order."""
    return {f.name: f.type for f in fields(cls) if is_dataclass(f.type)}  # type: ignore[misc]


def flags(cls: type) -> dict[str, str]:
    """Setting (the name of its flag) -> section, or "" if it is in none."""
    parts = sections(cls)
    return {f.name: "" for f in fields(cls) if f.name not in parts} | {
        f.name: name for name, part in parts.items() for f in fields(part)
    }


# --- files --------------------------------------------------------------------------------------------------


def load_settings(name: str, shipped: dict[str, Any], parse: Callable[[str, str], T]) -> T:
    """The result of `parse(text, source)` for a shipped recipe, by name, or a TOML file, by path. Raises
    ConfigError."""
    path, source = Path(name), name
    if path.suffix == ".toml" or (name not in shipped and path.is_file()):
        if not path.is_file():
            raise ConfigError(f"recipe file {name} does not exist")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise ConfigError(f"{name} is not UTF-8 text: {e.reason} at byte {e.start}") from e
        except OSError as e:
            raise ConfigError(f"recipe file {name} cannot be read: {e.strerror}") from e
    elif name in shipped:
        text, source = shipped[name].read_text(encoding="utf-8"), f"{name}.toml"
    else:
        raise ConfigError(f"there is no recipe {name!r}{hint(name, shipped)} (`rcmae list` shows all)")
    try:
        return parse(text, source)
    except SettingsError as e:
        raise ConfigError(f"{source}: {e}") from e


def shipped_recipes(kind: str = "") -> dict[str, Any]:
    """The recipes in the package, name -> file: those of pre-training, or those in the folder `kind`."""
    folder = resources.files("rcmae.recipes").joinpath(kind)
    return {
        f.name.removesuffix(".toml"): f
        for f in sorted(folder.iterdir(), key=lambda f: f.name)
        if f.name.endswith(".toml")
    }


def parse_settings(cls: type[T], text: str, source: str) -> T:
    """Settings from TOML text, with checked types but unchecked values. Raises ConfigError; `source` names
    the file in messages."""
    return build(cls, parse_toml(text, source), source)


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """TOML text as dictionaries. Raises ConfigError."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{source} is not valid TOML: {e}") from e


def to_toml(recipe: Any) -> str:
    """A recipe of pre-training or of a task as TOML that parses to an equal one. None values are omitted."""
    tree = dataclasses.asdict(recipe)
    lines = [f"{k} = {_toml(v)}" for k, v in tree.items() if not isinstance(v, dict) and v is not None]
    for name in sections(type(recipe)):
        lines += ["", f"[{name}]"]
        lines += [f"{k} = {_toml(v)}" for k, v in tree[name].items() if v is not None]
    return "\n".join(lines) + "\n"


LATER = [("network", "init")]
"Sections and names of settings that runs of version 0.1 do not have."


def recipe_hash(recipe: Any) -> str:
    """Twelve hex digits that identify the recipe without the path of the data, whose fingerprint is recorded
    separately, and without `LATER` settings that are not given, so that older runs can be resumed."""
    tree = dataclasses.asdict(recipe)
    tree |= {"data": ""} if "data" in tree else {}
    for section, name in LATER:
        if tree.get(section, {}).get(name, 0) is None:
            del tree[section][name]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


# --- by flag ------------------------------------------------------------------------------------------------


def flat(recipe: Any) -> dict[str, Any]:
    """The recipe as setting -> value, without sections and None values."""
    tree = dataclasses.asdict(recipe)
    for name in sections(type(recipe)):
        tree |= tree.pop(name)
    return {k: v for k, v in tree.items() if v is not None}


def reset_by(recipe: Any, changes: Mapping[str, Any]) -> set[str]:
    """Settings that the `changes` (values or their text) reset to their defaults: see `Section.resets`."""
    values, parts = flat(recipe), (type(recipe), *sections(type(recipe)).values())
    pairs = [pair for part in parts for pair in getattr(part, "resets", {}).items()]
    return {
        name
        for key, names in pairs
        if key in changes and str(changes[key]) != str(values.get(key))
        for name in names
    } - changes.keys()


def changed(recipe: T, **settings: Any) -> T:
    """The recipe with settings of any section replaced."""
    classes = (type(recipe), *sections(type(recipe)).values())
    settings |= {
        f.name: f.default for cls in classes for f in fields(cls) if f.name in reset_by(recipe, settings)
    }
    parts = {name: getattr(recipe, name) for name in sections(type(recipe))}
    for name, part in parts.items():
        parts[name] = replace(
            part, **{f.name: settings.pop(f.name) for f in fields(part) if f.name in settings}
        )
    return replace(recipe, **(parts | settings))  # type: ignore[type-var]


def replaced(recipe: T, settings: Sequence[str], source: str) -> T:
    """The recipe with settings of any section replaced, each given as "key=value"; unchecked. Raises
    ConfigError that names `source`."""
    tree, changes = tomllib.loads(to_toml(recipe)), {}
    section_of = {key: tree[name] if name else tree for key, name in flags(type(recipe)).items()}
    for text in settings:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or key not in section_of:
            raise ConfigError(
                f"{source}: {text!r} is no setting{hint(key, section_of) if equals else '; write key=value'}"
            )
        try:
            changes[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            changes[key] = value
        section_of[key][key] = changes[key]
    for key in reset_by(recipe, changes):
        section_of[key].pop(key, None)
    return build(type(recipe), tree, source)


# --- helpers ------------------------------------------------------------------------------------------------


def build(cls: type[T], tree: dict[str, Any], source: str) -> T:
    """Settings from nested dictionaries; missing values are those of the section's default. Raises
    ConfigError."""
    return cls(**_values(cls, tree, source))


def _values(cls: type, tree: dict[str, Any], source: str, where: str = "") -> dict[str, Any]:
    known = {f.name: f for f in fields(cls)}
    values = {}
    for key, value in tree.items():
        if key not in known:
            raise ConfigError(f"{source}: unknown key {where}{key}{hint(key, known, where)}")
        kind = known[key].type
        if is_dataclass(kind):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {where}{key} is a section: write [{key}]")
            values[key] = replace(
                getattr(cls, key), **_values(typing.cast(type, kind), value, source, f"{key}.")
            )
        else:
            values[key] = _convert(kind, value, f"{source}: {where}{key}")
    return values


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(
            f"{where} must be one of {', '.join(map(str, args))}, not {value!r}{hint(str(value), args)}"
        )
    if origin is types.UnionType:
        return None if value is None else _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if args[-1] is ...:  # any length
            args = args[:1] * (len(value) if isinstance(value, (list, tuple)) else 1)
        if isinstance(value, (list, tuple)) and len(value) == len(args):
            return tuple(_convert(a, v, where) for a, v in zip(args, value, strict=True))
        raise ConfigError(f"{where} must be a list of {len(args)} values, not {value!r}")
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if type(value) is kind is not float:
        return value
    raise ConfigError(f"{where} must be of type {getattr(kind, '__name__', kind)}, not {value!r}")


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    # JSON's numbers and strings are valid TOML, except that TOML requires DEL to be escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def hint(word: str, known: Any, where: str = "") -> str:
    """ "; did you mean ...?" if one of the known words is similar, else ""."""
    close = difflib.get_close_matches(word, list(map(str, known)), n=1)
    return f"; did you mean {where}{close[0]}?" if close else ""
