"""Pages and commands mention only the method that a run trains. Parametrized over METHODS, so that new
methods are tested too."""

import re
import shutil
import typing
from pathlib import Path

import pytest
import timm
import torch

from rcmae import pretrain
from rcmae.cli import main
from rcmae.compare.cost import cost
from rcmae.config import RuntimeConfig, flat
from rcmae.engine.metrics import read_metrics
from rcmae.methods import METHODS, Method
from rcmae.report import write_report
from tests.conftest import batch_for, method_for, small
from tests.test_pretraining import folder  # noqa: F401 - a fixture
from tests.test_report import curves, part, words

FLAGS = {
    "gamma": lambda method: method.compare is not Method.compare,
    "half-life": lambda method: "teacher" in method.networks,
}
FLAGS |= dict.fromkeys(("momentum", "ema-updates"), FLAGS["half-life"])
"Flags that some methods have, and which."


@pytest.fixture(scope="module")
def runs(tmp_path_factory, folder):  # noqa: F811
    """A run of each method: six logged steps, probed at the end."""
    directories: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in directories:
            out = directories[name] = tmp_path_factory.mktemp("methods") / name
            recipe = small(name, data=str(folder), probes=1, probe_train=12, probe_test=12)
            pretrain(recipe, RuntimeConfig(out=out, device="cpu", precision="fp32", workers=0, log_every=1))
        return directories[name]

    return run


@pytest.mark.parametrize("name", METHODS)
def test_the_page_mentions_only_its_own_method(runs, request, name):
    """A sentence on its loss, only figures with data, the loss under its own name, and no flag that the
    method does not have."""
    run, method = runs(name), METHODS[name]
    request.getfixturevalue("drawn")
    page = write_report(run).read_text()
    loss, *_ = method.figures()
    verdict = [words(item) for item in part(page, 'id="verdict"', "</ul>").split("<li")[1:]]
    assert any(f"{loss.ylabel} " in text for text in verdict), verdict
    assert not any("not finite" in text for text in verdict)
    figures = page.split("<figure")[1:]
    for figure in figures:
        assert max(map(len, curves(figure)), default=0) > 0, f"nothing is drawn in {words(figure)[:200]}"
    assert f">{loss.ylabel}<" in part(page, 'id="figure-loss"', "</figure>")
    valid = {flag.replace("_", "-") for flag in [*flat(small(name)), *RuntimeConfig.__dataclass_fields__]}
    valid -= {flag for flag, has in FLAGS.items() if not has(method)}
    assert set(re.findall(r"--([a-z][a-z-]*)", words(page.split("<h2>Settings")[0]))) <= valid


@pytest.mark.parametrize("name", METHODS)
def test_a_method_declares_what_it_logs(runs, name):
    """`forward` returns the keys that `losses` lists, and figures use keys that are logged."""
    train = [line for line in read_metrics(runs(name)) if line["kind"] == "train"]
    method = METHODS[name]
    assert all(key in line for line in train for key in method.losses)
    keys = [curve.key for figure in method.figures() for curve in figure.curves if isinstance(curve.key, str)]
    assert keys
    assert set(keys) <= set(method.losses)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_has_the_declared_tensors(name):
    """The annotation of `forward` names every tensor with its number of dimensions."""
    method = method_for(small(name))
    declared = typing.get_type_hints(type(method).forward)["batch"]
    batch, kinds = batch_for(method), typing.get_type_hints(declared)
    assert declared.__required_keys__ <= batch.keys() <= kinds.keys()
    for key, tensor in batch.items():
        assert isinstance(tensor, kinds[key]), key


# --- every command on every kind of run ---------------------------------------------------------------------


def report(run: Path, name: str) -> list[str]:
    return ["report", str(run)]


def lab_gradients(run: Path, name: str) -> list[str]:
    argv = [
        "lab",
        "gradients",
        str(run),
        "--blocks",
        "2",
        "--batch-size",
        "2",
        "--settle",
        "0",
        "--device",
        "cpu",
    ]
    return [*argv, "--out", str(run.parent / "gradients")]


