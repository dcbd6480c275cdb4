"""Write docs/api.md from the docstrings of the public names: `python -m benchmarks.api`.

tests/test_package.py checks that the page is up to date.
"""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import rcmae
from rcmae.config import sections
from rcmae.models.backbone import Features

PAGE = Path(__file__).parent.parent / "docs" / "api.md"

HEAD = """# Python API

For those who call rcmae from Python instead of the command line. All names here are importable as
`rcmae.NAME`, except `Features` and the recipe classes; other modules may change without notice. Written
from the docstrings by `python -m benchmarks.api`.

```python
import dataclasses
from pathlib import Path

import rcmae

recipe = dataclasses.replace(rcmae.load_recipe("folder"), data="YOUR_IMAGES", epochs=100.0)
rcmae.pretrain(recipe, rcmae.RuntimeConfig(out=Path("runs/mine")))
backbone = rcmae.load("runs/mine", which="student")
```

All settings are frozen dataclasses: change them with `dataclasses.replace`. Each is also a flag of
`rcmae pretrain`, named without its section (`[images] size` is `--size`)."""

METHODS = """`METHODS` maps the name of a method to its class. `load_recipe` returns an instance of the class
named here, which has the sections of `Recipe` and those below. [Each has a page](recipes.md#methods)."""


def syntax(thing: Any) -> Any:
    """The definition of a class or a function as a syntax tree."""
    return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]


def prose(text: str | None) -> str:
    """A docstring with one line for each paragraph."""
    paragraphs = inspect.cleandoc(text or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def wrapped(text: str) -> str:
    """Paragraphs and list items in lines of at most 140 columns; tables, code and headings as they are."""
    lines = []
    for line in text.split("\n"):
        indent = "  " if line.startswith("- ") else ""
        whole = not line or line.startswith(("|", "#"))
        lines += (
            [line] if whole else textwrap.wrap(line, 140, subsequent_indent=indent, break_on_hyphens=False)
        )
    return "\n".join(lines)


def signature(node: ast.FunctionDef, name: str) -> str:
    """A function's name, parameters and return type as they are written."""
    parameters = ast.unparse(node.args).removeprefix("self, ").removeprefix("self")
    return f"{name}({parameters})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def fields(cls: type) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and description of every field that the class itself defines."""
    body = syntax(cls).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or "ClassVar" in (kind := ast.unparse(node.annotation)):
            continue
        described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        text = prose(after.value.value) if described else ""
        yield ast.unparse(node.target), kind, ast.unparse(node.value) if node.value else "", text


def escaped(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|")


def table(cls: type, skip: Container[str] = ()) -> str:
    """The fields of a settings class, inherited ones first, without the names in `skip`."""
    rows = [
        f"| `{name}` | `{escaped(kind)}` | `{default}` | {escaped(text)} |"
        for base in reversed(cls.__mro__)
        if dataclasses.is_dataclass(base)
        for name, kind, default, text in fields(base)
        if name not in skip
    ]
    return "\n".join(["| setting | type | default | meaning |", "| --- | --- | --- | --- |", *rows])


def section_tables(recipe: type, described: dict[type, str]) -> Iterator[str]:
    """A table for each section that no recipe before this one has; `described` maps sections to recipes."""
    for name, section in sections(recipe).items():
        if section not in described:
            described[section] = recipe.__name__
            yield f"`[{name}]`: {prose(section.__doc__)}"
            yield table(section)
        elif described[section] != "Recipe":
            yield f"`[{name}]` is that of `{described[section]}`."


def members(cls: type) -> str:
    """A list of the methods and properties of a class and of its bases in the same module."""
    rows = []
    bases = [base for base in reversed(cls.__mro__) if base.__module__ == cls.__module__]
    for node in (node for base in bases for node in syntax(base).body):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            name = "backbone(images)" if node.name == "forward" else f".{node.name}"
            if name.startswith(".") and not any(ast.unparse(d) == "property" for d in node.decorator_list):
                name = signature(node, name)
            elif node.returns:
                name += f" -> {ast.unparse(node.returns)}"
            rows.append(f"- `{name}`: {prose(ast.get_docstring(node))}".removesuffix(": "))
    return "\n".join(rows)


def page() -> str:
    """The whole page."""
    parts = [HEAD, "## Functions"]
    for name in (
        "pretrain",
        "load_recipe",
        "load",
        "export",
        "write_report",
        "embed",
        "look",
        "find_runs",
        "compare_runs",
    ):
        function = getattr(rcmae, name)
        parts += [f"### `{signature(syntax(function), name)}`", prose(function.__doc__)]
    parts.append("## Backbones")
    for cls in (rcmae.Backbone, Features):
        parts += [f"### `{cls.__name__}`", prose(cls.__doc__), members(cls)]
    parts += [
        "## Settings",
        "### `RuntimeConfig`",
        prose(rcmae.RuntimeConfig.__doc__),
        table(rcmae.RuntimeConfig),
    ]
    described: dict[type, str] = {}
    parts += ["### `Recipe`", prose(rcmae.Recipe.__doc__), table(rcmae.Recipe, sections(rcmae.Recipe))]
    parts += section_tables(rcmae.Recipe, described)
    parts += ["## Methods", METHODS]
    for name, method in rcmae.METHODS.items():
        recipe = method.recipe_type
        parts += [f"### `METHODS[{name!r}]`, `{recipe.__name__}`", prose(method.__doc__)]
        parts += section_tables(recipe, described)
    return wrapped("\n\n".join(parts)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
