"""The package: layers, tables, commands and dependencies agree with the documents."""

import ast
import inspect
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import rcmae
from benchmarks import api, tables
from rcmae.config import RuntimeConfig, flags
from rcmae.data.sources import SOURCES
from rcmae.methods import METHODS

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "rcmae"
# Imports point down: a package may import those listed after it.
LAYERS = [
    "cli",
    "planning",
    "compare",
    "pretraining",
    "lab",
    "report",
    "tasks",
    "step_time",
    "trainer",
    "interop",
    "methods",
    "data",
    "models",
    "engine",
    "config",
    "errors",
]


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports at import time."""
    package = ["rcmae", *path.relative_to(SOURCE).with_suffix("").parts[:-1]]
    modules = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            parts = [*base, *(node.module.split(".") if node.module else [])]
            modules |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return modules


def test_imports_point_down():
    for path in SOURCE.rglob("*.py"):
        part = path.relative_to(SOURCE).with_suffix("").parts[0]
        if part in LAYERS:
            for other in imports(path) & set(LAYERS):
                assert LAYERS.index(other) >= LAYERS.index(part), f"{path.name} ({part}) imports {other}"


def test_the_public_names_are_listed_before_they_are_loaded():
    code = (
        "import sys, rcmae; assert {*rcmae.__all__, '__doc__'} <= {*dir(rcmae)}; assert 'torch' not in "
        "sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(rcmae, name) is not None for name in rcmae.__all__)


ASKS = ["report", "lab", "compare", "engine", "trainer.py", "pretraining.py", "cli.py"]
"What serves every method, and so asks the method and names none."

MAY_NAME = {"cli.py": {"mae"}}
"Files that may hold the name of a method, and which one: the package says in its help what it is for."


def methods_named(path: Path) -> set[str]:
    """Names of methods in a file's code, as identifiers or as words of strings; docstrings do not count.
    "rcmae", which is also the package's name, counts only as a string that is compared with something."""
    tree, names, used = ast.parse(path.read_text()), set(METHODS), set()
    notes = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    compared = {
        id(part) for node in ast.walk(tree) if isinstance(node, ast.Compare) for part in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in notes:
            words = set(re.findall(r"[a-z0-9]+", node.value.lower()))
            used |= words & (names - {"rcmae"}) | (
                {"rcmae"} & {node.value} if id(node) in compared else set()
            )
        elif isinstance(node, (ast.Name, ast.Attribute, ast.alias)):
            name = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "name"}[type(node)]
            used |= {getattr(node, name).split(".")[-1].lower()} & names
    return used


def test_shared_code_names_no_method():
    files = [
        file
        for place in ASKS
        for file in ([SOURCE / place] if place.endswith(".py") else (SOURCE / place).rglob("*.py"))
    ]
    named = {str(file.relative_to(SOURCE)): methods_named(file) for file in files if file.exists()}
    assert {
        file: names - MAY_NAME.get(file, set())
        for file, names in named.items()
        if names - MAY_NAME.get(file, set())
    } == {}


def test_no_other_file_names_a_kind_of_source():
    """Except in the default of a setting."""
    schemes = {kind.form.partition(":")[0] + ":" for kind in SOURCES if ":" in kind.form}
    kinds = {kind.kind for kind in SOURCES}
    source_files = {Path(inspect.getfile(kind)) for kind in SOURCES}
    assert len(schemes) > 1 and len(source_files) > 3
    for path in set(SOURCE.rglob("*.py")) - source_files:
        tree = ast.parse(path.read_text())
        defaults = {
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.AnnAssign) and getattr(n.target, "id", "") == "data"
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in defaults:
                assert not any(re.search(rf"\b{scheme}(?! )", node.value) for scheme in schemes), (
                    f"{path.name}:{node.lineno} {node.value!r}"
                )
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                compares_kind = any(isinstance(n, ast.Attribute) and n.attr == "kind" for n in sides)
                named = {n.value for side in sides for n in ast.walk(side) if isinstance(n, ast.Constant)}
                assert not (compares_kind and named & kinds), (
                    f"{path.name}:{node.lineno} asks for a kind by name"
                )
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                names = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                assert not names & {kind.__name__ for kind in SOURCES}, (
                    f"{path.name}:{node.lineno} asks for a class"
                )


def test_the_suite_tests_this_checkout(pytestconfig):
    """Even if another `rcmae` is installed: pytest puts `src` first."""
    assert Path(rcmae.__file__).parent == SOURCE
    assert pytestconfig.getini("pythonpath")[0] == ROOT / "src"


def test_readme_tables_are_those_of_the_results():
    texts = [(ROOT / page).read_text() for page in tables.PAGES]
    for text in texts:
        assert tables.filled(text) == text, "run `python -m benchmarks.tables`"
    assert {name for text in texts for name in re.findall(r"<!-- table: (\w+) -->", text)} == set(
        tables.TABLES
    ), "each table is used"


