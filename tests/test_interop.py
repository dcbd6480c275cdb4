"""Export and import of backbones: timm loads our files, and official files are read without executing
them."""

import json
import math
import pickle
import shutil

import pytest
import timm
import torch

import rcmae
import rcmae.interop.official as official
import rcmae.methods.rcmae
from benchmarks import parity
from rcmae.cli import main
from rcmae.errors import CheckpointError, ConfigError
from rcmae.interop.imports import import_weights
from rcmae.interop.load import load
from rcmae.interop.timm_export import export
from rcmae.interop.weights import read_weights
from rcmae.methods import reconstruction_loss
from rcmae.models.autoencoder import build
from rcmae.models.backbone import Backbone
from rcmae.models.patches import sincos_positions
from tests.conftest import GOLDEN, method_for, small
from tests.mutations import catches


@pytest.mark.parametrize("changes", [{}, {"registers": 2, "channels": 4}, {"height": 8}])
def test_timm_gives_equal_outputs(tmp_path, changes):
    method = method_for(small(**changes))
    images = torch.rand(2, small(**changes).images.channels, *small(**changes).images.shape)
    export(method.backbone("teacher"), tmp_path / "b", {})
    expected = method.backbone("teacher")(images)
    model = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
    tokens = model.forward_features((images - mean) / std)
    assert torch.equal(tokens[:, 0], expected.cls)
    assert torch.equal(
        tokens[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, expected.patches.shape[2:]),
        expected.patches,
    )
    again = load(tmp_path / "b")
    assert torch.equal(again(images).patches, expected.patches)
    assert torch.equal(load(tmp_path / "b" / "model.safetensors")(images).cls, expected.cls)