def evaluate_linear(run: Path, name: str) -> list[str]:
    data = re.search(r'^data = "(.+)"', (run / "recipe.toml").read_text(), re.MULTILINE)[1]
    return ["evaluate", "linear", str(run), "--data", data, "--device", "cpu", "--fit-steps", "5"]


def fine_tune(run: Path, name: str) -> list[str]:
    """With the recipe for folders of images."""
    data = re.search(r'^data = "(.+)"', (run / "recipe.toml").read_text(), re.MULTILINE)[1]
    options = [
        "--recipe",
        "folder",
        "--settings",
        "steps=20",
        "--device",
        "cpu",
        "--workers",
        "0",
        "--out",
        str(run.parent / "tuned"),
    ]
    return ["evaluate", "finetune", str(run), "--data", data, *options]


def verify(run: Path, name: str) -> list[str]:
    """Only its arguments: the runs that it makes take minutes."""
    return ["verify", name, "--recipe", str(run / "recipe.toml"), "--batch-size", "6"]


CANNOT = {
    "lab gradients": lambda name: (
        "" if METHODS[name].compares() else f"{name} has no reconstruction and consistency losses"
    ),
    "verify": lambda name: "4 micro-batches need a --batch-size that is a multiple of 4, not 6",
}
"The error message of a command for a run that it does not support; the exit code is 2."


@pytest.mark.parametrize("command", [report, lab_gradients, evaluate_linear, fine_tune, verify])
@pytest.mark.parametrize("name", METHODS)
def test_a_command_works_or_reports_why_not(runs, capsys, name, command):
    argv = command(runs(name), name)
    capsys.readouterr()
    reason = CANNOT.get(" ".join(argv[:2]), CANNOT.get(argv[0], lambda name: ""))(name)
    assert main(argv) == (2 if reason else 0), capsys.readouterr().err
    captured = capsys.readouterr()
    if reason:
        assert reason in captured.err
        assert captured.err.count("\n") == 1
    else:
        assert captured.out


@pytest.mark.parametrize("name", METHODS)
def test_exports_load_in_timm_and_the_cost_can_be_computed(runs, name):
    """timm loads its networks, and the cost of its step can be computed."""
    for which in METHODS[name].networks:
        model = timm.create_model(f"local-dir:{runs(name) / 'export' / which}", pretrained=True)
        assert model(torch.zeros(1, 3, 16, 16)).isfinite().all()
    counted = cost(small(name), "fp32")
    assert counted.flops > 0
    assert (counted.teacher_forward > 0) == ("teacher" in METHODS[name].networks)


@pytest.mark.parametrize("kind", ["fine-tuning", "detection", "an export", "no run"])
@pytest.mark.parametrize("command", [report, lab_gradients])
def test_a_folder_of_another_kind_is_reported_in_one_line(runs, tmp_path, capsys, kind, command):
    """It names the kind, and what to give instead."""
    directory = tmp_path / "run"
    if kind == "an export":
        shutil.copytree(runs("rcmae") / "export" / "teacher", directory)
    else:
        directory.mkdir()
    if kind in ("fine-tuning", "detection"):
        (directory / "recipe.toml").write_text(
            "mixup = 0.8\n" if kind == "fine-tuning" else 'preset = "nothing"\n'
        )
    capsys.readouterr()
    assert main(command(directory, "rcmae")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "rcmae: error: " in error
    assert kind in error or "is no run directory" in error or command is report
    assert "`rcmae pretrain`" in error or command is report


def test_a_detection_run_is_rejected_as_a_backbone(tmp_path, capsys):
    (tmp_path / "export" / "detector").mkdir(parents=True)
    assert main(["evaluate", "knn", str(tmp_path), "--data", "bundled:digits", "--device", "cpu"]) == 4
    error = capsys.readouterr().err
    assert "with a detector for `rcmae detect eval`" in error
    assert error.count("\n") == 1
