"""Every block of code in README, CONTRIBUTING and docs is run, shortened, or parsed; the site builds.

A block that is neither has a comment above it: `<!-- not run: REASON -->`. The names that the pages use
(YOUR_IMAGES, CLASSES, runs/mine, ...) exist in the folder in which their blocks run, and large networks and
long runs become tiny ones.
"""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

import rcmae
from rcmae import cli
from rcmae.config import changed, flags, shipped_recipes
from rcmae.methods.recipes import load_recipe
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
TINY = {"model": "vit_tiny_small_images", "width": 24, "depth": 1, "heads": 2, "patch": 4, "size": 16}
TINY |= {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "local_crops": 2, "local_size": 8}
TINY |= {
    "prototypes": 12,
    "head_width": 20,
    "embedding": 8,
    "top_blocks": 1,
    "batch_size": 8,
    "steps": 2,
    "probes": 0,
}
HERE = ["--device", "cpu", "--workers", "0"]
CACHE = [*HERE, "--feature-cache", "cache"]
TUNE = [*CACHE, "--recipe", "bundled", "--settings", "steps=2", "batch_size=8", "warmup_epochs=0"]
RUN = {
    "check": ["--recipe", "small", "--batch-size", "8"],
    "pack": ["--workers", "1"],
    "report": [],
    "list": [],
    "embed": CACHE,
    "look": HERE,
    "runs": [],
    "evaluate knn": CACHE,
    "evaluate linear": CACHE,
    "evaluate finetune": TUNE,
    "evaluate worth-it": [*TUNE, "--percents", "100", "--seeds", "2"],
    "evaluate robustness": [*CACHE, "--no-corruptions", "--attacked-images", "2", "--eps", "1"],
}
"Commands that are run, with what makes them short; `pretrain` is too, see `shortened`. Others take minutes."
ELSEWHERE = r"IMAGENET|COCO|CHECKPOINT|\bhub:|\btimm:|cuda|FILE|--help|scenes"
"What is not here, or too large: commands with it are parsed."
DONE: set[tuple[str, ...]] = set()
"The shortened commands that have succeeded; a page that repeats one need not wait for it again."


