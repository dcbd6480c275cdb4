"""Fine-tuning: it learns, it resumes exactly, it does not depend on micro-batches, and every image keeps its
own label."""

import copy
import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import rcmae.tasks.finetune as ft
from rcmae.config import RuntimeConfig, flat, shipped_recipes, to_toml
from rcmae.data.dataset import Images
from rcmae.data.loader import batches_of
from rcmae.data.sources import Subset, open_source
from rcmae.data.supervised import Mixing, SupervisedView, seeded
from rcmae.engine.checkpoint import checkpoints
from rcmae.engine.metrics import read_metrics
from rcmae.errors import CheckpointError, ConfigError, DataError, DivergedError, Preempted
from rcmae.interop.timm_export import export, import_backbone, import_classifier
from rcmae.methods.recipes import load_recipe
from rcmae.models.backbone import Backbone
from rcmae.models.classifier import Classifier, classifier
from rcmae.models.encoder import build_vit
from tests.conftest import small, stop_at
from tests.mutations import catches

STATISTICS = (0.5,) * 3, (0.25,) * 3
PLAIN = ft.FineTuneRecipe(
    steps=8,
    batch_size=8,
    base_lr=0.03,
    warmup_epochs=0.5,
    layer_decay=0.75,
    crop_scale=(1.0, 1.0),
    flip=False,
    randaugment="",
    erasing=0.0,
    mixup=0.0,
    cutmix=0.0,
    drop_path=0.0,
    smoothing=0.1,
)
FULL = dataclasses.replace(
    PLAIN,
    crop_scale=(0.5, 1.0),
    flip=True,
    randaugment="rand-m9-mstd0.5-inc1",
    erasing=0.5,
    mixup=0.8,
    cutmix=1.0,
    mix_group=4,
    drop_path=0.2,
    clip=1.0,
)


