"""Exports in other formats give the same outputs there, and the same network when they are read again."""

import json
import re
import sys
import warnings
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import rcmae
from rcmae.cli import main
from rcmae.config import RuntimeConfig
from rcmae.engine.schedules import Progress
from rcmae.errors import CheckpointError, ConfigError
from rcmae.interop import hub, huggingface, timm_export
from rcmae.interop.autoencoders import load_autoencoders
from rcmae.interop.export import export
from rcmae.interop.imports import import_weights
from rcmae.interop.load import load, load_classifier
from rcmae.interop.names import from_transformers, to_transformers
from rcmae.interop.official import MAE_LICENSE, official_state
from rcmae.interop.weights import read_weights
from rcmae.models.backbone import IMAGENET, Backbone
from rcmae.models.classifier import Classifier, classifier
from tests.conftest import GOLDEN, batch_for, method_for, small
from tests.images import encode
from tests.mutations import catches

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def shaken(network):
    """The network in evaluation mode with weights that a copy cannot have by chance."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return network.eval()


def vit(**changes):
    return shaken(timm.create_model("vit_base_patch16_224", **SMALL | {"num_classes": 0} | changes))


def folder_of(network, path, classes=(), **metadata) -> Path:
    timm_export.export(network, path, metadata, classes=classes)
    return path


def equal(one, other) -> bool:
    """Whether two networks have the same weights, bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("transformers")
        module.ViTMAEForPreTraining, module.ViTForImageClassification  # noqa: B018  imported on first use
    module.utils.logging.disable_progress_bar()
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of six steps, with a measurement and an evaluation."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "photos of someone").mkdir()
    for i in range(12):
        picture = np.random.default_rng(i).integers(0, 256, (18, 20, 3), dtype=np.uint8)
        (root / "photos of someone" / f"{i}.png").write_bytes(encode(picture))
    out = root / "my-run"
    recipe = replace(small(target_eps=1e-6), data=str(root / "photos of someone"))
    rcmae.pretrain(recipe, RuntimeConfig(out=out, device="cpu", workers=0))
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "probe", "step": 6, "teacher": {"linear": 12.34, "knn": 5.0}}) + "\n")
    record = {"task": "linear", "network": "teacher", "data": "/home/someone/birds", "test_images": 1200}
    (out / "evaluate").mkdir()
    (out / "evaluate" / "linear-teacher.json").write_text(json.dumps(record | {"metrics": {"top1": 43.21}}))
    return out


# --- transformers -------------------------------------------------------------------------------------------


