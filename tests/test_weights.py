"""Weights from anywhere give the network that they were trained in, or are refused in one line."""

import json
import math
import re
from argparse import Namespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

import rcmae
from rcmae.cli import main
from rcmae.errors import CheckpointError, ConfigError
from rcmae.interop.load import load, load_classifier
from rcmae.interop.timm_export import export
from rcmae.models.backbone import IMAGENET, Backbone
from rcmae.models.encoder import Encoder, timm_vit
from rcmae.models.patches import patchify
from rcmae.tasks.evaluate import backbones
from rcmae.tasks.evaluation.base import EvaluationOptions
from tests.conftest import small
from tests.mutations import catches

VARIANTS = ["test_vit", "test_vit2", "test_vit3", "test_vit4"]
"timm's small Vision Transformers: class token, registers, layer scale, and pooling of all kinds."

OTHER_BLOCKS = [f"vit_{kind}_patch16_reg1_gap_256" for kind in ("dwee", "pwee", "dpwee")]
"Those with differential attention, parallel blocks, and both."

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def shaken(model):
    """The model in evaluation mode with weights that a copy cannot have by chance."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


def vit(name="vit_base_patch16_224", **changes):
    return shaken(timm.create_model(name, **SMALL | {"num_classes": 0} | changes))


def same(backbone, model):
    """Whether a backbone gives the patch tokens of a timm model."""
    images = torch.rand(2, 3, *model.patch_embed.img_size)
    with torch.no_grad():
        tokens = model.forward_features((images - backbone.mean) / backbone.std)
        patches = backbone(images).patches
    return torch.equal(patches.flatten(2).mT, tokens[:, model.num_prefix_tokens :])


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


OTHERS = {"criterion.center": torch.zeros(3)}

WRAPPINGS = {
    "raw.pth": lambda s: s,
    "official.pth": lambda s: {"model": s, "epoch": 3, "args": Namespace(lr=0.1)},
    "compiled.pt": lambda s: {"model": prefixed(s, "module._orig_mod.")},
    "lightning.ckpt": lambda s: {
        "state_dict": prefixed(s, "net.backbone.") | OTHERS,
        "pytorch-lightning_version": "2",
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
        "callbacks": {},
    },
    "train.pth.tar": lambda s: {
        "arch": "vit",
        "state_dict": s,
        "optimizer": {"state": {}, "param_groups": []},
    },
    "pytorch_model.bin": lambda s: prefixed(s, "encoder."),
    "averaged.pth": lambda s: prefixed(s, "module.") | {"n_averaged": torch.tensor(3)},
    "plain.safetensors": lambda s: s,
    "backbone.safetensors": lambda s: prefixed(s, "model.encoder."),
}


def write(file, content):
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)
    return file


@pytest.mark.parametrize("name", WRAPPINGS)
def test_containers_and_prefixes_do_not_matter(tmp_path, name):
    model = vit()
    file = write(tmp_path / name, WRAPPINGS[name](model.state_dict()))
    assert same(load(file, heads=2), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_precisions_become_float32(tmp_path, dtype, suffix):
    model = vit().to(dtype)
    file = write(tmp_path / f"x{suffix}", model.state_dict())
    loaded = load(file, heads=2)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert same(loaded, model.float())


@catches(
    "the copy that is not averaged is taken",
    "rcmae.interop.weights:Weights.select",
    lambda old: lambda self, which: self.student,
)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("state_dict.", "state_dict_ema."),
        ("model.", "model_ema."),
        ("model.", "ema."),
        ("model.module.", "ema.module."),
        ("state_dict.online_encoder.", "state_dict.target_encoder."),
        ("base_encoder.", "momentum_encoder."),
        ("", "ema."),
    ],
)
def test_of_two_copies_the_average_is_taken_and_named(tmp_path, caplog, student, teacher):
    one, other = vit(), vit()
    file = write(
        tmp_path / "x.pth", prefixed(one.state_dict(), student) | prefixed(other.state_dict(), teacher)
    )
    assert same(load(file, heads=2), other) and same(load(file, "student", heads=2), one)
    first, second = caplog.messages
    assert f"took {teacher[:-1]}; --which student takes {student[:-1] or 'the one without'}" in first
    assert (
        f"took {student[:-1] or 'the one without'}" in second
        and f"--which teacher takes {teacher[:-1]}" in second
    )
    assert {which for which, _ in backbones(str(file), EvaluationOptions(which="both", heads=2))} == {
        "student",
        "teacher",
    }


def test_what_is_assumed_and_left_out_is_one_line(tmp_path, caplog):
    state = vit(num_classes=3).state_dict() | {
        "mask_token": torch.zeros(1, 1, 24),
        "decoder_pred.bias": torch.zeros(3),
    }
    file = write(
        tmp_path / "x.pth", {"state_dict": prefixed(state, "net.") | OTHERS, "ema": {"step": torch.tensor(1)}}
    )
    load(file, heads=2)
    assert caplog.messages == [
        f"note: {file}: ViT 24 x 2, patch 4; assumed 16 x 16 px, ImageNet's mean and standard deviation; "
        "left out ema, state_dict.criterion, state_dict.net.decoder_*, state_dict.net.head, "
        "state_dict.net.mask_token"
    ]
    caplog.clear()
    file = write(tmp_path / "y.pth", vit(num_classes=3, num_heads=3, embed_dim=192).state_dict())
    load_classifier(file, size=(16, 16))
    assert caplog.messages == [
        f"note: {file}: ViT 192 x 2, patch 4; assumed 3 heads, ImageNet's mean and standard deviation, "
        "a head on the class token"
    ]


def test_a_lone_average_is_named(tmp_path, caplog):
    model = vit()
    assert same(load(write(tmp_path / "x.pth", {"teacher": model.state_dict()}), heads=2), model)
    assert "took teacher" in caplog.text and "--which" not in caplog.text


@pytest.mark.parametrize(
    ("prefixes", "named"),
    [(("a.", "b."), "a, b"), (("model.", "ema.", "model_ema."), "model, ema, model_ema")],
)
def test_it_is_not_guessed_which_of_several_networks_is_meant(tmp_path, prefixes, named):
    states = [prefixed(vit().state_dict(), prefix) for prefix in prefixes]
    file = write(tmp_path / "x.pth", {k: v for state in states for k, v in state.items()})
    with pytest.raises(
        CheckpointError, match=f"has {len(prefixes)} networks \\({named}\\) that are not a pair"
    ):
        load(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"vit.embeddings.cls_token": torch.zeros(1)},
            "transformers .patch_embed.proj.weight, .*; it has vit.embeddings.cls_tok",
        ),
        ({"xpatch_embed.proj.weight": torch.zeros(1)}, "it has xpatch_embed.proj.weight"),
        ({}, "it has nothing"),
        ([torch.zeros(1)], "holds a list instead of named weights"),
        ({"patch_embed.proj.weight": torch.zeros(1)}, "is not a Vision Transformer with timm's names"),
    ],
)
def test_other_content_is_one_line(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        load(write(tmp_path / "x.pth", content))


def test_other_weights_are_one_line(tmp_path):
    state = vit().state_dict()
    for change, message in (
        ({"norm_pre.weight": torch.ones(24)}, "has unknown norm_pre.weight"),
        ({"norm.bias": torch.ones(24, dtype=torch.int8)}, "norm.bias is torch.int8, not torch.float32"),
        ({"patch_embed.proj.weight": torch.ones(24, 3, 2, 4, 4)}, "patches of 3 dimensions"),
        ({"pos_embed": torch.tensor(1.0)}, "is not a Vision Transformer with timm's names"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(write(tmp_path / "x.pth", state | change), heads=2)
    with pytest.raises(CheckpointError, match="is one of several files"):
        load(write(tmp_path / "model-00001-of-00002.safetensors", state))
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a known kind of checkpoint; give a run"):
        load(tmp_path / "x.npz")


def test_a_grid_that_is_not_square_is_asked_for(tmp_path, capsys):
    model = vit(img_size=(12, 16))
    file = write(tmp_path / "x.safetensors", model.state_dict())
    assert main(["evaluate", "knn", str(file), "--heads", "2"]) == 4
    assert re.fullmatch(
        r"rcmae: error: .* has 13 positions, not those of one square of patches; give the size of .*",
        capsys.readouterr().err.splitlines()[-1],
    )
    with pytest.raises(CheckpointError, match="not those of 12 x 12 px in patches of 4 x 4"):
        load(file, heads=2, size=(12, 12))
    loaded = load(file, heads=2, size=(12, 16))
    assert loaded.shape == (12, 16) and same(loaded, model)
    options = EvaluationOptions(heads=2, size=16, height=12)
    assert same(backbones(str(file), options)[0][1], model)
    assert backbones(f"scratch:{file}", options)[0][1].shape == (12, 16)
    assert main(["evaluate", "knn", str(file), "--height", "12"]) == 2
    assert "height needs size" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"reg_tokens": 3},
        {"reg_tokens": 3, "no_embed_class": True},
        {"class_token": False},
        {"init_values": 0.1},
        {"qkv_bias": False},
        {"mlp_ratio": 2},
        {"patch_size": (2, 4)},
    ],
)
def test_bare_weights_of_variants_give_the_same_network(tmp_path, changes):
    model = vit(**{"global_pool": ""} | changes)
    size = (16, 16) if "patch_size" in changes else None
    assert same(load(write(tmp_path / "x.pth", model.state_dict()), heads=2, size=size), model)


@pytest.mark.parametrize(
    "changes", [{}, {"global_pool": "avg"}, {"global_pool": "avg", "class_token": False, "fc_norm": False}]
)
def test_bare_weights_of_a_classifier_give_the_same_logits(tmp_path, changes):
    model = vit(num_classes=5, **changes)
    file = write(
        tmp_path / "x.pth",
        {"model": vit(num_classes=5, **changes).state_dict(), "model_ema": model.state_dict()},
    )
    loaded, names = load_classifier(file, heads=2)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded(images), model((images - loaded.mean) / loaded.std)) and names == []


def poison(state):
    name = "blocks.1.mlp.fc2.weight"
    return state | {name: torch.full_like(state[name], math.inf)}


@catches(
    "weights that are not finite are loaded",
    "rcmae.interop.weights:check_finite",
    lambda old: lambda *args: None,
)
def test_weights_that_are_not_finite_are_refused_in_every_format(tmp_path, capsys):
    model = vit()
    export(Backbone(model, *IMAGENET), tmp_path / "own", {})
    save_for_hf(model, str(tmp_path / "timm"), model_args=SMALL, safe_serialization=True)
    state = poison(model.state_dict())
    for name in ("own", "timm"):
        save_file(state, tmp_path / name / "model.safetensors")
    write(tmp_path / "x.pth", {"model": state})
    write(tmp_path / "x.safetensors", state)
    for name in ("own", "timm", "x.pth", "x.safetensors"):
        for argv in (["evaluate", "knn"], ["evaluate", "robustness"], ["detect", "train"]):
            assert main([*argv, str(tmp_path / name), "--out", str(tmp_path / "out")]) == 4
            error = capsys.readouterr().err.splitlines()[-1]
            assert error.startswith("rcmae: error: ") and "blocks.1.mlp.fc2.weight is not finite" in error
    assert not (tmp_path / "out").exists()


def test_weights_of_timm_that_are_not_finite_are_refused(monkeypatch):
    model = vit()
    model.load_state_dict(poison(model.state_dict()))
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: model)
    with pytest.raises(CheckpointError, match="timm:test: blocks.1.mlp.fc2.weight is not finite"):
        load("timm:test")


@pytest.mark.parametrize("name", VARIANTS + OTHER_BLOCKS)
def test_a_folder_that_timm_saved_gives_the_same_network_and_classifier(tmp_path, name):
    model = vit(name, num_classes=3)
    model.pretrained_cfg = dict(model.pretrained_cfg, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    safe = name == "test_vit"  # by default, timm writes a pickle
    labels = {"label_names": {"0": "x", "2": "z"}}
    save_for_hf(model, str(tmp_path), labels, SMALL, safe_serialization=safe)
    for path in (tmp_path, f"timm:local-dir:{tmp_path}", next(tmp_path.glob("*model.*"))):
        backbone = load(path)
        assert same(backbone, model) and backbone.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
        classifier, names = load_classifier(path)
        images = torch.rand(2, 3, *model.patch_embed.img_size)
        assert torch.equal(classifier(images), model((images - backbone.mean) / backbone.std))
        assert names == ["x", "1", "z"]


def test_a_folder_whose_weights_do_not_fit_is_refused(tmp_path):
    """timm itself fills what is missing with random numbers if the head is not used."""
    model = vit(num_classes=3)
    save_for_hf(model, str(tmp_path), model_args=SMALL, safe_serialization=True)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("blocks.1")}
    save_file(state, tmp_path / "model.safetensors")
    for path in (tmp_path, f"timm:local-dir:{tmp_path}"):
        with pytest.raises(CheckpointError, match="lacks blocks.1"):
            load(path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "vit_typo"}))
    with pytest.raises(CheckpointError, match="is damaged or not ours"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(
        CheckpointError, match="is a dinov2 of transformers; of its networks, vit and vit_mae are read"
    ):
        load(tmp_path)
    save_for_hf(timm.create_model("test_resnet"), str(tmp_path), safe_serialization=True)
    with pytest.raises(CheckpointError, match="is timm's ResNet, not its VisionTransformer"):
        load(tmp_path)


@pytest.mark.parametrize("name", VARIANTS + OTHER_BLOCKS)
def test_an_exported_variant_is_the_same_network(tmp_path, name):
    model = vit(name)
    export(Backbone(model, *IMAGENET), tmp_path, {})
    assert same(load(tmp_path), model)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert same(load(tmp_path), again)


@catches(
    "exports are not compared with what timm builds",
    "rcmae.models.blueprint:_structure",
    lambda old: lambda vit: iter(()),
)
@pytest.mark.parametrize(
    "changes",
    [
        {"act_layer": "relu"},
        {"norm_layer": "rmsnorm"},
        {"qk_norm": True},
        {"pre_norm": True},
        {"mlp_layer": timm.layers.SwiGLU},
    ],
)
def test_a_network_that_its_name_does_not_determine_is_not_exported(tmp_path, changes):
    with pytest.raises(ConfigError, match="so this one cannot be exported|timm cannot build"):
        export(Backbone(vit(**changes), *IMAGENET), tmp_path / "x", {})
    assert not (tmp_path / "x").exists()


def test_dropout_of_patches_is_not_exported_and_not_applied(tmp_path):
    model = vit(patch_drop_rate=0.5, drop_path_rate=0.1)
    export(Backbone(model, *IMAGENET), tmp_path, {})
    assert same(load(tmp_path), model)


def test_images_of_any_size_keep_their_grid(tmp_path):
    model = vit(dynamic_img_size=True)
    export(Backbone(model, *IMAGENET), tmp_path, {})
    features = load(tmp_path)(torch.rand(1, 3, 8, 32))
    assert features.patches.shape == (1, 24, 2, 8)


@pytest.mark.parametrize("name", VARIANTS)
def test_pre_training_computes_and_exports_the_network_that_timm_builds(tmp_path, name):
    model = shaken(timm_vit(name, size=(64, 96), channels=3))
    export(Backbone(model, *IMAGENET), tmp_path, {})
    loaded, images = load(tmp_path), torch.rand(2, 3, 64, 96)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = (images - loaded.mean) / loaded.std
    with torch.no_grad():
        tokens = Encoder(model)(patchify(pixels, model.patch_embed.patch_size[0]))
        torch.testing.assert_close(tokens, again.forward_features(pixels))
        assert torch.equal(loaded(images).patches, Backbone(model, *IMAGENET)(images).patches)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (OTHER_BLOCKS[0], "has DiffAttention; pre-training needs a plain"),
        (OTHER_BLOCKS[2], "has DiffParallelScalingBlock; pre-training"),
        ("test_vit_relpos", "is timm's VisionTransformerRelPos"),
        ("vit_tiny_patch16_dinov3_qkvb", "is timm's Eva"),
        ("vit_tiny_r_s16_p8_224", "has a HybridEmbed"),
        ("resnet10t", "timm cannot build 'resnet10t'"),
        ("local-dir:{}", "drops patches, positions or attention"),
    ],
)
def test_pre_training_refuses_other_networks_before_any_work(tmp_path, name, message):
    args = SMALL | {"patch_drop_rate": 0.5}
    save_for_hf(vit(**args), str(tmp_path), model_args=args, safe_serialization=True)
    model = f"timm:{name.format(tmp_path)}"
    recipe = small(data=str(tmp_path / "nowhere"), model=model, size=64, width=None, depth=None, heads=None)
    with pytest.raises(ConfigError, match=message):
        rcmae.pretrain(recipe, rcmae.RuntimeConfig(out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_images_in_another_range_are_refused():
    backbone, pixels = Backbone(vit(), *IMAGENET), torch.rand(1, 3, 16, 16)
    pixels[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    for wrong in (255 * pixels, (pixels - backbone.mean) / backbone.std):
        with pytest.raises(ValueError, match="instead of 0 to 1; divide 8-bit pixels by 255"):
            backbone(wrong)
    backbone(1.2 * pixels - 0.1)  # as after bicubic resizing
    program = torch.export.export(backbone, (pixels,)).module()
    assert torch.equal(program(pixels).patches, backbone(pixels).patches)
