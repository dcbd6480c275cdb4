"""`rcmae evaluate` end to end on small labeled folders: all kinds of backbones, all errors, caches, splits,
data loading of torch."""

import contextlib
import dataclasses
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import rcmae
import rcmae.cli
from rcmae.cli import main
from rcmae.config import RuntimeConfig, replaced, shipped_recipes, to_toml
from rcmae.data.labeled import open_labeled
from rcmae.engine.console import Screen
from rcmae.engine.distributed import World
from rcmae.errors import CheckpointError, DataError
from rcmae.interop.load import load, load_classifier
from rcmae.interop.timm_export import export
from rcmae.methods.dino import DINO
from rcmae.models.backbone import IMAGENET, Backbone
from rcmae.models.classifier import Classifier
from rcmae.pretraining import pretrain
from rcmae.tasks import features as features_module
from rcmae.tasks import worth
from rcmae.tasks.evaluate import evaluate
from rcmae.tasks.evaluation import TASKS as KINDS
from rcmae.tasks.evaluation.base import EvaluationOptions, Task, TaskResult
from rcmae.tasks.evaluation.finetune import FineTune
from rcmae.tasks.evaluation.worth import Worth
from rcmae.tasks.features import extract, identity
from rcmae.tasks.finetune import load_finetune
from rcmae.tasks.interval import over_seeds, with_margin
from rcmae.tasks.robustness.corruptions import STANDARD
from rcmae.tasks.robustness.metrics import imagenet_classes
from rcmae.tasks.score import READ, Centers, in_parts, rebatched
from rcmae.tasks.worth import verdict
from tests.conftest import GOLDEN, method_for, small
from tests.mutations import catches
from tests.processes import ranks


