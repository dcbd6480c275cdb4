"""The house itself: layers, tables, commands and dependencies are what the documents say."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rcmae
from benchmarks import tables
from rcmae.config import Machine, Recipe, fields, flat, sections
from rcmae.methods import METHODS

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "rcmae"
# Imports point down: a room may use rooms that stand further to the right, and its own.
ROOMS = [
    "cli",
    "compare",
    "pretraining",
    "lab",
    "report",
    "tasks",
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
    """The rooms of this package that a file imports when it is loaded."""
    package = ["rcmae", *path.relative_to(SOURCE).with_suffix("").parts[:-1]]
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            whole = [*base, *(node.module.split(".") if node.module else [])]
            found |= {whole[1]} if len(whole) > 1 else {alias.name for alias in node.names}
    return found


def test_imports_point_down():
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).with_suffix("").parts[0]
        if room in ROOMS:
            for other in imports(path) & set(ROOMS):
                assert ROOMS.index(other) >= ROOMS.index(room), f"{path.name} ({room}) imports {other}"


def test_the_public_names_are_listed_before_they_are_loaded():
    code = "import sys, rcmae; assert {*rcmae.__all__, '__doc__'} <= {*dir(rcmae)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(rcmae, name) is not None for name in rcmae.__all__)


def test_the_trainers_name_no_method():
    for name in ("trainer.py", "pretraining.py"):
        code = (SOURCE / name).read_text().split('"""', 2)[2]
        assert not re.search(r"\b(MAE|RCMAE|rcmae\.rcmae)\b", code), name


def test_the_suite_tests_this_checkout(tmp_path):
    """Whatever `rcmae` is installed, and from whichever folder: pytest puts `src` first."""
    assert Path(rcmae.__file__).parent == SOURCE
    installed = tmp_path / "rcmae"
    installed.mkdir()
    (installed / "__init__.py").write_text("raise ImportError('the installed one')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "--collect-only", "tests/test_digits.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_tables_are_those_of_the_results():
    texts = [(ROOT / page).read_text() for page in tables.PAGES]
    for text in texts:
        assert tables.filled(text) == text, "run `python -m benchmarks.tables`"
    assert {name for text in texts for name in re.findall(r"<!-- table: (\w+) -->", text)} == set(tables.TABLES), "each stands somewhere"


def test_readme_shows_the_commands_that_ci_and_people_run():
    text = (ROOT / "README.md").read_text()
    assert re.search(r"<!-- run -->\n```sh\n(.+?)\n```", text)[1] == "pip install -e . && rcmae pretrain"
    assert re.search(r"<!-- test -->\n```sh\n(.+?)\n```", text)[1] == "pip install -e '.[dev]' && pytest"
    assert text.index("<!-- test -->") < 1200, "both on the first screen"


def test_every_link_between_documents_leads_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_method_has_a_recipe_and_a_page():
    for name in METHODS:
        assert list((SOURCE / "recipes").glob(f"{name}-*.toml"))
        assert (ROOT / "docs" / "methods" / f"{name}.md").exists()


def test_every_setting_is_read_somewhere():
    text = "".join(p.read_text() for p in SOURCE.rglob("*.py") if p.name != "config.py")
    text += (SOURCE / "config.py").read_text().split("def total_steps")[1]
    names = set(flat(Recipe(epochs=1.0, steps=1, time="1"))) | {f.name for f in fields(Machine)}
    names |= {f.name for cls in sections().values() for f in fields(cls)}
    unread = [n for n in names if not re.search(rf"\.{n}\b|[\"']{n}[\"']", text) and n not in ("width", "depth", "heads")]
    assert not [n for n in unread if not n.startswith("decoder_")]


def test_few_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=]", d)[0] for d in project["dependencies"]}
    assert names == {
        "torch", "torchvision", "timm", "cyclopts", "safetensors", "numpy", "pillow", "matplotlib", "jinja2", "rich",
        "jaxtyping", "scikit-learn", "scipy",
    }  # fmt: skip


def test_no_pickle_is_written_and_none_read_but_by_import():
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        assert "torch.save(" not in text, path
        assert ("torch.load(" in text) == (path.name == "official.py"), path
        assert "pickle.load" not in text, path


def test_version_is_in_one_place():
    done = subprocess.run([sys.executable, "-m", "rcmae", "--version"], capture_output=True, text=True, check=True)
    text = (SOURCE / "__init__.py").read_text()
    assert done.stdout.strip() == re.search(r'__version__ = "(.+)"', text)[1]


@pytest.mark.parametrize("name", [p.stem for p in (ROOT / "results").glob("*.json")])
def test_results_say_how_they_were_made(name):
    result = json.loads((ROOT / "results" / f"{name}.json").read_text())
    conditions = result.get("machine") or result["conditions"]
    assert {"cpu", "threads", "torch", "precision", "commit"} <= set(conditions)