@catches(
    "queries and keys change places",
    "rcmae.interop.names:_PARTS",
    lambda old: old | {"attn.q": old["attn.k"], "attn.k": old["attn.q"]},
)
@pytest.mark.parametrize("changes", [{}, {"height": 8, "channels": 4}])
def test_transformers_gives_the_features_of_a_backbone(tmp_path, transformers, changes):
    recipe = small(**changes)
    backbone = Backbone(
        shaken(method_for(recipe).backbone().vit), *[(0.5, 0.4, 0.3, 0.2)[: recipe.images.channels]] * 2
    )
    folder_of(backbone.eval(), tmp_path / "ours", method="rcmae")
    export(tmp_path / "ours", "hf", tmp_path / "hf")
    model, loading = transformers.ViTModel.from_pretrained(
        tmp_path / "hf", add_pooling_layer=False, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    images = torch.rand(2, recipe.images.channels, *recipe.images.shape)
    tokens = model((images - backbone.mean) / backbone.std).last_hidden_state
    torch.testing.assert_close(tokens, backbone(images).tokens, atol=1e-5, rtol=0)
    again = load(tmp_path / "hf")
    assert equal(again, backbone) and torch.equal(again(images).tokens, backbone(images).tokens)
    assert again.method == "rcmae" and again.statistics == backbone.statistics


@catches(
    "the decoder's positions are not written",
    "rcmae.interop.huggingface:official_state",
    lambda old: lambda model: {k: v * (k != "decoder_pos_embed") for k, v in old(model).items()},
)
@pytest.mark.parametrize("network", ["student", "teacher"])
def test_transformers_gives_the_loss_and_the_predictions(tmp_path, transformers, run, network):
    export(run, "hf", tmp_path / "mae", network, decoder=True)
    model, loading = transformers.ViTMAEForPreTraining.from_pretrained(
        tmp_path / "mae", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    models, settings = load_autoencoders(run)
    backbone = load(run, network)
    method = rcmae.METHODS["mae"](small("mae", target_eps=1e-6), *backbone.statistics)
    method.student.load_state_dict(models[network].state_dict())
    batch = batch_for(method, 4)
    order, hidden = batch["order"], batch["order"][:, method.visible :]
    pixels = (batch["image"] / 255 - backbone.mean) / backbone.std
    outputs = model.eval()(pixels, noise=order.argsort(1).float())
    assert (settings.mask_ratio, model.config.norm_pix_loss) == (0.75, True)
    with torch.no_grad():
        losses = method.eval()(batch, Progress(0, 6, 1))
        prediction = method.student(method.normalize_and_patchify(batch["image"]), order, method.visible)
    index = hidden[..., None].expand(-1, -1, prediction.shape[2])
    torch.testing.assert_close(outputs.logits.gather(1, index), prediction, atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.loss, losses["loss"], atol=1e-5, rtol=1e-5)
    import_weights(tmp_path / "mae", tmp_path / "again")
    again, _ = load_autoencoders(tmp_path / "again")
    assert equal(again["student"], models[network]) and equal(load(tmp_path / "again"), backbone)


def test_what_transformers_saves_is_read(tmp_path, transformers, caplog):
    """Its files have other names than its modules, and the decoder's others than published files."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    sizes |= {"image_size": 16, "patch_size": 4}
    decoder = {f"decoder_{k}": v // 2 for k, v in sizes.items() if k not in ("image_size", "patch_size")}
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**sizes, **decoder)).eval()
    model.decoder.initialize_weights(16)  # sine-cosine positions, which some versions set to zero afterwards
    model.save_pretrained(tmp_path / "mae")
    torch.save(model.state_dict(), tmp_path / "modules.pth")
    images, statistics = torch.rand(2, 3, 16, 16), torch.tensor(IMAGENET).view(2, 1, 3, 1, 1)
    pixels, noise = (images - statistics[0]) / statistics[1], torch.arange(16.0).expand(2, 16)
    encoder = transformers.ViTModel(transformers.ViTConfig(**sizes, layer_norm_eps=1e-6)).eval()
    encoder.load_state_dict(model.vit.state_dict(), strict=False)
    for path in (tmp_path / "mae", tmp_path / "mae" / "model.safetensors", tmp_path / "modules.pth"):
        backbone = load(path, heads=2)
        expected = encoder(pixels).last_hidden_state
        torch.testing.assert_close(backbone(images).tokens, expected, atol=1e-5, rtol=0)
    assert (
        "took 30 tensors; layer norms with epsilon 1e-06 instead of 1e-12; left out decoder_*, mask"
        in caplog.text
    )
    assert f"{MAE_LICENSE}: non-commercial" in caplog.text and backbone.license == MAE_LICENSE
    (whole,) = load_autoencoders(tmp_path / "mae")[0].values()
    patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(2, 16, 48)
    prediction = whole(patches, torch.arange(16).expand(2, 16), 4)
    torch.testing.assert_close(model(pixels, noise=noise).logits[:, 4:], prediction, atol=1e-4, rtol=0)


def test_a_classifier_on_the_class_token_is_one_of_transformers(tmp_path, transformers):
    ours = Classifier(vit(num_classes=3), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)).eval()
    folder_of(ours, tmp_path / "ours", ["cat", "dog", "owl"])
    export(tmp_path / "ours", "hf", tmp_path / "hf")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "hf")
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model((images - ours.mean) / ours.std).logits, ours(images), atol=1e-5, rtol=0)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    again, names = load_classifier(tmp_path / "hf")
    assert equal(again, ours) and names == ["cat", "dog", "owl"] and load(tmp_path / "hf").shape == (16, 16)
    import_weights(tmp_path / "hf", tmp_path / "imported")
    assert equal(load_classifier(tmp_path / "imported")[0], ours)


@pytest.mark.parametrize("size", [16, 32, 448])
def test_the_processor_of_transformers_prepares_images(tmp_path, transformers, size):
    backbone = Backbone(vit(img_size=size, depth=1), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)).eval()
    export(folder_of(backbone, tmp_path / "ours"), "hf", tmp_path / "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    pixels = processor(images=Image.new("RGB", (90, 50), (255, 0, 51)), return_tensors="pt")["pixel_values"]
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.4, 0.5, 0.6])
    torch.testing.assert_close(pixels, expected.view(1, 3, 1, 1).expand(1, 3, size, size).contiguous())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_token": False, "global_pool": ""}, "needs cls_token"),
        ({"reg_tokens": 2}, "has no reg_token"),
        ({"init_values": 0.1}, r"has no blocks.0.ls1.gamma"),
        ({"qk_norm": True}, r"has no blocks.0.attn.q_norm.weight"),
        ({"no_embed_class": True}, "gives the class token a position"),
        ({"act_layer": "relu"}, "act is GELU instead of ReLU"),
        ({"num_classes": 3, "global_pool": "avg"}, "reads the class token, this classifier the mean of the"),
    ],
)
def test_what_transformers_does_not_have_is_refused_by_name(changes, message):
    network = (Classifier if "num_classes" in changes else Backbone)(vit(**changes), *IMAGENET)
    with pytest.raises(ConfigError, match=message):
        huggingface.files(network, {})


@pytest.fixture
def hf(tmp_path) -> Path:
    """A folder of transformers with a ViTModel."""
    return export(folder_of(Backbone(vit(), *IMAGENET), tmp_path / "ours"), "hf", tmp_path / "hf")


def changed(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def without(folder: Path, *parts: str) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if not any(part in k for part in parts)}, folder / "model.safetensors"
    )


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def divided(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: changed(f, model_type="dinov2"),
            "is a dinov2 of transformers; of its networks, vit and vit_mae",
        ),
        (lambda f: changed(f, num_attention_heads=5), "has 5 heads, which do not divide the width 24"),
        (lambda f: changed(f, num_attention_heads=0), "has 0 heads, which"),
        (lambda f: changed(f, num_attention_heads="many"), "is damaged: "),
        (lambda f: changed(f, hidden_act="relu"), "has the activation relu; only gelu"),
        (lambda f: changed(f, layer_norm_eps=1e-3), "has layer norms with epsilon 0.001"),
        (lambda f: changed(f, image_size=32), "has 17 positions, not those of 32 x 32 px"),
        (lambda f: without(f, "layer.1.attention.attention.key.bias"), "lacks blocks.1.attn.qkv.bias"),
        (lambda f: without(f, "layer.1.layernorm_after"), r"lacks blocks.1.norm2.bias"),
        (lambda f: without(f, "patch_embeddings"), "has no Vision Transformer with the names of timm or"),
        (cut, "is not a complete .safetensors file"),
        (divided, "model.safetensors is missing; save its parts as one file"),
        (lambda f: (f / "preprocessor_config.json").write_text("{"), "preprocessor_config.json is damaged"),
    ],
)
def test_a_folder_of_transformers_that_cannot_be_read_is_one_line(hf, damage, message, capsys):
    damage(hf)
    with pytest.raises(CheckpointError, match=message):
        load(hf)
    assert main(["import", str(hf), "--out", str(hf.parent / "out")]) == 4
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])
    assert not (hf.parent / "out").exists()


# --- the official code --------------------------------------------------------------------------------------


@catches(
    "the official names of the decoder are ours",
    "rcmae.interop.export:official_state",
    lambda old: lambda model: {k.replace("decoder_", "decoder."): v for k, v in old(model).items()},
)
@pytest.mark.parametrize(("name", "networks"), [("mae", ["student"]), ("rcmae", ["student", "teacher"])])
def test_official_weights_come_back_bit_for_bit(tmp_path, name, networks):
    file = GOLDEN / f"{name}_official_layout.pth"
    lines = import_weights(file, tmp_path / "run", heads=3, decoder_heads=2)
    assert lines[-1].endswith(f"{MAE_LICENSE}: non-commercial")
    export(tmp_path / "run", "official", tmp_path / "official")
    before, after = read_weights(file), read_weights(tmp_path / "official" / "model.safetensors")
    for network in networks:
        one, other = getattr(before, network), getattr(after, network)
        assert one.keys() == other.keys()
        for key in one:
            if key == "decoder_pos_embed":  # computed by both codes
                torch.testing.assert_close(one[key], other[key], atol=1e-6, rtol=0)
            else:
                assert torch.equal(one[key], other[key]), key
    text = (tmp_path / "official" / "README.md").read_text()
    assert (
        "**Non-commercial**: the initial weights are CC BY-NC 4.0" in text and "license: cc-by-nc-4.0" in text
    )
    namespace: dict = {}
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    exec(
        code.replace("FOLDER", str(tmp_path / "official")).replace("model.pth", str(tmp_path / "x.pth")),
        namespace,
    )
    again = read_weights(tmp_path / "x.pth")
    assert all(torch.equal(v, after.student[k]) for k, v in again.student.items())
    assert (again.teacher is None) == (networks == ["student"])
    only = export(tmp_path / "run", "official", tmp_path / "only", "student")
    assert "decoder_pred.weight" in load_file(only / "model.safetensors")


def test_official_fine_tuned_weights_are_imported(tmp_path):
    """MAE's fine-tuning writes a head on the mean of the patches, with fc_norm."""
    network = vit(num_classes=3, global_pool="avg")
    torch.save({"model": network.state_dict(), "args": Namespace(lr=1.0)}, tmp_path / "mae_finetuned_vit.pth")
    assert main(["import", str(tmp_path / "mae_finetuned_vit.pth"), "--heads", "2"]) == 0
    model, _ = load_classifier(tmp_path / "mae_finetuned_vit")
    assert equal(model.vit, network) and model.license == MAE_LICENSE
    assert classifier(load(tmp_path / "mae_finetuned_vit.pth", heads=2), 2).num_classes == 2


def test_a_source_without_a_decoder_is_refused(tmp_path, run, capsys):
    backbone = folder_of(Backbone(vit(), *IMAGENET), tmp_path / "b")
    for source, to, message in (
        (backbone, "official", "has no decoder: give a run of mae or rcmae"),
        (backbone / "model.safetensors", "hf", "an encoder without its decoder is not"),
        (run / "evaluate", "hf", "has no decoder"),
    ):
        assert main(["export", str(source), "--to", to, "--decoder", "--out", str(tmp_path / "x")]) == 4
        assert message in capsys.readouterr().err
    (tmp_path / "dino").mkdir()
    (tmp_path / "dino" / "recipe.toml").write_text('method = "dino"\n')
    with pytest.raises(ConfigError, match="is a run of dino, which has no decoder of pixels"):
        load_autoencoders(tmp_path / "dino")
    (tmp_path / "dino" / "recipe.toml").write_text("epochs = 1.0\n")
    with pytest.raises(CheckpointError, match="a run without a decoder, as of fine-tuning"):
        load_autoencoders(tmp_path / "dino")
    with pytest.raises(ConfigError, match="--decoder is for --to hf"):
        export(run, "onnx", tmp_path / "x", decoder=True)
    assert not (tmp_path / "x").exists()


# --- programs -----------------------------------------------------------------------------------------------


def outputs_of(to, folder, images):
    if to == "torch-export":
        return torch.export.load(folder / "model.pt2").module()(images)
    session = pytest.importorskip("onnxruntime").InferenceSession(folder / "model.onnx")
    names = [each.name for each in session.get_outputs()]
    values = session.run(names, {"images": images.numpy()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


@pytest.mark.parametrize("to", ["torch-export", "onnx"])
@pytest.mark.parametrize("kind", ["backbone", "classifier"])
def test_programs_take_batches_of_any_size(tmp_path, to, kind):
    if to == "onnx":
        pytest.importorskip("onnxscript")
    backbone = Backbone(vit(img_size=(8, 16), depth=1), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)).eval()
    if kind == "classifier":
        network = Classifier(shaken(classifier(backbone, 3)), *backbone.statistics).eval()
        folder_of(network, tmp_path / "ours", ["cat", "dog", "owl"], task="finetune")
    else:
        network, _ = backbone, folder_of(backbone, tmp_path / "ours")
    folder = export(tmp_path / "ours", to, tmp_path / to)
    for batch in (1, 2, 5):
        images = torch.rand(batch, 3, 8, 16)
        outputs, expected = outputs_of(to, folder, images), network(images)
        expected = {"logits": expected} if kind == "classifier" else expected._asdict()
        assert outputs.keys() == expected.keys()
        for name in outputs:
            torch.testing.assert_close(outputs[name], expected[name], atol=1e-5, rtol=0)
    assert (folder / "labels.json").exists() == (kind == "classifier")


# --- the folder and its card --------------------------------------------------------------------------------


def test_the_card_tells_what_was_trained_and_measured(tmp_path, run, capsys):
    assert main(["export", str(run), "--to", "timm", "--out", str(tmp_path / "timm")]) == 0
    assert "its README.md says how to load it" in capsys.readouterr().out
    text = (tmp_path / "timm" / "README.md").read_text()
    recorded = json.loads((run / "machine.json").read_text())
    for part in (
        "# my-run",
        "a Vision Transformer of width 24, with 2 blocks of 2 heads and patch 4",
        f"{sum(p.numel() for p in load(run).parameters()):,} parameters, for images of 3 x 16 x 16 px",
        "It has the weights of the teacher.",
        "| method | rcmae |",
        f"| recipe hash | `{recorded['recipe_hash']}` |",
        f"| images | photos of someone, 12, hash `{recorded['data'][:16]}` |",
        "| steps | 6 of 8 images |",
        "| linear probe | teacher | 12.3 % |",
        "| linear, birds | teacher | 43.2 % of 1,200 images |",
        'timm.create_model("local-dir:FOLDER", pretrained=True)',
        "mean [0.485, 0.456, 0.406]",
        "Your own: rcmae sets no terms",
        'method = "rcmae"',
    ):
        assert part in text, part
    assert str(run.parent) not in text and "/home" not in text
    for path in (run, tmp_path / "timm"):
        model = timm.create_model(
            f"local-dir:{path / 'export' / 'teacher' if path == run else path}", pretrained=True
        )
        assert equal(model.eval(), load(run).vit)
    assert equal(load(tmp_path / "timm"), load(run)), "ours, timm, ours"
    with pytest.raises(ConfigError, match="exists already"):
        export(run, "timm", tmp_path / "timm")
    with pytest.raises(ConfigError, match="must be one of timm, hf"):
        export(run, "tensorflow", tmp_path / "x")


def test_a_card_without_a_run_says_what_is_unknown(tmp_path):
    network = Backbone(vit(), *IMAGENET)
    network.license = "cc-by-nc-4.0"
    folder = export(folder_of(network, tmp_path / "ours"), "timm", tmp_path / "timm")
    text = (folder / "README.md").read_text()
    assert "Not recorded in the source" in text and "None recorded in the source" in text
    assert "**Non-commercial**" in text and load(folder).license == "cc-by-nc-4.0"
    assert load(f"scratch:{folder}").license == "", "random weights are no one's"


def test_the_license_of_initial_weights_reaches_the_card(tmp_path, run):
    network = Backbone(vit(), *IMAGENET)
    network.license = MAE_LICENSE
    folder, data = folder_of(network, tmp_path / "published"), str(run.parent / "photos of someone")
    recipe = replace(small("mae", steps=1, init=str(folder)), data=data)
    rcmae.pretrain(recipe, RuntimeConfig(out=tmp_path / "run", device="cpu", workers=0))
    export(tmp_path / "run", "hf", tmp_path / "hf", decoder=True)
    text = (tmp_path / "hf" / "README.md").read_text()
    assert "**Non-commercial**" in text and "| initial weights | published |" in text
    assert str(tmp_path) not in text and load(tmp_path / "hf").license == MAE_LICENSE
    again = replace(small("mae", steps=1, init=str(tmp_path / "hf")), data=data)
    rcmae.pretrain(again, RuntimeConfig(out=tmp_path / "again", device="cpu", workers=0))
    assert load(tmp_path / "again").license == MAE_LICENSE


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, run, capsys, monkeypatch):
    calls = []

    def create_repo(repo, **options):
        calls.append((repo, options["private"]))
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Namespace(create_repo=create_repo))
    argv = ["export", str(run), "--to", "timm", "--out", str(tmp_path / "x"), "--push", "me/net"]
    assert main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "x is written, but cannot be pushed to me/net: [Errno -2] Name or service" in error
    assert (
        "hf auth login" in error and calls == [("me/net", True)] and (tmp_path / "x" / "README.md").exists()
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'rcmae[hub]'")):
        hub.push(tmp_path, "me/net")


def test_names_are_translated_both_ways():
    model = method_for(small("mae")).student
    state = official_state(model)
    renamed = to_transformers(state)
    assert "decoder.decoder_layers.1.attention.attention.value.bias" in renamed and len(renamed) > len(state)
    for again in (
        from_transformers(renamed),
        from_transformers({f"model.{k}": v for k, v in renamed.items()}),
    ):
        again = {k.removeprefix("model."): v for k, v in again.items()}
        assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)
    assert from_transformers(state) is state


def test_an_onnx_export_without_its_extra_is_one_line(tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        ConfigError, match=re.escape("onnxscript is not installed; it comes with the onnx extra")
    ):
        export(run, "onnx", tmp_path / "x")
    assert not (tmp_path / "x").exists()