class Block(NamedTuple):
    """A fenced block."""

    line: int
    marker: str
    "the comment above it, such as 'not run: REASON'"
    language: str
    code: str


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    fence = re.compile(r"(?:<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    for match in fence.finditer(text):
        yield Block(text.count("\n", 0, match.start()) + 1, match[1] or "", match[2], match[3])


def commands(code: str) -> Iterator[list[str]]:
    """The words of every command of a shell block."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


def parse(argv: list[str]) -> None:
    """Parse a command of rcmae without running it. Raises an error for an unknown flag, recipe or value."""
    if "--help" in argv:
        argv = [word for word in argv if word != "--help"]
    try:
        cli.app.config = cli._prepare_pretrain(argv) if argv[0] == "pretrain" else ()
        cli.app.parse_args(argv, exit_on_error=False, print_error=False)
    finally:
        cli.app.config = ()
    if "--recipe" in argv and argv[0] in ("evaluate", "detect"):
        kind = "finetune" if argv[0] == "evaluate" else "detection"
        assert argv[argv.index("--recipe") + 1] in shipped_recipes(kind)


def without(argv: list[str], names: set[str]) -> list[str]:
    """A command without some flags and their values."""
    kept, dropping = [], False
    for word in argv:
        dropping = word in names if word.startswith("--") else dropping
        kept += [] if dropping else [word]
    return kept


def shortened(argv: list[str]) -> tuple[list[str], str | None] | None:
    """A command that is over in seconds, and where it must find nothing; None if it cannot be had here."""
    if re.search(ELSEWHERE, " ".join(argv)):
        return None
    if argv[0] != "pretrain":
        name = next((name for name in RUN if argv[: len(name.split())] == name.split()), None)
        if name is None:
            return None
        short = RUN[name]
        kept = without(argv, {word for word in short if word.startswith("--")})
        return [*kept, *short], argv[2] if name == "pack" else None
    named = next((word for word in argv[1:2] if not word.startswith("--")), "")
    if not named and "--out" in argv:  # resumes
        return [*without(argv, {"--steps"}), *HERE, *(["--steps", "3"] if "--steps" in argv else [])], None
    known = flags(type(load_recipe(named or "bundled")))
    options = [w for k, v in TINY.items() if k in known for w in (f"--{k}".replace("_", "-"), str(v))]
    out = argv[argv.index("--out") + 1] if "--out" in argv else "runs/new"
    kept = without(
        argv, {*options[::2], "--time", "--epochs", "--height", "--accumulate", "--compile", "--out"}
    )
    data = [] if "--data" in argv else ["--data", "YOUR_IMAGES"]  # drawing the bundled set takes seconds
    return [*kept, *options, *data, *HERE, "--out", out], out


def check_pip(argv: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {extra for word in argv for extra in re.findall(r"[\w]+", "".join(re.findall(r"\[(.*)\]", word)))}
    assert named <= project["optional-dependencies"].keys()


def check_make(argv: list[str]) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(argv[1:]) <= set(targets)


def check_python(argv: list[str]) -> None:
    assert argv[1] == "-m" and importlib.util.find_spec(argv[2]), argv


def check_rcmae(argv: list[str]) -> None:
    parse(argv[1:])
    short, place = shortened(argv[1:]) or ([], None)
    if short and tuple(short) not in DONE:
        if place:
            shutil.rmtree(place, ignore_errors=True)
        assert cli.main(short) == 0, shlex.join(short)
        DONE.add(tuple(short))


def check_torchrun(argv: list[str]) -> None:
    parse(argv[argv.index("rcmae") + 1 :])


CHECKS = {
    "rcmae": check_rcmae,
    "torchrun": check_torchrun,
    "pip": check_pip,
    "make": check_make,
    "python": check_python,
}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A folder with what the pages name: images, a finished run, its fine-tuned classifier
    and features."""
    root = tmp_path_factory.mktemp("docs")
    draws = np.random.default_rng(0)
    for name, count in (("YOUR_IMAGES", 12), ("CLASSES/train", 8), ("CLASSES/val", 4)):
        for label in ("cat", "dog"):
            (root / name / label).mkdir(parents=True)
            for i in range(count):
                pixels = draws.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / name / label / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for command in (
            "rcmae pretrain small --data YOUR_IMAGES --out runs/mine",
            "rcmae evaluate finetune runs/mine --data CLASSES",
            "rcmae embed runs/mine --data YOUR_IMAGES --out features.npz",
        ):
            check_rcmae(shlex.split(command))
    shutil.copytree(root / "runs" / "mine", root / "runs" / "rcmae-bundled-digits")
    return root


@pytest.fixture
def workspace(prepared, tmp_path, monkeypatch) -> Path:
    """A copy of that folder, as the current one; `rcmae.pretrain` is shortened too."""
    shutil.copytree(prepared, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    pretrain = rcmae.pretrain

    def short(recipe: rcmae.Recipe, runtime: rcmae.RuntimeConfig) -> None:
        shutil.rmtree(runtime.out, ignore_errors=True)
        tiny = {k: v for k, v in TINY.items() if k in flags(type(recipe))}
        pretrain(changed(recipe, **tiny, epochs=None), replace(runtime, device="cpu", workers=0))

    monkeypatch.setattr(rcmae, "pretrain", short, raising=False)
    return tmp_path / "here"


def unchecked(text: str) -> list[str]:
    """The blocks of a page that are not run, not parsed, and do not say why; runs the others."""
    silent = []
    for block in blocks(text):
        if block.marker == "test" or re.match(r"not run: \S", block.marker):  # "test" is run by .ci/run
            continue
        if block.language == "python":
            exec(compile(block.code, f"line {block.line}", "exec"), {})
        elif block.language == "sh" and all(words[0] in CHECKS for words in commands(block.code)):
            for words in commands(block.code):
                CHECKS[words[0]](words)
        else:
            silent.append(f"line {block.line}: mark it with <!-- not run: REASON -->")
    return silent


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_works(page, workspace):
    assert not unchecked(page.read_text())


@pytest.mark.parametrize(
    "block",
    [
        "```sh\nrcmae pretrain small --data YOUR_IMAGES --optt runs/mine\n```",
        "```sh\nrcmae evaluate knn runs/other --data CLASSES\n```",
        "```sh\ntorchrun -m rcmae pretrain smal --data IMAGENET/train\n```",
        "```sh\npip install -e '.[tif]'\n```",
        "```sh\npython -m benchmarks.tabels\n```",
        "```python\nimport rcmae\nrcmae.lod('runs/mine')\n```",
        "```sh\napt-get install x\n```",
        "```json\n{}\n```",
    ],
)
def test_a_wrong_block_is_noticed(block, workspace):
    try:
        assert not unchecked(block)
    except Exception:
        return
    pytest.fail("not noticed")


def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra [docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    page = (tmp_path / "index.html").read_text()
    assert not re.findall(r'(?:src|<link[^>]* href)="(?:https?:)?//[^"]*"', page), "nothing from the network"


def test_the_notebook_runs(tmp_path):
    """With two steps. Its stored outputs are small and name no folder of a machine."""
    path = ROOT / "examples" / "first_hour.ipynb"
    text = path.read_text()
    assert path.stat().st_size < 300_000 and not re.search(r"(?<![\w.])/(home|root|tmp|usr|work|venv)/", text)
    notebook = nbformat.reads(text.replace("STEPS = 400", "STEPS = 2"), as_version=4)
    assert sum("image/png" in str(cell.get("outputs")) for cell in notebook.cells) == 3
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs" / "first-hour" / "export" / "teacher" / "config.json").exists()