@catches("DINO is pooled as MAE", "rcmae.methods.distillation:SelfDistillation.pool", lambda old: "mean")
@pytest.mark.parametrize(("name", "pool"), [("rcmae", "avg"), ("dino", "token")])
def test_timm_fine_tunes_an_export_without_further_arguments(tmp_path, name, pool):
    """A new head on the pooled features, by default those that the method trains; all weights are loaded."""
    backbone, images = method_for(small(name)).backbone("student"), torch.rand(4, 3, 16, 16)
    export(backbone, tmp_path / "b", {"method": name})
    features, path = backbone(images), f"local-dir:{tmp_path / 'b'}"
    for arguments in ({}, {"global_pool": "avg"}, {"global_pool": "token"}):
        model = timm.create_model(path, num_classes=10, pretrained=True, **arguments)
        assert model.global_pool == arguments.get("global_pool", pool)
        mean, std = (torch.tensor(model.pretrained_cfg[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
        pooled = model.eval().forward_head(model.forward_features((images - mean) / std), pre_logits=True)
        expected = features.mean if model.global_pool == "avg" else features.cls
        assert torch.allclose(pooled, expected, atol=1e-6)
        optimizer, labels = torch.optim.SGD(model.train().parameters(), lr=0.1), torch.arange(4)
        losses = []
        for _ in range(3):
            logits = model((images - mean) / std)
            assert logits.shape == (4, 10)
            losses.append(torch.nn.functional.cross_entropy(logits, labels))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[2] < losses[0], "two steps of fine-tuning"
    assert load(tmp_path / "b").method == name


def test_a_timm_encoder_is_exported_under_its_own_name(tmp_path):
    recipe = small(model="timm:vit_tiny_patch16_224", width=None, depth=None, heads=None, size=32)
    model = build(recipe.images, recipe.network)
    backbone = Backbone(model.encoder.vit, (0.5,) * 3, (0.5,) * 3).eval()
    export(backbone, tmp_path / "b", {}, "vit_tiny_patch16_224")
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(load(tmp_path / "b").eval()(images).patches, backbone(images).patches)


def test_a_lost_teacher_is_not_replaced_by_the_student(tmp_path):
    method = method_for(small())
    for network in ("student", "teacher"):
        export(
            method.backbone(network), tmp_path / "export" / network, {"method": "rcmae", "network": network}
        )
    shutil.rmtree(tmp_path / "export" / "teacher")
    with pytest.raises(CheckpointError, match="export/teacher is missing"):
        rcmae.load(tmp_path)
    rcmae.load(tmp_path, "student")
    (tmp_path / "export" / "student" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="damaged or not ours"):
        rcmae.load(tmp_path)
    export(
        method.backbone("student"), tmp_path / "export" / "student", {"method": "mae", "network": "student"}
    )
    rcmae.load(tmp_path)
    (tmp_path / "export" / "student" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        rcmae.load(tmp_path)
    with pytest.raises(ConfigError, match="timm cannot load 'vit_typo'"):
        rcmae.load("timm:vit_typo")


def test_an_invalid_backbone_is_reported_in_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "no")
    with pytest.raises(CheckpointError, match="has no backbone"):
        load(tmp_path)
    with pytest.raises(
        CheckpointError, match="width 24, and the weights do not reveal the attention heads; give --heads"
    ):
        load(GOLDEN / "mae_official_layout.pth")
    with pytest.raises(ConfigError, match="student or teacher, not 'pupil'"):
        load(tmp_path, "pupil")
    export(method_for(small()).backbone(), tmp_path / "b", {})
    (tmp_path / "b" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="is not a complete .safetensors file"):
        load(tmp_path / "b")


@pytest.mark.parametrize(("name", "networks"), [("rcmae", ("student", "teacher")), ("mae", ("student",))])
def test_official_files_are_imported(tmp_path, name, networks, reference):
    out = tmp_path / "run"
    lines = import_weights(GOLDEN / f"{name}_official_layout.pth", out, heads=3, decoder_heads=2)
    assert "ViT 24 x 2, patch 8, 32 px" in lines[0]
    assert sorted(p.name for p in (out / "export").iterdir()) == sorted(networks)
    raw = read_weights(GOLDEN / f"{name}_official_layout.pth")
    for which in networks:
        vit = load(out, which).vit
        direct = load(GOLDEN / f"{name}_official_layout.pth", which, heads=3).vit.state_dict()
        assert all(torch.equal(v, direct[k]) for k, v in vit.state_dict().items())
        state = raw.teacher if which == "teacher" else raw.student
        assert torch.equal(vit.blocks[1].mlp.fc2.weight, state["blocks.1.mlp.fc2.weight"])
        assert torch.equal(vit.pos_embed, state["pos_embed"])
    about = json.loads((out / "export" / networks[-1] / "config.json").read_text())["rcmae"]
    assert about["network"] == networks[-1]
    with pytest.raises(ConfigError, match="exists already"):
        import_weights(GOLDEN / f"{name}_official_layout.pth", out, heads=3, decoder_heads=2)


def test_heads_are_required_where_the_file_does_not_have_them():
    state = read_weights(GOLDEN / "mae_official_layout.pth").student
    with pytest.raises(CheckpointError, match="give --heads and --decoder-heads"):
        official.autoencoder(state)
    with pytest.raises(CheckpointError, match="an encoder without its decoder"):
        official.autoencoder({k: v for k, v in state.items() if "decoder" not in k}, (3, 2))
    state["mask_token"] = torch.zeros(1, 1, 3)
    with pytest.raises(CheckpointError, match=r"decoder.mask_token is \(1, 1, 3\), not \(1, 1, 16\)"):
        official.autoencoder(state, (3, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: torch.zeros(2)}, "has unknown encoder.vit.3"),
        ({"pos_embed": torch.zeros(3)}, "are not those of an official"),
        ({"patch_embed.proj.weight": torch.zeros(3)}, "are not those of an official"),
        ({"decoder_embed.weight": torch.tensor(3.0)}, "are not those of an official"),
        ({"blocks.x.y": torch.zeros(1)}, "are not those of an official"),
        ({"norm.bias": torch.full((24,), math.nan)}, "norm.bias is not finite"),
        (
            {
                "patch_embed.proj.weight": torch.zeros(24, 4, 8, 8),
                "decoder_pred.weight": torch.zeros(256, 16),
                "decoder_pred.bias": torch.zeros(256),
            },
            "is for 4 channels",
        ),
    ],
)
def test_unexpected_weights_are_reported_in_one_line(tmp_path, change, message):
    whole = torch.load(GOLDEN / "mae_official_layout.pth", weights_only=False)
    torch.save({"model": whole["model"] | change}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        import_weights(tmp_path / "x.pth", tmp_path / "out", heads=3, decoder_heads=2)
    assert not (tmp_path / "out").exists()


def test_weights_without_blocks_are_reported_in_one_line():
    state = read_weights(GOLDEN / "mae_official_layout.pth").student
    with pytest.raises(CheckpointError, match="are not those of an official"):
        official.shape_of({k: v for k, v in state.items() if not k.startswith("decoder_blocks")}, (3, 2))


@pytest.mark.parametrize("heads", [(0, 2), (3, -1)])
def test_zero_heads_are_refused(tmp_path, heads):
    with pytest.raises(ConfigError, match="heads must be 1 or more"):
        import_weights(GOLDEN / "mae_official_layout.pth", tmp_path / "x", *heads)


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (shutil.copy, (str(self.trace.parent / "a"), str(self.trace)))


@catches(
    "pickles are executed",
    "torch:load",
    lambda old: lambda path, **kwargs: old(path, map_location="cpu", weights_only=False),
)
def test_code_in_a_pickle_is_not_executed(tmp_path):
    (tmp_path / "a").write_text("a")
    trace = tmp_path / "ran"
    torch.save({"model": Bomb(trace)}, tmp_path / "evil.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"model": Bomb(trace)}))
    for name in ("evil.pth", "old.pth"):
        with pytest.raises(CheckpointError):
            read_weights(tmp_path / name)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a PyTorch checkpoint"),
        (b"hello" * 99, "is not a PyTorch checkpoint|was not read"),
        (None, "does not exist"),
    ],
)
def test_an_invalid_checkpoint_is_reported_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / "x.pth")