def backbone(seed: int = 0, registers: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return Backbone(
        build_vit(size=16, channels=3, patch=8, width=24, depth=2, heads=2, registers=registers), *STATISTICS
    )


def fill(root: Path, count: int) -> Path:
    """Two classes of PNG files, one dark and one bright."""
    draws = np.random.default_rng(count)
    for i in range(count):
        low = 128 * (i % 2)
        (root / "ab"[i % 2]).mkdir(exist_ok=True, parents=True)
        Image.fromarray(draws.integers(low, low + 128, (16, 16, 3), dtype=np.uint8)).save(
            root / "ab"[i % 2] / f"{i:02d}.png"
        )
    return root


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    return tuple(open_source(str(fill(root / name, count))) for name, count in (("train", 32), ("test", 20)))


def run(
    out: Path, sets, settings: ft.FineTuneRecipe = PLAIN, about: dict | None = None, **runtime
) -> ft.FineTuned:
    options = {"device": "cpu", "precision": "fp32", "workers": 0, "save_every": "1h"}
    return ft.finetune(
        backbone(), *sets, ["dark", "bright"], settings, RuntimeConfig(out=out, **(options | runtime)), about
    )


def newest(out: Path) -> Path:
    return checkpoints(out / "checkpoints")[0]


def weights(out: Path) -> str:
    """One hash of the saved model and optimizer."""
    return hashlib.sha256(
        b"".join((newest(out) / f"{n}.safetensors").read_bytes() for n in ("model", "optimizer"))
    ).hexdigest()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, sets) -> Path:
    """An uninterrupted run with all random augmentations."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(out, sets, FULL)
    return out


def test_it_learns_and_records_its_results(tmp_path, sets):
    result = run(
        tmp_path / "run",
        sets,
        dataclasses.replace(PLAIN, steps=None, epochs=10.0, smoothing=0.0),
        {"backbone": "student"},
    )
    assert result.correct.mean() > 0.9
    assert result.history[-1]["step"] == 40
    assert result.history[-1]["accuracy"] == 100 * result.correct.mean()
    assert (result.confidence > 0.5).all() and (result.confidence <= 1).all()
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["kind"] == "val"] == [h["step"] for h in result.history]
    assert len(result.history) == 8, "once an epoch, but on no more than half of the 320 training samples"
    train = [line for line in lines if line["kind"] == "train"]
    assert train[-1]["loss"] < 0.6 * train[0]["loss"]
    assert train[-1]["lr"] == pytest.approx(1e-6, abs=1e-5), "the final learning rate of the head"
    assert json.loads((tmp_path / "run" / "machine.json").read_text())["about"] == {"backbone": "student"}
    assert ft.load_finetune(str(tmp_path / "run" / "recipe.toml")).epochs == 10


@catches(
    "a resumed run drops other paths",
    "rcmae.tasks.finetune:path_seed",
    lambda old, draws=iter(range(10**6)): lambda seed, step, part: old(seed, next(draws), part),
)
@pytest.mark.parametrize("stops", [(1,), (3, 4)])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    tmp_path, sets, uninterrupted, monkeypatch, stops
):
    for stop in stops:
        with monkeypatch.context() as patch:
            stop_at(patch, ft.FineTuning, stop)
            with pytest.raises(Preempted, match=f"SIGTERM; saved at step {stop}, run the same command again"):
                run(tmp_path / "run", sets, FULL)
    result = run(tmp_path / "run", sets, FULL)
    assert weights(tmp_path / "run") == weights(uninterrupted)
    assert [h["step"] for h in result.history] == [
        line["step"] for line in read_metrics(uninterrupted) if line["kind"] == "val"
    ]


def test_a_finished_run_can_be_scored_again_unchanged(tmp_path, sets, uninterrupted):
    before = weights(uninterrupted)
    files = {
        p.name: p.read_bytes()
        for p in [uninterrupted / "test.safetensors", *(uninterrupted / "export" / "classifier").iterdir()]
    }
    assert run(uninterrupted, sets, FULL).history[-1]["step"] == 8
    assert weights(uninterrupted) == before
    assert {
        p.name: p.read_bytes()
        for p in [uninterrupted / "test.safetensors", *(uninterrupted / "export" / "classifier").iterdir()]
    } == files


def test_results_do_not_depend_on_workers_and_global_generators_are_untouched(tmp_path, sets, uninterrupted):
    backbone()  # sets the seed
    expected = torch.rand(1)
    run(tmp_path / "run", sets, FULL, workers=2)
    assert torch.equal(torch.rand(1), expected)
    assert weights(tmp_path / "run") == weights(uninterrupted)


def test_every_sample_is_a_function_of_seed_epoch_and_index(sets):
    """The same pixels in another order, after other random draws, in another process; other pixels in another
    epoch."""
    source = sets[0]
    view = SupervisedView(
        (16, 16), *STATISTICS, scale=(0.5, 1.0), flip=True, randaugment=FULL.randaugment, erasing=0.5
    )
    data = Images(source, view, 3, labeled=True)
    keys = [(e, i) for e in (0, 1) for i in range(8)]
    one = {key: data[key]["image"] for key in keys}
    np.random.seed(1), torch.manual_seed(1)
    assert all(torch.equal(data[key]["image"], one[key]) for key in reversed(keys))
    batches = batches_of(data, [keys[:8], keys[8:]], source, 1, torch.device("cpu"), lambda bad: None)
    assert torch.equal(torch.cat([b["image"] for b in batches]), torch.stack(list(one.values())))
    assert sum(torch.equal(one[0, i], one[1, i]) for i in range(8)) == 0
    assert torch.stack(list(one.values())).flatten(1).max(1).values.gt(1.01).any(), (
        "erased regions are filled with unbounded noise"
    )


def test_global_generators_are_restored():
    np.random.seed(2)
    expected = np.random.rand()
    np.random.seed(2)
    with seeded(np.random.default_rng(0)):
        first = np.random.rand(), torch.rand(1).item()
    assert np.random.rand() == expected
    with seeded(np.random.default_rng(0)):
        assert (np.random.rand(), torch.rand(1).item()) == first


def test_mixing_does_not_depend_on_micro_batches():
    mixing = Mixing(
        3, mixup=0.8, cutmix=1.0, mix_prob=1.0, switch_prob=0.5, smoothing=0.1, mix_group=4, seed=1
    )
    images, labels = torch.rand(16, 3, 8, 8), torch.arange(16) % 3
    whole, targets = mixing(images.clone(), labels, 5, 0)
    parts = [mixing(images[i : i + 8].clone(), labels[i : i + 8], 5, i // 8) for i in (0, 8)]
    assert torch.equal(torch.cat([p[0] for p in parts]), whole)
    assert torch.equal(torch.cat([p[1] for p in parts]), targets)
    assert torch.allclose(targets.sum(1), torch.ones(16))
    assert not torch.equal(mixing(images.clone(), labels, 6, 0)[0], whole)
    plain = Mixing(
        3, mixup=0.0, cutmix=0.0, mix_prob=1.0, switch_prob=0.5, smoothing=0.3, mix_group=4, seed=1
    )
    same, smooth = plain(images.clone(), labels, 5, 0)
    assert torch.equal(same, images)
    assert torch.allclose(smooth[1], torch.tensor([0.1, 0.8, 0.1]))


@catches(
    "mixup and CutMix depend on micro-batches",
    "rcmae.data.supervised:Mixing.__call__",
    lambda old: lambda self, images, labels, step, part: old(self, images, labels, step, 0),
)
def test_accumulation_gives_the_gradients_of_the_whole_batch(tmp_path, sets, monkeypatch):
    gradients = []
    step = torch.optim.AdamW.step

    def noted(optimizer, *args):
        gradients.append([p.grad.clone() for g in optimizer.param_groups for p in g["params"]])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    for micro in (1, 2):
        run(
            tmp_path / str(micro),
            sets,
            dataclasses.replace(FULL, drop_path=0.0, steps=2, warmup_epochs=0.0),
            accumulate=micro,
        )
    scale = max(g.abs().max() for g in gradients[1])
    for one, two in zip(gradients[1], gradients[3], strict=True):
        assert (one - two).abs().max() <= 1e-6 * scale


@catches(
    "all layers have the same learning rate",
    "rcmae.tasks.finetune:layer_decay_groups",
    lambda old: lambda vit, weight_decay, decay: old(vit, weight_decay, 1.0),
)
def test_rates_decay_over_the_layers(tmp_path, sets, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda o, *a: (rates.append([g["lr"] for g in o.param_groups]), step(o, *a))[1],
    )
    run(tmp_path / "run", sets, PLAIN)
    assert sorted(set(rates[2])) == pytest.approx(
        [PLAIN.peak_lr * 0.75**k for k in (3, 2, 1, 0)], rel=1e-6
    ), "after 2 steps of warm-up"


def test_the_head_reads_the_mean_of_the_patch_tokens():
    b = backbone(registers=2)
    vit = classifier(b, 5, drop_path=0.3, seed=1).eval()
    assert vit.blocks[1].drop_path2.drop_prob == pytest.approx(0.3)
    assert all(p.requires_grad for p in vit.parameters()) and not b.vit.pos_embed.requires_grad
    assert 1e-5 < vit.head.weight.std() < 3e-5
    assert torch.equal(vit.head.weight, classifier(b, 5, seed=1).head.weight)
    assert not torch.equal(vit.head.weight, classifier(b, 5, seed=2).head.weight)
    torch.nn.init.normal_(vit.head.weight)
    model, images = Classifier(vit, *STATISTICS), torch.rand(2, 3, 16, 16)
    x = (images - 0.5) / 0.25
    tokens = vit.blocks(vit.norm_pre(vit._pos_embed(vit.patch_embed(x))))
    assert torch.allclose(
        model(images), vit.head(vit.fc_norm(tokens[:, vit.num_prefix_tokens :].mean(1))), atol=1e-6
    )


@pytest.mark.parametrize("registers", [0, 2])
def test_a_classifier_keeps_its_logits_through_export_and_import(tmp_path, registers):
    vit = classifier(backbone(registers=registers), 3).eval()
    torch.nn.init.normal_(vit.head.weight)
    model, images = Classifier(vit, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)), torch.rand(2, 3, 16, 16)
    export(model, tmp_path / "c", {"step": 3}, classes=["x", "y", "z"])
    loaded = timm.create_model(f"local-dir:{tmp_path / 'c'}", pretrained=True).eval()
    assert loaded.pretrained_cfg["label_names"] == ["x", "y", "z"]
    mean, std = (torch.tensor(loaded.pretrained_cfg[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
    assert torch.equal(loaded((images - mean) / std), model(images))
    again, classes = import_classifier(tmp_path / "c")
    assert torch.equal(again.eval()(images), model(images))
    assert classes == ["x", "y", "z"]
    with pytest.raises(CheckpointError, match="is a classifier of 3 classes instead of a backbone"):
        import_backbone(tmp_path / "c")
    export(backbone(), tmp_path / "b", {})
    with pytest.raises(CheckpointError, match="is a backbone without a head"):
        import_classifier(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_pwee_patch16_reg1_gap_256", "a ParallelScalingBlock is not a plain block"),
        ("test_vit4", "so this one cannot be exported: fc_norm is RmsNorm instead of LayerNorm"),
    ],
)
def test_a_network_that_cannot_be_tuned_or_exported_is_refused_before_a_run(tmp_path, sets, name, message):
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    other = Backbone(timm.create_model(name, num_classes=0, **size), *STATISTICS)
    with pytest.raises(ConfigError, match=message):
        ft.finetune(other, *sets, ["dark", "bright"], PLAIN, RuntimeConfig(out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_exported_classifier_is_the_result(tmp_path, sets):
    result = run(tmp_path / "run", sets)
    model, classes = import_classifier(tmp_path / "run" / "export" / "classifier")
    again = ft.score(model, sets[1], shape=(16, 16), channels=3, device=torch.device("cpu"), batch=7)
    assert (again.correct == result.correct).all()
    assert again.confidence == pytest.approx(result.confidence, abs=1e-6)
    assert classes == ["dark", "bright"]


def test_a_substitute_brings_its_own_label(tmp_path):
    source = open_source(str(fill(tmp_path / "d", 16)))
    for i in range(0, 16, 4):  # half of the dark ones
        (tmp_path / "d" / "a" / f"{i:02d}.png").write_bytes(b"no image")
    view = SupervisedView((16, 16), *STATISTICS, scale=(1.0, 1.0), flip=False, randaugment="", erasing=0.0)
    data = Images(source, view, 1, labeled=True)
    samples = [data[0, i] for i in range(16)]
    assert sum(bool(s["bad"]) for s in samples) == 4
    assert all((s["image"].float().mean() > 128) == (s["label"] == 1) for s in samples)
    assert any(s["bad"] and s["label"] == 1 for s in samples), "some substitute is of the other class"


def test_an_unreadable_test_image_counts_as_wrong_and_is_named(tmp_path, sets):
    broken = fill(tmp_path / "d", 20)
    (broken / "b" / "01.png").write_bytes(b"no image")
    test = open_source(str(broken))
    index = next(i for i in range(20) if test.where(i).endswith("01.png"))
    vit = classifier(backbone(), 2)
    with torch.no_grad():
        vit.head.bias[1] = 9.0  # every image is classified as bright, even a black one
    scores = ft.score(
        Classifier(vit, *STATISTICS), test, shape=(16, 16), channels=3, device=torch.device("cpu"), batch=8
    )
    assert scores.correct.sum() == 9
    assert not scores.correct[index] and scores.confidence[index] == 0
    run(tmp_path / "run", (sets[0], test), dataclasses.replace(PLAIN, steps=2, warmup_epochs=0.0))
    named = [
        json.loads(line) for line in (tmp_path / "run" / "bad_test_files.jsonl").read_text().splitlines()
    ]
    assert [n["index"] for n in named] == [index]
    assert not (tmp_path / "run" / "bad_files.jsonl").exists()


def poison(monkeypatch, steps) -> None:
    losses = ft.FineTuning.losses

    def poisoned(self, batch, step, part):
        values = losses(self, batch, step, part)
        return {"loss": values["loss"] * float("nan")} if step in steps else values

    monkeypatch.setattr(ft.FineTuning, "losses", poisoned)


def test_non_finite_steps_are_skipped_and_recorded_until_they_end_the_run(tmp_path, sets, monkeypatch):
    poison(monkeypatch, {3})
    run(tmp_path / "run", sets)
    events = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "event"]
    assert (
        len(events) == 1
        and "step 3 was not finite and was skipped" in events[0]["text"]
        and len(events[0]["images"]) == 8
    )
    poison(monkeypatch, range(2, 99))
    with pytest.raises(DivergedError, match="5 steps in a row were not finite"):
        run(tmp_path / "other", sets)


def test_a_run_cannot_be_resumed_with_other_settings_or_data(tmp_path, sets):
    same = dataclasses.replace(PLAIN, steps=1, warmup_epochs=0.0)
    run(tmp_path / "run", sets, same)
    sixteen = copy.copy(sets[0])
    sixteen.bits = 16
    assert sets[0].bits is None, "no 16-bit image, so 16 bits are the same"
    run(tmp_path / "run", (sixteen, sets[1]), same)
    with pytest.raises(ConfigError, match=r"was started with layer_decay 0.75 \(now 0.5\)"):
        run(tmp_path / "run", sets, dataclasses.replace(same, layer_decay=0.5))
    with pytest.raises(DataError, match=r"the data \(test\) has changed since"):
        run(tmp_path / "run", (sets[0], Subset(sets[1], np.arange(9))), same)
    deep = copy.copy(sets[0])
    deep.bits = 12
    with pytest.raises(DataError, match=r"the data \(range of 16-bit images\) has changed since"):
        run(tmp_path / "run", (deep, sets[1]), same)
    swapped = Subset(sets[0], np.arange(32), 1 - sets[0].labels)
    with pytest.raises(DataError, match=r"the data \(train\) has changed since"):
        run(tmp_path / "run", (swapped, sets[1]), same)
    with pytest.raises(CheckpointError, match="started from another backbone"):
        ft.finetune(
            backbone(1),
            *sets,
            ["dark", "bright"],
            same,
            RuntimeConfig(out=tmp_path / "run", device="cpu", precision="fp32"),
        )


def test_few_images_reduce_the_batch_size(tmp_path, sets, capsys):
    few = Subset(sets[0], np.arange(0, 32, 5))
    result = run(tmp_path / "run", (few, sets[1]), dataclasses.replace(FULL, steps=2))
    assert result.history[-1]["step"] == 2
    assert "7 training images: batches of 4 instead of 8" in capsys.readouterr().out
    assert ft.load_finetune(str(tmp_path / "run" / "recipe.toml")).batch_size == 4


@pytest.mark.parametrize(
    ("images", "parts", "batch", "group"),
    [(100, 1, 64, 32), (100, 4, 64, 16), (100, 3, 96, 32), (7, 3, 6, 2)],
)
def test_a_reduced_batch_size_fits_the_ranks(images, parts, batch, group):
    s = ft.fitted(ft.load_finetune("folder"), images, parts)
    assert (s.batch_size, s.mix_group) == (batch, group)
    assert not s.batch_size % parts and not s.batch_size // parts % s.mix_group
    assert ft.fitted(s, 1000, 8) is s, "a batch that fits is not changed"


def test_few_images_are_split_or_refused(tmp_path, sets):
    few = Subset(sets[0], np.arange(0, 32, 5))
    assert (
        run(tmp_path / "run", (few, sets[1]), dataclasses.replace(FULL, steps=2), accumulate=2).history[-1][
            "step"
        ]
        == 2
    )
    with pytest.raises(DataError, match="too few for 4 parts of a step .*: 7 training images"):
        run(tmp_path / "other", (few, sets[1]), FULL, accumulate=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "give one of epochs and steps"),
        ({"epochs": 3.0}, "give one of epochs and steps"),
        ({"mix_group": 3, "mixup": 0.1}, "mix_group must be even"),
        ({"randaugment": "rand-x9"}, "randaugment must be written like rand-m9-mstd0.5-inc1, not 'rand-x9'"),
        ({"randaugment": "auto"}, "randaugment must be written like"),
        (
            {"layer_decay": 0.0, "drop_path": 1.0},
            "drop_path must lie in 0 to below 1, not 1.0; layer_decay must be above 0",
        ),
        ({"erasing": 1.5}, "erasing is a fraction, from 0 to 1, not 1.5"),
        ({"base_lr": float("inf")}, "base_lr must be a finite number"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale must satisfy"),
        ({"warmup_epochs": 2.0}, "warmup_epochs 2 is not below the length of the run, 2.00 epochs"),
        (
            {"mixup": 0.8, "mix_group": 6},
            "mix_group 6 does not divide a micro-batch of 8; lower --accumulate, or give --settings "
            "mix_group=2",
        ),
    ],
)
def test_invalid_settings_are_reported_in_one_line(tmp_path, sets, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as e:
        run(tmp_path / "run", sets, dataclasses.replace(PLAIN, **changes))
    assert "\n" not in str(e.value)


def test_invalid_labels_are_reported_in_one_line(tmp_path, sets):
    train, test = sets
    for labels, message in (
        (np.where(np.arange(32) == 3, -1, train.labels), r"04\.png|06\.png"),
        (train.labels + 1, "among the 2 classes"),
    ):
        with pytest.raises(DataError, match=message):
            run(tmp_path / "run", (Subset(train, np.arange(32), labels), test))
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "flat" / "x.png")
    with pytest.raises(DataError, match="has no labels; give class folders"):
        run(tmp_path / "run", (open_source(str(tmp_path / "flat")), test))


def test_recipes_are_read_and_invalid_ones_reported_in_one_line(tmp_path):
    names = shipped_recipes("finetune")
    assert set(names) == {
        "bundled",
        "folder",
        "small",
        "vits16-in1k",
        "vitb16-in1k",
        "vitl16-in1k",
        "vitl16-in1k-mae",
    }
    assert not {"vits16-in1k", "finetune"} & set(shipped_recipes()), (
        "recipes of fine-tuning are not listed for pre-training"
    )
    for name in names:
        settings = ft.load_finetune(name)
        (tmp_path / "x.toml").write_text(to_toml(settings))
        assert ft.load_finetune(str(tmp_path / "x.toml")) == settings
    large, mae = ft.load_finetune("vitl16-in1k"), ft.load_finetune("vitl16-in1k-mae")
    assert (large.epochs, large.peak_lr, large.layer_decay, large.drop_path) == (100, 2e-3, 0.65, 0.2)
    assert (mae.epochs, mae.peak_lr, mae.layer_decay, mae.drop_path) == (50, 4e-3, 0.75, 0.2)
    with pytest.raises(ConfigError, match="there is no recipe 'vitb16'; did you mean vitb16-in1k"):
        ft.load_finetune("vitb16")
    (tmp_path / "x.toml").write_text("steps = 3\nlayer_dekay = 0.5\n")
    with pytest.raises(ConfigError, match="unknown key layer_dekay; did you mean layer_decay"):
        ft.load_finetune(str(tmp_path / "x.toml"))
    assert load_recipe("folder").method == "rcmae"
    assert not set(flat(ft.FineTuneRecipe(steps=1))) & set(vars(RuntimeConfig())), (
        "no name is both a setting and a runtime flag"
    )
    assert small().data == "bundled:digits"