def test_readme_shows_the_commands_that_ci_and_people_run():
    text = (ROOT / "README.md").read_text()
    assert re.search(r"<!-- run -->\n```sh\n(.+?)\n```", text)[1] == "pip install -e . && rcmae pretrain"
    assert re.search(r"<!-- test -->\n```sh\n(.+?)\n```", text)[1] == "pip install -e '.[dev]' && pytest"
    assert text.index("<!-- test -->") < 1200, "both near the top of the README"


def test_every_link_between_documents_leads_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_api_page_is_up_to_date():
    assert api.PAGE.read_text() == api.page(), "run `python -m benchmarks.api`"
    public = {name for name in rcmae.__all__ if not name.startswith("__")}
    assert not [name for name in public if f"`{name}" not in api.page()]


def test_every_method_has_a_recipe_and_a_page():
    for name in METHODS:
        assert list((SOURCE / "recipes").glob(f"{name}-*.toml"))
        assert (ROOT / "docs" / "methods" / f"{name}.md").exists()


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_page_uses_the_names_of_flags_and_logged_losses(name):
    """Settings by their flags, and losses as in the progress line, with their keys in metrics.jsonl."""
    page, losses = (ROOT / "docs" / "methods" / f"{name}.md").read_text(), METHODS[name].losses
    quoted = set(re.findall(r"`([^`\n]+)`", page))
    assert not [
        text
        for text in quoted
        if re.match(r"[a-z_]+ = ", text) or text in flags(METHODS[name].recipe_type).keys() - losses.keys()
    ]
    assert not [key for key in quoted & losses.keys() if losses[key] not in quoted]
    for key in quoted & losses.keys():
        assert key == losses[key] or re.search(rf"`{losses[key]}` \([^)]*`{key}`", page), key


def test_every_setting_is_read_somewhere():
    """Outside of the rules that check it."""
    files = (
        p.read_text() for p in SOURCE.rglob("*.py") if p.parent.name != "config" or p.name == "recipe.py"
    )
    text = "".join(
        re.sub(r"    def rules\(self\).*?(?=\n\n\n|\Z)", "", file, flags=re.DOTALL) for file in files
    )
    names = {name for method in METHODS.values() for name in flags(method.recipe_type)} | set(
        flags(RuntimeConfig)
    )
    unread = [
        n
        for n in names
        if not re.search(rf"\.{n}\b|[\"']{n}[\"']", text) and n not in ("width", "depth", "heads")
    ]
    assert not [n for n in unread if not n.startswith("decoder_")]


def test_wheel_and_source_archive_hold_what_a_run_needs(tmp_path):
    """Recipes and the templates of pages beside the code; and the package is installed as it is built."""
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [wheel], [archive] = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    needed = {f"rcmae/{path.relative_to(SOURCE)}" for path in SOURCE.rglob("*.*") if path.suffix != ".pyc"}
    assert {Path(name).suffix for name in needed} == {".py", ".toml", ".j2", ".typed"}
    with zipfile.ZipFile(wheel) as built:
        assert {name for name in built.namelist() if name.startswith("rcmae/")} == needed
    with tarfile.open(archive) as built:
        names = {name.partition("/")[2] for name in built.getnames()}
    assert {f"src/{name}" for name in needed} | {"README.md", "LICENSE", "pyproject.toml"} <= names


def test_dependencies_are_the_agreed_ones():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=]", d)[0] for d in project["dependencies"]}
    assert names == {
        "torch",
        "torchvision",
        "timm",
        "cyclopts",
        "safetensors",
        "numpy",
        "pillow",
        "matplotlib",
        "jinja2",
        "rich",
        "jaxtyping",
        "scikit-learn",
        "scipy",
    }


def test_pickle_is_never_written_and_read_only_by_the_import():
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        assert "torch.save(" not in text, path
        assert ("torch.load(" in text) == (path.name == "weights.py"), path
        assert "pickle.load" not in text, path


def test_version_is_in_one_place():
    done = subprocess.run(
        [sys.executable, "-m", "rcmae", "--version"], capture_output=True, text=True, check=True
    )
    text = (SOURCE / "__init__.py").read_text()
    assert done.stdout.strip() == re.search(r'__version__ = "(.+)"', text)[1]


@pytest.mark.parametrize("name", [p.stem for p in (ROOT / "results").glob("*.json")])
def test_results_say_how_they_were_made(name):
    result = json.loads((ROOT / "results" / f"{name}.json").read_text())
    conditions = result.get("machine") or result["conditions"]
    assert {"cpu", "threads", "torch", "precision", "commit"} <= set(conditions)