def test_a_foreign_checkpoint_is_recognized_by_its_keys(tmp_path):
    torch.save({"weights": {}, "step": 3}, tmp_path / "x.pth")
    with pytest.raises(
        CheckpointError, match="no Vision Transformer with the names .*; it has weights, step"
    ):
        read_weights(tmp_path / "x.pth")


def test_a_wrong_shape_of_the_images_is_noticed_in_the_positions_of_the_decoder(tmp_path):
    recipe = small(height=8)
    state = {
        f"decoder_{k.removeprefix('decoder.')}"
        if k.startswith("decoder.")
        else k.removeprefix("encoder.vit."): v
        for k, v in build(recipe.images, recipe.network).state_dict().items()
    }
    state["mask_token"] = state.pop("decoder_mask_token")
    positions = torch.cat([torch.zeros(1, 16), sincos_positions((2, 4), 16)])
    torch.save({"model": state | {"decoder_pos_embed": positions[None]}}, tmp_path / "x.pth")
    for size, message in (
        (None, "not those of one square"),
        ((16, 8), "decoder_pos_embed is not that of images"),
    ):
        with pytest.raises(CheckpointError, match=message):
            import_weights(tmp_path / "x.pth", tmp_path / "out", heads=2, decoder_heads=2, size=size)
    argv = [
        "import",
        str(tmp_path / "x.pth"),
        "--out",
        str(tmp_path / "out"),
        "--heads",
        "2",
        "--decoder-heads",
        "2",
    ]
    assert main([*argv, "--size", "16", "--height", "8"]) == 0
    assert load(tmp_path / "out").shape == (8, 16)
    assert "height = 8" in (tmp_path / "out" / "recipe.toml").read_text()
    torch.save({"model": state, "model_ema": {k: v + 1 for k, v in state.items()}}, tmp_path / "y.pth")
    with pytest.raises(
        CheckpointError, match="has model and model_ema instead of the student and the teacher"
    ):
        import_weights(tmp_path / "y.pth", tmp_path / "y")


def test_parity_with_the_official_code(capsys):
    assert parity.main(str(GOLDEN / "rcmae_reference.safetensors")) == 0
    assert capsys.readouterr().out.count("ok  ") == len(parity.LIMITS)


def test_parity_fails_for_nan(monkeypatch, capsys):
    """Every comparison with NaN is false: it must not count as equal."""
    whole = reconstruction_loss.squared_errors
    monkeypatch.setattr(
        rcmae.methods.rcmae,
        "squared_errors",
        lambda *args: {k: v * math.nan for k, v in whole(*args).items()},
    )
    assert parity.main(str(GOLDEN / "rcmae_reference.safetensors")) == 1
    assert "inf" in capsys.readouterr().out


def test_parity_can_fail(monkeypatch, capsys):
    monkeypatch.setattr(parity, "LIMITS", dict.fromkeys(parity.LIMITS, -1.0))
    assert parity.main(str(GOLDEN / "rcmae_reference.safetensors")) == 1
    assert "MISS" in capsys.readouterr().out
    assert parity.main("nowhere") == 2


def test_a_text_file_is_not_a_checkpoint(tmp_path):
    """torch's reader of legacy files raises different errors for different texts."""
    for number, text in enumerate(
        ("rcmae pretrain --out x\nstep 1/4 loss 1.5\n", "hello world", "I1\n.", "(lp0\n.")
    ):
        (tmp_path / f"{number}.pth").write_text(text)
        with pytest.raises(CheckpointError):
            load(tmp_path / f"{number}.pth")