def picture(kind: int, seed: int) -> Image.Image:
    """Noise with the class as a bright quarter, which pixels alone predict."""
    rng = np.random.default_rng([kind, seed])
    pixels = rng.integers(0, 90, (20, 20, 3), dtype=np.uint8)
    pixels[10 * (kind // 2) :, 10 * (kind % 2) :][:10, :10] += 120
    return Image.fromarray(pixels)


def class_folders(root: Path, classes: str = "abc", count: int = 10, first: int = 0) -> Path:
    for kind, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + count):
            picture(kind, i).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    class_folders(root / "train", count=12)
    class_folders(root / "val", count=6, first=50)
    return root


@pytest.fixture
def backbone(tmp_path):
    method = method_for(small())
    export(method.backbone(), tmp_path / "backbone", {"method": "rcmae"})
    return tmp_path / "backbone"


def run(tmp_path, *argv) -> tuple[int, dict]:
    """The exit code, and the only record in the output folder."""
    out = tmp_path / "out"
    code = main(
        [
            "evaluate",
            *map(str, argv),
            "--device",
            "cpu",
            "--out",
            str(out),
            "--feature-cache",
            str(tmp_path / "cache"),
        ]
    )
    files = sorted(out.glob("*.json"))
    return code, json.loads(files[-1].read_text()) if files else {}


def test_an_evaluation_shows_16_bit_images_as_the_run_did(tmp_path, capsys):
    """Also to the network that is randomly initialized; --range dtype is obeyed."""
    for root, largest in (("images", 4000), ("labeled/a", 900), ("labeled/b", 1000)):
        (tmp_path / root).mkdir(parents=True)
        for i in range(8):
            values = np.random.default_rng(i).integers(0, largest, (20, 20), dtype=np.uint16)
            Image.fromarray(values).save(tmp_path / root / f"{i}.png")
    recipe = small(data=str(tmp_path / "images"))
    pretrain(recipe, RuntimeConfig(out=tmp_path / "run", device="cpu", workers=0))
    for which in ("student", "teacher"):
        config = json.loads((tmp_path / "run" / "export" / which / "config.json").read_text())
        assert config["rcmae"]["bits"] == load(tmp_path / "run", which).bits == 12
    capsys.readouterr()
    for name, options, note in (
        (
            f"{tmp_path}/run",
            (),
            "use 10 bits (values up to 999 in 16 images): 4,095 is white, as in the images",
        ),
        (f"scratch:{tmp_path}/run", (), "4,095 is white, as in the images that the network was trained on"),
        ("pixels", (), "1,023 is white; with --range dtype"),
        (f"{tmp_path}/run", ("--range", "dtype"), None),
    ):
        code, _ = run(tmp_path, "knn", name, "--data", tmp_path / "labeled", "--k", "2", *options)
        out = capsys.readouterr().out.replace("\n", " ")
        assert code == 0 and (note in out if note else "16-bit" not in out), out


TASKS = {
    "knn": ["--k", "5"],
    "linear": ["--fit-steps", "50", "--batch", "32"],
    "linear mae": ["--protocol", "mae", "--pool", "mean", "--fit-lr", "30"],
    "linear last blocks": ["--pool", "cls+mean", "--blocks", "2", "--fit-steps", "200", "--batch", "32"],
    "linear mae new crops": ["--protocol", "mae", "--fit-epochs", "30", "--augment", "--workers", "0"],
    "attentive": ["--fit-steps", "20", "--batch", "32", "--queries", "2"],
    "attentive latent": ["--kind", "latent", "--fit-steps", "20", "--batch", "32", "--queries", "2"],
}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_records_its_results(tmp_path, data, backbone, task, capsys):
    code, result = run(tmp_path, task.split()[0], backbone, "--data", data, *TASKS[task])
    assert code == 0
    assert 0 <= result["metrics"]["top1"] <= 100
    if task.split()[0] != "knn" and "mae" not in task:
        assert result["metrics"]["top1"] > 60, "three classes that can be distinguished by pixels"
    correct = load_file(next((tmp_path / "out").glob("*.safetensors")))["correct"]
    assert 100 * correct.float().mean().item() == pytest.approx(result["metrics"]["top1"])
    assert (
        result["train_images"] == 36
        and result["test_images"] == 18
        and list(result["per_class"]) == ["a", "b", "c"]
        and result["images_per_class"] == {"a": 6, "b": 6, "c": 6}
    )
    assert np.mean(list(result["per_class"].values())) == pytest.approx(result["metrics"]["top1"])
    assert result["hashes"]["backbone"] == identity(load(backbone))
    assert with_margin(result["metrics"]["top1"], 18) in capsys.readouterr().out


@catches("every feature is the mean", "rcmae.methods.distillation:SelfDistillation.pool", lambda old: "mean")
def test_k_nn_and_the_linear_probe_read_the_feature_of_the_methods_paper(tmp_path, data):
    quick, features = {"knn": ["--k", "5"], "linear": ["--fit-steps", "5"]}, {}
    for name in ("rcmae", "dino", "msn"):
        export(method_for(small(name)).backbone("student"), tmp_path / name, {"method": name})
        for task, options in quick.items():
            code, result = run(tmp_path / f"{name}-{task}", task, tmp_path / name, "--data", data, *options)
            features[name, task] = result["settings"]["pool"], result["settings"]["blocks"]
            assert code == 0
    assert features == {
        ("rcmae", "knn"): ("mean", 1),
        ("rcmae", "linear"): ("mean", 1),
        ("dino", "knn"): ("cls", 1),
        ("dino", "linear"): ("cls", 2),  # of the last 4 blocks, but the network has 2
        ("msn", "knn"): ("cls", 1),
        ("msn", "linear"): ("cls", 1),
    }
    assert DINO.linear_feature(384) == ("cls", 4) and DINO.linear_feature(768) == ("cls+mean", 1)


def test_other_settings_write_another_file(tmp_path, data, backbone):
    """The same evaluation is replaced; one with other settings, training images, test images or weights is
    added."""
    class_folders(tmp_path / "more" / "train", count=14), (tmp_path / "more" / "val").symlink_to(data / "val")
    (
        class_folders(tmp_path / "less" / "val", count=3),
        (tmp_path / "less" / "train").symlink_to(data / "train"),
    )
    common = ["knn", backbone, "--k", "3", "--data"]
    for number, argv in enumerate(
        [[data], [data], [data, "--temperature", "0.1"], [tmp_path / "more"], [tmp_path / "less"], [data]]
    ):
        run(tmp_path, *common, *argv)
        count = len(list((tmp_path / "out").glob("*.json")))
        assert count == len(list((tmp_path / "out").glob("*.safetensors"))) == [1, 1, 2, 3, 4, 4][number]
    assert record(tmp_path / "out", "knn-backbone")["settings"]["temperature"] == 0.07
    export(method_for(small(seed=1, **{"width": 36})).backbone(), tmp_path / "backbone", {"method": "rcmae"})
    run(tmp_path, *common, data)
    assert len(list((tmp_path / "out").glob("*.json"))) == 5, "other weights at the same path"
    plain = [
        "robustness",
        backbone,
        "--data",
        data,
        "--probe",
        "knn",
        "--no-attacks",
        "--workers",
        "0",
        "--corrupted-images",
        "1",
    ]
    for argv in ([], ["--no-corruptions"], []):
        run(tmp_path / "r", *plain, *argv)
    assert len(list((tmp_path / "r" / "out").glob("*.json"))) == 2
    assert (
        "mean error, C-style, not ImageNet-C"
        in record(tmp_path / "r" / "out", "robustness-backbone-knn")["metrics"]
    )


def test_a_record_that_only_contains_the_hash_is_not_replaced(tmp_path, data):
    out, argv = (
        tmp_path / "out",
        [
            "evaluate",
            "knn",
            "pixels",
            "--data",
            data,
            "--k",
            "3",
            "--device",
            "cpu",
            "--feature-cache",
            tmp_path / "cache",
        ],
    )
    argv = [*map(str, argv), "--out", str(out)]
    assert main(argv) == 0
    request = record(out, "knn-backbone")["hashes"]["request"]
    for text in (json.dumps({"notes": [request]}), "{", "[]"):
        (out / "knn-backbone.json").write_text(text)
        assert main(argv) == 0
        assert (out / "knn-backbone.json").read_text() == text and len(list(out.glob("*.json"))) == 2


def test_a_new_task_needs_only_its_class_and_a_registration(tmp_path, data, capsys):
    """Every entry of the registry has a command, made of its fields and its docstring, is run and
    recorded."""

    @dataclass(frozen=True, kw_only=True)
    class Always(Task):
        """The same class for every image."""

        name = "always"

        label: int = 1
        "the class, from 1"

        def required_features(self, context):
            return None

        def run(self, context):
            labels = context.set.test.labels
            return TaskResult(
                {"top1": 50.0}, labels == self.label - 1, torch.nn.Identity(), {"label": self.label}
            )

    rcmae.cli.evaluate.command(rcmae.cli._command_of(Always), name="always")
    assert run(tmp_path, "always", "pixels", "--data", data, "--label", "2")[1]["per_class"] == {
        "a": 0.0,
        "b": 100.0,
        "c": 0.0,
    }
    assert run(tmp_path / "no", "always", "pixels", "--data", data, "--label", "0") == (2, {})
    assert "label must be above 0, not 0" in capsys.readouterr().err
    assert main(["evaluate", "always", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "The same class for every image." in shown and "the class, from 1" in shown
    assert all(
        kind.name == name and kind.__doc__ and kind.run is not Task.run for name, kind in KINDS.items()
    )


def test_progress_is_printed_during_a_long_part(capsys):
    """Five seconds after the last line, even if no single part takes that long."""
    with Screen(True) as screen:
        screen.say("begun")
        with screen.progress("indexing", 3):
            time.sleep(2.5)
        with screen.progress("reading", 40) as tick:
            tick(20)
            time.sleep(3.2)
    assert capsys.readouterr().out == "begun\nreading: 20 of 40, 0:02 left\n"
    parts = in_parts(range(100, 141), 20)
    assert [i for part in parts for i in part] == list(range(100, 141)) and max(map(len, parts)) <= READ
    images = [{k: torch.tensor(part) for k in ("image", "index", "readable")} for part in parts]
    ticks: list[int] = []
    assert [b["index"].tolist() for b in rebatched(images, 20, ticks.append)] == [
        list(range(100, 120)),
        list(range(120, 140)),
        [140],
    ]
    assert ticks == sorted(ticks) and ticks[-1] == 41 and len(ticks) == len(parts)


def test_a_slow_loop_prints_its_progress_before_its_first_log(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("rcmae.engine.console.time.monotonic", lambda: now)
    screen = Screen(True)
    screen.say("begun")
    screen.start(1000, 100)
    for step in range(101, 140):
        now += 4
        screen.step(step)
    lines = [
        "begun",
        "step    103/1,000  59:48 left",
        "step    119/1,000  58:44 left",
        "step    135/1,000  57:40 left",
    ]
    assert capsys.readouterr().out.splitlines() == lines


def test_worth_it_estimates_the_remaining_time():
    epochs, steps = {10.0: 30.0, 100.0: 300.0}, {10.0: 30.0, 100.0: 30.0}
    none, two, all_of_them = {10.0: [], 100.0: []}, {10.0: [60.0, 60.0], 100.0: []}, {10.0: [60.0] * 4}
    assert worth._left(none, epochs, 4) == ""
    assert worth._left(two, epochs, 4) == ", about 42:00 left", "two runs of a minute and four of ten"
    assert worth._left(two, steps, 4) == ", about 6:00 left", "six runs of a minute"
    assert worth._left(all_of_them | {100.0: [300.0] * 4}, epochs, 4) == ", about 0:00 left"


def test_pixels_and_random_weights_are_baselines(tmp_path, data, backbone):
    assert run(tmp_path, "knn", "pixels", "--data", data, "--k", "3")[1]["metrics"]["top1"] == 100
    code, result = run(tmp_path / "s", "knn", f"scratch:{backbone}", "--data", data, "--k", "3")
    assert (
        code == 0
        and result["network"] == "backbone"
        and result["hashes"]["backbone"] != identity(load(backbone))
    )


def test_every_source_of_a_backbone_gives_the_same_network(tmp_path, capsys):
    """timm's architecture with weights made here: as a run, as .safetensors with and without its
    configuration, as an official .pth, and by timm's name. Equal to the last bit."""
    import timm

    torch.manual_seed(1)
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=0,
        global_pool="",
        img_size=32,
        patch_size=8,
        embed_dim=128,
        num_heads=4,
    )
    export(Backbone(vit, *IMAGENET), tmp_path / "run" / "export" / "student", {"method": "mae"})
    file = tmp_path / "run" / "export" / "student" / "model.safetensors"
    save_file(vit.state_dict(), tmp_path / "alone.safetensors")
    torch.save({"model": vit.state_dict(), "epoch": 3}, tmp_path / "official.pth")
    images = torch.rand(3, 3, 32, 32)
    expected = Backbone(vit.eval(), *IMAGENET)(images)
    for name in (
        tmp_path / "run",
        file,
        tmp_path / "alone.safetensors",
        tmp_path / "official.pth",
        f"timm:local-dir:{file.parent}",
    ):
        with torch.no_grad():
            features = rcmae.load(name).eval()(images)
        assert torch.equal(features.cls, expected.cls) and torch.equal(features.patches, expected.patches), (
            name
        )


def test_the_number_of_heads_is_part_of_a_backbones_identity(tmp_path):
    file = GOLDEN / "mae_official_layout.pth"
    assert identity(load(file, heads=3)) != identity(load(file, heads=2))
    assert identity(load(file, heads=3)) == identity(load(file, heads=3))


def test_all_backbones_get_the_same_fractions_of_labels(tmp_path, data, backbone):
    sizes, splits = [], []
    for percent in ("10", "50", "100"):
        _, result = run(tmp_path / percent, "knn", backbone, "--data", data, "--k", "1", "--labels", percent)
        sizes.append(result["train_images"])
        splits += sorted(
            p.read_bytes() for p in (tmp_path / percent / "cache" / "splits").rglob(f"labels-{percent}.json")
        )
    assert sizes == [4, 18, 36] and len(splits) == 2
    before = set((tmp_path / "50" / "cache" / "splits").rglob("*.json"))
    _, other = run(tmp_path / "50", "knn", "pixels", "--data", data, "--k", "1", "--labels", "50")
    assert set((tmp_path / "50" / "cache" / "splits").rglob("*.json")) == before and other["hashes"]["train"]


def subset(data):
    return open_labeled(str(data), size=16).train


@catches(
    "cached features do not depend on the backbone",
    "rcmae.tasks.features:identity",
    lambda old: lambda backbone: "0" * 16,
)
def test_features_are_computed_once_and_resumed(tmp_path, data, monkeypatch):
    monkeypatch.setattr(features_module, "PART", 10)
    backbone = method_for(small()).backbone()
    options = {
        "cache": tmp_path,
        "tokens": True,
        "device": torch.device("cpu"),
        "precision": "fp32",
        "world": World(),
    }
    part, calls = subset(data), []

    first = extract(backbone, part, **options)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 4
    stamps = {f: f.stat().st_mtime_ns for f in files}
    files[2].unlink()
    again = extract(backbone, part, tick=calls.append, **options)
    assert [f.stat().st_mtime_ns == stamps[f] for f in files] == [True, True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(first[:2], again[:2], strict=True)) and torch.equal(
        first.tokens, again.tokens
    )
    assert calls[-1] == 36
    with torch.no_grad():
        whole = backbone.eval()(
            torch.stack([Centers(part, (16, 16), 3)[i]["image"] for i in range(36)]).float() / 255
        )
    torch.testing.assert_close(first.mean, whole.mean)
    torch.testing.assert_close(first.tokens.float(), whole.tokens, atol=2e-3, rtol=2e-3)
    other = method_for(small(seed=1)).backbone()
    other.vit.cls_token.data += 1
    extract(other, part, **options)
    assert len(list(tmp_path.iterdir())) == 2, "features of another backbone are stored separately"


@catches(
    "an unreadable image counts as a gray one",
    "rcmae.tasks.context:EvaluationContext.correct",
    lambda old: lambda self, predictions, features: predictions == features.labels,
)
def test_an_unreadable_image_counts_as_wrong_and_is_named(tmp_path, capsys):
    """One in each class, so that any prediction for the gray replacement would be correct once."""
    class_folders(tmp_path / "d" / "train", count=6), class_folders(tmp_path / "d" / "val", count=6, first=50)
    for where in ("train/a/0.png", *(f"val/{name}/50.png" for name in "abc")):
        (tmp_path / "d" / where).write_bytes(b"no image")
    code, result = run(tmp_path, "knn", "pixels", "--data", tmp_path / "d", "--k", "3")
    assert code == 0
    assert result["metrics"]["top1"] == pytest.approx(100 * 5 / 6)
    output = capsys.readouterr().out.replace("\n", "")
    assert "b/50.png cannot be read" in output and "a/0.png cannot be read" in output


@catches(
    "a file with an unreadable image is never complete",
    "rcmae.tasks.features:_is_complete",
    lambda old: lambda file, rows, centers: False,
)
def test_features_are_kept_until_an_unreadable_image_can_be_read(tmp_path, monkeypatch):
    class_folders(tmp_path / "d" / "train", count=6), class_folders(tmp_path / "d" / "val", count=6, first=50)
    damaged = tmp_path / "d" / "train" / "a" / "0.png"
    content = damaged.read_bytes()
    damaged.write_bytes(bytes(len(content)))  # the set is identified by names and sizes
    extracted, save = [], features_module.save
    monkeypatch.setattr(features_module, "save", lambda tensors: extracted.append(1) or save(tensors))

    def evaluated(k: str) -> int:
        before = len(extracted)
        assert run(tmp_path, "knn", "pixels", "--data", tmp_path / "d", "--k", k)[0] == 0
        return len(extracted) - before

    assert evaluated("3") == 2, "one file for each part"
    assert evaluated("1") == 0
    damaged.write_bytes(content)
    assert evaluated("2") == 1


def shard(path: Path, images: list[tuple[int, int]], names: str = "abc") -> None:
    with tarfile.open(path, "w") as tar:
        for n, (kind, seed) in enumerate(images):
            file = io.BytesIO()
            picture(kind, seed).save(file, "PNG")
            for extension, content in (("png", file.getvalue()), ("cls", names[kind].encode())):
                entry = tarfile.TarInfo(f"{n:04d}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def test_supported_layouts_of_labeled_data(tmp_path, data):
    whole = open_labeled(str(class_folders(tmp_path / "flat", count=10)))
    assert (len(whole.train), len(whole.test)) == (
        24,
        6,
    ) and "every 5th image of each class is held out" in whole.notes[0]
    assert not set(whole.train.chosen) & set(whole.test.chosen) and np.bincount(
        whole.test.labels
    ).tolist() == [2, 2, 2]
    (tmp_path / "tars").mkdir()
    shard(tmp_path / "tars" / "train-000.tar", [(k, i) for i in range(4) for k in range(3)])
    shard(tmp_path / "tars" / "val-000.tar", [(k, 9) for k in (1, 2)])
    tars = open_labeled(str(tmp_path / "tars"))
    assert len(tars.train) == 12 and [tars.classes[i] for i in tars.test.labels] == ["b", "c"]
    assert "has no test image of 1 class: a" in tars.notes[0]
    apart = open_labeled(str(data / "train"), str(data / "val"))
    assert apart.train.fingerprint() == open_labeled(str(data)).train.fingerprint()
    bundled = open_labeled("bundled:digits", size=16)
    assert (len(bundled.train), len(bundled.test)) == (16384, 4000)


def test_classes_are_joined_by_name(tmp_path):
    class_folders(tmp_path / "train", "abc", 2)
    class_folders(tmp_path / "val", "bc", 2)
    dataset = open_labeled(str(tmp_path))
    assert [dataset.classes[i] for i in dataset.test.labels] == ["b", "b", "c", "c"]


def test_unusable_labeled_data_is_rejected(tmp_path):
    class_folders(tmp_path / "x" / "train", "ab", 2), class_folders(tmp_path / "x" / "val", "abzy", 2)
    with pytest.raises(DataError, match=r"val has 2 classes that .*train lacks: y, z"):
        open_labeled(str(tmp_path / "x"))
    class_folders(tmp_path / "one", "a", 4)
    with pytest.raises(DataError, match="no labels, or only one class"):
        open_labeled(str(tmp_path / "one"))
    (tmp_path / "alone").mkdir()
    class_folders(tmp_path / "alone" / "train", "ab", 2)
    with pytest.raises(DataError, match=r"only holds train/; give the other part with --val"):
        open_labeled(str(tmp_path / "alone"))
    far = open_labeled(str(class_folders(tmp_path / "far", "ab", 5))).train.source
    far.labels = far.labels + 1
    with pytest.raises(DataError, match=r"b/\d.png has label 2, outside the set's 2 classes"):
        from rcmae.data.labeled import _join

        _join(far, far)


def record(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def wnids(tmp_path_factory):
    """ImageNet's layout with one 16 px image per class and part; -A, -R and -Sketch consist of the same
    files."""
    names, root = imagenet_classes(), tmp_path_factory.mktemp("imagenet")
    for i, name in enumerate(names):
        (root / "train" / name).mkdir(parents=True)
        picture(i % 4, i).resize((16, 16)).save(root / "train" / name / "0.png")
    (root / "val").symlink_to(root / "train")
    for which in "ar":
        (root / which).mkdir()
        for name in files("timm.data").joinpath("_info", f"imagenet_{which}_synsets.txt").read_text().split():
            (root / which / name).symlink_to(root / "train" / name)
    (root / "real").mkdir()
    for number in (1, 2, 3):
        picture(0, number).save(root / "real" / f"ILSVRC2012_val_{number:08d}.JPEG")
    return root


def test_the_papers_protocol_runs_on_small_sets_laid_out_like_imagenet(tmp_path, wnids, backbone, capsys):
    """benchmarks/paper's commands: fine-tune, then the tuned classifier on -A, -R, -Sketch and ReaL, and one
    of three classes on -C."""
    common = ["--device", "cpu", "--workers", "0", "--feature-cache", str(tmp_path / "cache"), "--out"]
    tune = [
        "--recipe",
        "vitb16-in1k",
        "--settings",
        "steps=1",
        "warmup_epochs=0",
        "batch_size=8",
        "mix_group=8",
    ]
    assert (
        main(
            ["evaluate", "finetune", str(backbone), "--data", str(wnids), *tune, *common, str(tmp_path / "t")]
        )
        == 0
    )
    tuned = tmp_path / "t" / "finetune-backbone"
    sets = [x for w in ("a", "r") for x in (f"--imagenet-{w}", str(wnids / w))]
    sets += [
        "--imagenet-sketch",
        str(wnids / "train"),
        "--real",
        str(wnids / "real"),
        "--no-corruptions",
        "--no-attacks",
    ]
    assert (
        main(
            ["evaluate", "robustness", str(tuned), "--data", str(wnids), *sets, *common, str(tmp_path / "r")]
        )
        == 0
    )
    metrics = record(tmp_path / "r", "robustness-classifier")["metrics"]
    assert list(metrics) == [
        "top1",
        "ECE",
        "ImageNet-A",
        "ImageNet-A, among all 1,000 classes",
        "ImageNet-R",
        "ImageNet-R, among all 1,000 classes",
        "ImageNet-Sketch",
        "ReaL",
    ]
    assert (
        metrics["ImageNet-Sketch"] == metrics["top1"]
        and metrics["ImageNet-A"] >= metrics["ImageNet-A, among all 1,000 classes"]
    )


@pytest.mark.usefixtures("drawn")
def test_a_probe_is_fitted_and_attacked_and_imagenet_c_is_read(tmp_path, data, backbone, capsys):
    published = tmp_path / "c"
    for corruption in STANDARD:
        (published / corruption).mkdir(parents=True)
        for severity in range(1, 6):
            (published / corruption / str(severity)).symlink_to(tmp_path / "stored")
    for kind, name in enumerate("abc"):
        (tmp_path / "stored" / name).mkdir(parents=True)
        picture(kind, 77).resize((16, 16)).save(tmp_path / "stored" / name / "1.png")
    options = [
        "--imagenet-c",
        published,
        "--corrupted-images",
        "6",
        "--eps",
        "0.5",
        "64",
        "--pgd-steps",
        "3",
        "--probe",
        "knn",
    ]
    code, result = run(
        tmp_path,
        "robustness",
        backbone,
        "--data",
        data,
        "--attacked-images",
        "18",
        *options,
        "--workers",
        "0",
    )
    assert code == 0 and result["task"] == "robustness"
    assert result["metrics"]["PGD-3 64/255"] < result["metrics"]["clean, of the attacked images"], (
        "k-NN votes can be attacked"
    )
    assert (tmp_path / "out" / "robustness-backbone-knn.json").exists()
    capsys.readouterr()
    options[-1] = "linear"
    code, _ = run(
        tmp_path,
        "robustness",
        backbone,
        "--data",
        data,
        "--attacked-images",
        "18",
        *options,
        "--workers",
        "0",
    )
    assert code == 0
    result = record(tmp_path / "out", "robustness-backbone")
    metrics, output = result["metrics"], capsys.readouterr().out
    assert metrics["top1"] == metrics["clean, of the attacked images"] > 60
    assert (
        metrics["PGD-3 0.5/255"] <= metrics["FGSM 0.5/255"] <= metrics["top1"]
        and metrics["PGD-3 64/255"] < 20
    )
    assert "mean error, C-style, not ImageNet-C" in metrics and "mean error, ImageNet-C" in metrics
    assert "mCE, ImageNet-C" not in metrics, "three classes are not all of ImageNet-C"
    assert result["details"]["checks"]["PGD-3 0.5/255"]["eps 0 equals clean"]["holds"] is True
    assert "PGD is not above FGSM: yes" in output
    for kind in ("C-style", "ImageNet-C"):
        assert f"Open {tmp_path / 'out' / f'severity-{kind}.svg'}" in output.replace("\n", "")
        assert "severity" in (tmp_path / "out" / f"severity-{kind}.svg").read_text()
    correct = load_file(tmp_path / "out" / "robustness-backbone.safetensors")
    assert correct["gaussian_noise (C-style)"].shape == (5, 6) and correct["attack: FGSM 64/255"].shape == (
        18,
    )


def test_results_of_fine_tuned_models_appear_in_the_report_of_the_pretraining_run(
    tmp_path, data, monkeypatch, capsys
):
    """README's commands, without --out: each updates the page of the pre-training run that it starts from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.toml").write_text(to_toml(small()))
    for which in ("student", "teacher"):
        export(method_for(small()).backbone(which), tmp_path / "mine" / "export" / which, {"method": "rcmae"})
    tune = ["--recipe", "bundled", "--settings", "steps=2", "batch_size=8", "warmup_epochs=0"]
    common = ["--data", str(data), "--device", "cpu", "--workers", "0", "--feature-cache", "cache"]
    robust = ["--no-corruptions", "--no-attacks"]
    for argv in (
        ["finetune", "mine", *tune],
        ["robustness", "mine/evaluate/finetune-teacher", *robust],
        ["worth-it", "mine", *tune],
    ):
        more = ["--percents", "100", "--seeds", "2"] if argv[0] == "worth-it" else []
        capsys.readouterr()
        assert main(["evaluate", *argv, *more, *common]) == 0
        assert "Open mine/report.html" in capsys.readouterr().out
    page = (tmp_path / "mine" / "report.html").read_text()
    assert (
        "finetune-teacher/evaluate/robustness-classifier" in page
        and "With 100 % of the labels (36 images), teacher: " in page
    )


def test_incomplete_sets_are_refused_before_any_work(tmp_path, data, backbone, capsys):
    (tmp_path / "empty").mkdir(), class_folders(tmp_path / "one", "a")
    images, plain = (
        tmp_path / "c",
        ["robustness", backbone, "--data", data, "--workers", "0", "--probe", "knn", "--no-corruptions"],
    )
    for folder in (
        images / corruption / str(severity) for corruption in STANDARD for severity in range(1, 6)
    ):
        class_folders(folder, count=1)
    cases = {
        "-c": [
            ("one", "is not the complete ImageNet-C: gaussian_noise/1"),
            ("c", "20 x 20, but the model takes 16 x 16"),
        ],
        "-a": [("one", "one has 1 class folders; n01498041"), ("none", "none is not a folder")],
        "-r": [("one", "one has 1 class folders; n01443537")],
        "-sketch": [("one", "one has 1 class folders; n01440764")],
    }
    for name, (folder, message) in [
        (f"--imagenet{which}", case) for which, folder_cases in cases.items() for case in folder_cases
    ]:
        code, result = run(tmp_path, *plain, name, tmp_path / folder)
        assert code == 3 and not result and message in capsys.readouterr().err
    shutil.rmtree(images / "fog" / "3" / "b")
    for argv, code, message in (
        (["--imagenet-c", images], 3, "fog/3 has 2 class folders; b of 3 missing"),
        (["--real", tmp_path / "one"], 3, "0.png is no image of ImageNet's validation set, by its name"),
        (["--eps", "0.1", "0.10000001"], 2, "eps has a size twice: 0.1, 0.1"),
    ):
        assert run(tmp_path, *plain, *argv)[0] == code
        assert message in capsys.readouterr().err
    assert not (tmp_path / "cache" / "features").exists() and not (tmp_path / "out").exists()


def test_fine_tuning_is_a_task_like_the_others(tmp_path, data, backbone, capsys):
    settings = ["--recipe", "bundled", "--settings", "steps=12", "batch_size=16", "warmup_epochs=0"]
    code, result = run(tmp_path, "finetune", backbone, "--data", data, *settings, "--workers", "0")
    assert code == 0 and result["task"] == "finetune" and result["settings"]["layer_decay"] == 0.75
    again = run(tmp_path, "finetune", backbone, "--data", data, *settings, "--workers", "0")[1]
    assert again["metrics"] == result["metrics"] and "resumed from step_00000012" in capsys.readouterr().out
    assert again["seconds"] == result["seconds"] > 0, "the time of training alone"
    assert main(["evaluate", "knn", str(tmp_path / "out" / "finetune-backbone"), "--data", str(data)]) == 4
    assert "is a run of fine-tuning, with a classifier" in capsys.readouterr().err
    model, classes = load_classifier(tmp_path / "out" / "finetune-backbone")
    assert classes == ["a", "b", "c"]
    torch.save({"model": model.vit.state_dict()}, tmp_path / "tuned.pth")
    images = torch.rand(2, 3, 16, 16)
    other, names = load_classifier(tmp_path / "tuned.pth", heads=2)
    assert names == [], "weights without configuration have no class names"
    with torch.no_grad():
        here = torch.nn.Module.eval(model).vit((images - other.mean) / other.std)
        torch.testing.assert_close(other.eval()(images), here, rtol=1e-5, atol=1e-6)
    assert load_classifier(backbone) is None


def test_a_tuned_classifier_is_scored_on_images_it_was_not_trained_on(tmp_path, backbone, capsys):
    """A set without a validation part is split the same way by fine-tuning and by the evaluation; of another
    set, all images count."""
    whole = class_folders(tmp_path / "whole", count=10)
    settings = [
        "--recipe",
        "bundled",
        "--settings",
        "steps=2",
        "batch_size=8",
        "warmup_epochs=0",
        "--workers",
        "0",
    ]
    _, tuned = run(tmp_path, "finetune", backbone, "--data", whole, *settings)
    place, plain = (
        tmp_path / "out" / "finetune-backbone",
        ["--no-corruptions", "--no-attacks", "--workers", "0"],
    )
    for classifier in (
        place,
        place / "export" / "classifier",
        f"timm:local-dir:{place / 'export' / 'classifier'}",
    ):
        code, result = run(tmp_path / "r", "robustness", classifier, "--data", whole, *plain)
        assert code == 0 and all(
            result["hashes"][part] == tuned["hashes"][part] for part in ("train", "test")
        )
        assert result["test_images"] == 6 and result["metrics"]["top1"] == tuned["metrics"]["top1"]
    picture(0, 99).save(whole / "a" / "new.png")
    capsys.readouterr()
    _, result = run(tmp_path / "other", "robustness", place, "--data", whole, *plain)
    assert (
        result["test_images"] == 31
        and "possibly including the classifier's training images" in result["notes"][0]
    )
    assert "testing on all images" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.slow
def test_two_processes_share_the_work_and_agree_with_one(tmp_path, data):
    """Both extract features, then both fine-tune two networks one after the other; the process group is
    opened and closed once."""
    method = method_for(small())
    for which in ("student", "teacher"):
        export(method.backbone(which), tmp_path / "run" / "export" / which, {"method": "rcmae"})
    options = ["--data", data, "--which", "both", "--device", "cpu", "--workers", "0", "--out"]
    tune = ["--recipe", "bundled", "--settings", "steps=2", "batch_size=8", "warmup_epochs=0"]
    for task in (["knn", "--k", "3"], ["finetune", *tune]):
        argv = ["evaluate", *map(str, [task[0], tmp_path / "run", *task[1:], *options])]
        codes, output = ranks(
            tmp_path / task[0], main, [*argv, str(tmp_path / "two"), "--feature-cache", str(tmp_path / "c2")]
        )
        assert codes == [0, 0], output[-3000:]
        assert main([*argv, str(tmp_path / "one"), "--feature-cache", str(tmp_path / "c1")]) == 0
        for which in ("student", "teacher"):
            one, both = (
                record(tmp_path / where, f"{task[0]}-{which}")["metrics"] for where in ("one", "two")
            )
            assert one == pytest.approx(both, abs=1e-3), task


@catches(
    "an evaluation uses other images than those of the run",
    "rcmae.tasks.evaluation.base:EvaluationOptions.with_data",
    lambda old: lambda self, name: dataclasses.replace(self, data=self.data or "nowhere"),
)
def test_the_images_of_a_run_are_the_default(tmp_path, data, monkeypatch, capsys):
    """Also for an exported folder, a randomly initialized network, and a classifier that was fine-tuned on
    them; without labels, --data is required."""
    monkeypatch.chdir(tmp_path)
    for name, images in (("mine", data), ("unlabeled", data / "val" / "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.toml").write_text(to_toml(small(data=str(images))))
        export(method_for(small()).backbone(), tmp_path / name / "export" / "teacher", {"method": "rcmae"})
    common = ["--device", "cpu", "--workers", "0", "--feature-cache", "cache"]
    tune = ["--recipe", "bundled", "--settings", "steps=2", "batch_size=8", "warmup_epochs=0"]
    robust = ["--no-corruptions", "--no-attacks"]
    for argv, file in (
        (["knn", "mine"], "mine/evaluate/knn-teacher"),
        (["knn", "mine/export/teacher", "--out", "o"], "o/knn-backbone"),
        (["knn", "scratch:mine", "--out", "o2"], "o2/knn-backbone"),
        (["finetune", "mine", *tune], "mine/evaluate/finetune-teacher"),
        (
            ["robustness", "mine/evaluate/finetune-teacher", *robust],
            "mine/evaluate/finetune-teacher/evaluate/robustness-classifier",
        ),
    ):
        capsys.readouterr()
        assert main(["evaluate", *argv, *common]) == 0
        assert f"evaluating on {data} by default" in capsys.readouterr().out.replace("\n", "")
        assert json.loads(Path(f"{file}.json").read_text())["data"] == str(data)
    assert main(["evaluate", "knn", "unlabeled", *common]) == 3
    assert "has no labels" in (err := capsys.readouterr().err) and "--data gives others" in err
    (tmp_path / "mine" / "evaluate" / "finetune-teacher" / "machine.json").unlink()
    assert main(["evaluate", "robustness", "mine/evaluate/finetune-teacher", *common]) == 2
    assert "does not say which images it was trained on: give --data" in capsys.readouterr().err
    assert EvaluationOptions().with_data("timm:vit_tiny_patch16_224").data == "bundled:digits"


class Forgetful(dict):
    def __setitem__(self, key, value):
        pass


@catches("weights are read for each network", "rcmae.interop.weights:_in_use", lambda old: Forgetful())
@catches("weights are kept forever", "rcmae.interop.weights:_in_use", lambda old: {})
def test_weights_are_read_once(tmp_path, data, monkeypatch):
    """Those of a file with a network and its average, of which both are evaluated."""
    state = method_for(small()).backbone().vit.state_dict()
    torch.save({"model": state, "model_ema": {k: v + 0.01 for k, v in state.items()}}, tmp_path / "x.pth")
    reads = []
    load_pickle = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: reads.append(a[0]) or load_pickle(*a, **k))
    options = EvaluationOptions(
        data=str(data),
        which="both",
        heads=2,
        device="cpu",
        workers=0,
        out=tmp_path / "o",
        feature_cache=tmp_path / "c",
    )
    assert len(evaluate(str(tmp_path / "x.pth"), KINDS["knn"](), options)) == 2
    assert reads == [tmp_path / "x.pth"]
    evaluate(str(tmp_path / "x.pth"), KINDS["knn"](), options)
    assert len(reads) == 2, "what nobody uses any more is not kept"


def test_worth_it_compares_with_training_from_scratch_for_each_seed(tmp_path, data, backbone, capsys):
    options = [
        "--data",
        data,
        "--recipe",
        "bundled",
        "--settings",
        "steps=2",
        "batch_size=8",
        "warmup_epochs=0",
        "--percents",
        "50",
        "100",
    ]
    argv = [
        "evaluate",
        "worth-it",
        backbone,
        *options,
        "--seeds",
        "2",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--against",
        "pixels",
    ]
    folders = ["--out", tmp_path / "o", "--feature-cache", tmp_path / "c"]
    for other, code in (("pixels", 2), (tmp_path / "typo", 4)):
        assert main([str(a) for a in [*argv[:-1], other, *folders]]) == code, "reported before any training"
        assert not (tmp_path / "o").exists()
    capsys.readouterr()
    assert main([str(a) for a in [*argv[:-2], *folders]]) == 0
    output = capsys.readouterr().out.replace("\n", " ")
    first = output.index("8 trainings: from scratch, backbone, on 50, 100 % of the labels, 2 seeds each")
    assert first < output.index("in all, estimated from a step") < output.index("training 1 of 8")
    result = json.loads((tmp_path / "o" / "worth-it" / "worth-it.json").read_text())
    assert [(r["arm"], r["percent"], r["images"]) for r in result["rows"]] == [
        ("from scratch", 50, 18),
        ("backbone", 50, 18),
        ("from scratch", 100, 36),
        ("backbone", 100, 36),
    ]
    assert all(len(r["seeds"]) == 2 for r in result["rows"]) and len(result["verdict"]) == 3
    start = load(f"scratch:{backbone}", seed=1).vit.blocks[0].attn.qkv.weight
    assert not torch.equal(start, load(f"scratch:{backbone}", seed=2).vit.blocks[0].attn.qkv.weight)
    assert "With 50 % of the labels (18 images), backbone: " in output


def test_worth_it_trains_all_arms_by_the_recipe_of_the_backbone(tmp_path, data, backbone, monkeypatch):
    names = []

    def noted(name, tuning, options):
        names.append((name, tuning.recipe))
        return []

    monkeypatch.setattr(worth, "evaluate", noted)
    monkeypatch.setattr(worth, "seconds_of_trainings", lambda *args: dict.fromkeys((1.0, 10.0, 100.0), 0.0))
    monkeypatch.setattr(
        "rcmae.tasks.evaluation.finetune.suited_recipe",
        lambda name, data: "small" if name == str(backbone) else "folder",
    )
    other = str(shutil.copytree(backbone, tmp_path / "other"))
    argv = ["evaluate", "worth-it", str(backbone), "--data", str(data), "--against", other, "--device", "cpu"]
    assert main([*argv, "--out", str(tmp_path / "o")]) == 0
    assert {*names} == {(name, "small") for name in (f"scratch:{backbone}", str(backbone), other)}


def test_worth_it_times_micro_batches_and_reports_a_lack_of_memory(
    tmp_path, data, backbone, monkeypatch, capsys
):
    batches = []

    class Noted(Classifier):
        def forward(self, images):
            batches.append(len(images))
            return super().forward(images)

    def without_memory(*args):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(worth, "Classifier", Noted)
    monkeypatch.setattr(worth, "time", SimpleNamespace(monotonic=lambda: 0.0))
    tuning = FineTune(recipe="bundled", settings=("batch_size=24",), accumulate=4)
    options = EvaluationOptions(data=str(data), device="cpu", workers=0, feature_cache=tmp_path / "c")
    task = Worth(percents=(50.0, 100.0))
    seconds = worth.seconds_of_trainings(str(backbone), task, tuning, options, World())
    assert batches == [2, 4, 6] and seconds.keys() == {50.0, 100.0}
    monkeypatch.setattr(worth, "seconds_of_trainings", without_memory)
    argv = ["evaluate", "worth-it", str(backbone), "--data", str(data), "--device", "cpu"]
    assert main([*argv, "--out", str(tmp_path / "o")]) == 8
    assert "or a smaller batch (--settings batch_size=N)" in capsys.readouterr().err


def test_worth_it_is_reported_by_the_first_rank_only(tmp_path, backbone, monkeypatch, capsys):
    @contextlib.contextmanager
    def second(device):
        yield World(1, 2)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(worth.distributed, "process_group", second)
    monkeypatch.setattr(worth, "evaluate", lambda *args: [])
    monkeypatch.setattr(worth, "seconds_of_trainings", lambda *args: dict.fromkeys((1.0, 10.0, 100.0), 0.0))
    assert main(["evaluate", "worth-it", str(backbone), "--device", "cpu", "--out", str(tmp_path / "o")]) == 0
    assert not capsys.readouterr().out and not (tmp_path / "o").exists()


def test_default_k_adapts_to_few_images_but_an_explicit_k_does_not(tmp_path, backbone, capsys):
    class_folders(tmp_path / "d" / "train", count=4), class_folders(tmp_path / "d" / "val", count=2, first=50)
    for broken in "ab":
        (tmp_path / "d" / "train" / broken / "0.png").write_bytes(b"no image")
    common = ["--data", tmp_path / "d", "--workers", "0"]
    assert list(run(tmp_path, "knn", "pixels", *common)[1]["metrics"]) == ["top1", "top1 k=10"], (
        "of 12 images two are unreadable"
    )
    result = run(tmp_path / "few", "knn", "pixels", *common, "--labels", "50")[1]
    assert len(result["settings"]["k"]) == 1 and 4 <= result["settings"]["k"][0] <= 6, (
        "six, of which two may be the unreadable ones"
    )
    result = run(
        tmp_path / "r", "robustness", backbone, *common, "--probe", "knn", "--no-corruptions", "--no-attacks"
    )[1]
    assert result["settings"]["probe_settings"]["k"] == [10] and result["machine"]["precision"] == "fp32"
    assert run(tmp_path / "chosen", "knn", "pixels", *common, "--k", "11")[0] == 2
    assert "k must lie in 1 to 10" in capsys.readouterr().err


def test_a_damaged_cache_is_computed_again(tmp_path, data, backbone):
    first = run(tmp_path, "knn", backbone, "--data", data, "--k", "3")[1]
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-9])
    code, again = run(tmp_path, "knn", backbone, "--data", data, "--k", "3")
    assert code == 0 and again["metrics"] == first["metrics"]


def test_features_that_are_not_finite_are_refused(tmp_path, data):
    """float16 ends at 65,504: larger tokens would silently make a probe useless."""
    network = method_for(small()).backbone()
    network.vit.norm.weight.data *= 1e6
    options = {"cache": tmp_path, "device": torch.device("cpu"), "precision": "fp32", "world": World()}
    assert extract(network, subset(data), tokens=False, **options).mean.isfinite().all()
    with pytest.raises(
        CheckpointError,
        match=r"are not finite \(tokens\): tokens above 65,504 do not fit half precision; use knn or linear",
    ):
        extract(network, subset(data), tokens=True, **options)
    network.vit.norm.weight.data *= float("nan")
    with pytest.raises(CheckpointError, match=r"are not finite \(cls, mean\): check its weights"):
        extract(network, subset(data), tokens=False, **options)


def test_advice_names_flags_that_exist():
    """In the recipes of fine-tuning and in docs/evaluation.md."""
    known = {f.name for cls in (EvaluationOptions, Worth, *KINDS.values()) for f in fields(cls)}
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    for text in (page, *(file.read_text() for file in shipped_recipes("finetune").values())):
        assert not {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]*)", text)} - known
    advice = re.search(r"--settings (.+?)\.\n", shipped_recipes("finetune")["folder"].read_text())[1]
    changed = replaced(load_finetune("folder"), shlex.split(advice), "folder")
    assert (changed.mixup, changed.cutmix, changed.crop_scale, changed.flip) == (0, 0, (0.5, 1), False)


def test_the_verdict_follows_from_the_interval():
    def row(arm, *seeds):
        gain = {} if arm == "from scratch" else {"gain": over_seeds([s - 10 for s in seeds])}
        return {"arm": arm, "percent": 1, "images": 7, "seeds": seeds} | gain

    rows = [row("from scratch", 10.0, 10.0), row("t", 29, 30, 31), row("t", 5, 30, 40), row("t", 1, 1.5, 2)]
    paid, unclear, worse, same, note = verdict([*rows, row("t", 10, 10.01, 10.02)])
    assert (
        "pre-training paid off (30.0 % accuracy, 10.0 % from scratch; +20.0 points, +17.5 to +22.5)" in paid
    )
    assert "inconclusive (25.0 % accuracy" in unclear and "80 % power at" in unclear
    assert "did not pay" in worse and "no difference of 1 point or more" in same and "4 comparisons" in note


FAILURES = [
    (["knn", "{backbone}", "--data", "{data}", "--k", "99"], 2, "k must lie in 1 to 36"),
    (["knn", "{backbone}", "--data", "{data}", "--labels", "0"], 2, "labels is a percentage"),
    (["knn", "{tmp}/none"], 4, "none does not exist; give a run directory"),
    (["knn", "timm:vit_typo", "--data", "{data}"], 2, "timm cannot load 'vit_typo'"),
    (["knn", "{backbone}", "--data", "{tmp}/nowhere"], 3, "nowhere does not exist"),
    (["linear", "{backbone}", "--data", "{data}", "--protocol", "mea"], 2, "mea"),
    (
        ["knn", "{tmp}/wrong.safetensors", "--data", "{data}"],
        4,
        "wrong.safetensors is not a plain Vision Transformer: blocks.0.attn.qkv.weight is",
    ),
    (["knn", "{tmp}/odd.safetensors", "--data", "{data}"], 4, "with the names of timm"),
    (
        ["knn", "{backbone}", "--data", "{data}", "--seed", "-1"],
        2,
        "seed must be 0 or more and below 2**63, not -1",
    ),
    (
        ["knn", "{tmp}/wrong.safetensors", "--data", "{data}", "--heads", "-1"],
        2,
        "heads must be 1 or more, not -1",
    ),
    (
        ["knn", "{tmp}/wrong.safetensors", "--data", "{data}", "--heads", "0"],
        2,
        "heads must be 1 or more, not 0",
    ),
    (["knn", "{backbone}", "--data", "{data}", "--workers", "-1"], 2, "workers must be 0 or more, not -1"),
    (
        ["linear", "{backbone}", "--data", "{data}", "--protocol", "mae", "--batch", "1"],
        2,
        "batch must be 2 or more",
    ),
    (["robustness", "{tmp}/damaged", "--data", "{data}"], 4, "damaged/config.json is damaged or not ours"),
    (["robustness", "{tmp}/list", "--data", "{data}"], 4, "list/config.json is damaged or not ours"),
    (
        ["finetune", "{backbone}", "--data", "{data}", "--settings", "seed=3"],
        2,
        "folder and its settings set seed 3; leave it out there",
    ),
    (
        ["finetune", "{backbone}", "--data", "{data}", "--recipe", "{tmp}/own.toml"],
        2,
        "own.toml and its settings set seed 3",
    ),
    (["worth-it", "{backbone}", "--data", "{data}", "--labels", "10"], 2, "leave out --labels and --seed"),
    (["worth-it", "{backbone}", "--data", "{data}", "--seed", "1"], 2, "leave out --labels and --seed"),
    (["linear", "{backbone}", "--data", "{data}", "--blocks", "3"], 2, "backbone has only 2"),
    (["knn", "pixels", "--data", "{data}", "--blocks", "2"], 2, "--blocks 2: pixels has no class token"),
    (
        ["knn", "{backbone}", "--data", "{data}", "--pool", "mean", "--blocks", "2"],
        2,
        "blocks needs pool cls",
    ),
]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evaluate", "worth-it", "X", "--seeds", "1"], "seeds must be 2 or more for an interval, not 1"),
        (["evaluate", "worth-it", "X", "--percents", "0"], "percents are percentages of the labels"),
        (["evaluate", "worth-it", "X", "--seed", "1"], "leave out --labels and --seed"),
        (["evaluate", "worth-it", "X", "--workers", "-1"], "workers must be 0 or more, not -1"),
        (["evaluate", "worth-it", "X", "--accumulate", "0"], "accumulate must be above 0, not 0"),
        (
            ["evaluate", "worth-it", "X", "--settings", "steps=2"],
            "warmup_epochs 5 is not below the length of the run, 2 steps",
        ),
        (["evaluate", "worth-it", "X", "--against", "pixels"], "pixels have no weights to fine-tune"),
        (
            ["evaluate", "finetune", "X", "--settings", "epochs=2"],
            "warmup_epochs 5 is not below the length of the run, 2.00 epochs",
        ),
        (["evaluate", "finetune", "X", "--settings", "flpi=false"], "did you mean flip?"),
        (
            ["evaluate", "finetune", "X", "--recipe", "foldr"],
            "there is no recipe 'foldr'; did you mean folder?",
        ),
        (["evaluate", "finetune", "pixels"], "pixels have no weights to fine-tune"),
        (["evaluate", "knn", "X", "--labels", "0"], "labels is a percentage"),
        (["evaluate", "attentive", "X", "--queries", "0"], "queries must be above 0, not 0"),
        (["evaluate", "linear", "X", "--protocol", "mae", "--batch", "1"], "batch must be 2 or more"),
        (["evaluate", "robustness", "X", "--eps", "1", "1"], "eps has a size twice: 1, 1"),
        (["detect", "train", "X", "--accumulate", "0"], "accumulate must be 1 or more, not 0"),
        (["detect", "train", "X", "--device", "tpu"], "'tpu' is not a valid device"),
        (
            ["detect", "train", "X", "--train-images", "0", "--heads", "0"],
            "--train-images must be 1 or more, not 0; --heads must be 1 or more, not 0",
        ),
        (
            ["detect", "train", "X", "--settings", "steps=3"],
            "warmup_steps 250 is not below the run's 3 steps",
        ),
        (["detect", "eval", "X", "--device", "tpu"], "'tpu' is not a valid device"),
        (["detect", "show", "X", "x.png", "--device", "tpu"], "'tpu' is not a valid device"),
        (
            ["compare", "race", "mae", "rcmae", "--settings", "size=30"],
            "size 30 x 30 is not a multiple of the patch",
        ),
        (["compare", "race", "mae", "dino", "--budget", "64 images"], "64 images are 0 steps of mae"),
        (["pretrain", "mae-vits16-in1k", "--size", "30"], "size 30 x 30 is not a multiple of the patch"),
        (
            ["pretrain", "mocov3-bundled", "--accumulate", "128"],
            "mocov3 learns nothing from micro-batches of one image",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_settings_are_checked_before_anything_is_read(argv, message, capsys, monkeypatch, tmp_path):
    """Neither the backbone nor the data exist here."""
    monkeypatch.chdir(tmp_path)
    data_options = [] if argv[1] == "show" else ["--data", "nowhere"]
    assert main([*argv, *data_options]) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_that_differs_is_reported_before_the_images_are_read(tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text('method = "mae"')
    (tmp_path / "checkpoints" / "step_00000000").mkdir(parents=True)
    assert main(["pretrain", "--out", str(tmp_path), "--seed", "3", "--data", "nowhere"]) == 2
    assert "was started with seed 0 (now 3)" in capsys.readouterr().err


def test_worth_it_rejects_bad_options_without_importing_torch():
    """Without importing torch, which takes seconds."""
    argv = ["evaluate", "worth-it", "X", "--seeds", "1"]
    code = (
        f"import sys; from rcmae.cli import main; assert main({argv}) == 2; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(("argv", "code", "message"), FAILURES)
def test_errors_are_reported_in_one_line_and_leave_no_files(
    tmp_path, data, backbone, argv, code, message, capsys
):
    import timm

    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=128, num_heads=4, depth=1
    )
    state = vit.state_dict()
    state["blocks.0.attn.qkv.weight"] = torch.zeros(5, 5)
    save_file(state, tmp_path / "wrong.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "odd.safetensors")
    for name, text in (("damaged", "{"), ("list", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "own.toml").write_text("seed = 3\nsteps = 2\nwarmup_epochs = 1\n")
    argv = [a.format(tmp=tmp_path, data=data, backbone=backbone) for a in argv]
    assert (
        main(["evaluate", *argv, "--out", str(tmp_path / "out"), "--feature-cache", str(tmp_path / "cache")])
        == code
    )
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "out").exists()
