"""Starting from existing weights: the network computes what they computed, whatever its statistics are."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from rcmae.config import RuntimeConfig, changed
from rcmae.engine.run import read_json
from rcmae.errors import CheckpointError
from rcmae.interop.imports import import_weights
from rcmae.interop.initial import adapted, initialize, read_initial, with_network_of
from rcmae.interop.official import LICENSE_NOTE
from rcmae.interop.timm_export import export
from rcmae.methods import METHODS
from rcmae.models.backbone import Backbone
from rcmae.pretraining import pretrain
from rcmae.tasks.features import identity
from tests.conftest import GOLDEN, method_for, small
from tests.mutations import catches

STATISTICS = (0.5, 0.4, 0.6), (0.25, 0.2, 0.3)
SHAPE = {"width": 32, "depth": 2, "heads": 2, "patch": 4}


def vit(size: int = 16, patch: int = 4, **changes):
    torch.manual_seed(1)
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0, "global_pool": ""}
    model = timm.models.VisionTransformer(img_size=size, patch_size=patch, **(options | changes))
    torch.nn.init.normal_(model.cls_token)
    return model


def pictures(size: int = 16, channels: int = 3) -> torch.Tensor:
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network in timm's layout whose images have other statistics than those of the recipe."""
    path = tmp_path_factory.mktemp("weights") / "vit"
    export(Backbone(vit().eval(), *STATISTICS), path, {}, "vit_base_patch16_224")
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Pictures of two classes."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(60):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = rng.integers(100 * (i % 2), 156 + 100 * (i % 2), (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "ab"[i % 2] / f"{i}.png")
    return root


@catches(
    "other statistics are ignored",
    "rcmae.interop.initial:_restandardized",
    lambda old: lambda weight, bias, before, after: (weight, bias),
    case="rcmae",
)
@pytest.mark.parametrize("name", [*METHODS])
def test_the_new_network_computes_what_the_weights_computed(name, folder):
    recipe = changed(small(name), size=16)
    method = method_for(changed(recipe, init=str(folder), **SHAPE))
    initial = read_initial(str(folder))
    initialize(method, initial, str(folder))
    expected = initial.encoder(pictures())
    for network in METHODS[name].networks:
        features = method.backbone(network).eval()(pictures())
        torch.testing.assert_close(features.patches, expected.patches, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(features.cls, expected.cls, rtol=1e-4, atol=1e-4)


def test_positions_and_patches_are_resized_as_by_timm():
    source = Backbone(vit().eval(), *STATISTICS)
    state, changes = adapted(source, vit(24, 8), STATISTICS)
    expected = vit()
    expected.set_input_size(24, 8)
    assert all(torch.equal(value, state[name]) for name, value in expected.state_dict().items())
    assert changes == ["patches resized from 4 to 8 px", "positions interpolated from 4 x 4 to 3 x 3"]


def test_gray_images_take_the_sum_over_the_colors():
    source, gray = Backbone(vit().eval(), *STATISTICS), vit(in_chans=1)
    state, changes = adapted(source, gray, ((0.5,), (0.25,)))
    assert torch.equal(
        state["patch_embed.proj.weight"], source.vit.patch_embed.proj.weight.sum(1, keepdim=True)
    )
    gray.load_state_dict(state)
    assert changes == ["3 channels adapted to 1"]


def test_an_official_checkpoint_brings_its_decoder(tmp_path):
    import_weights(GOLDEN / "rcmae_official_layout.pth", tmp_path / "official", heads=2, decoder_heads=2)
    name = str(tmp_path / "official")
    recipe = small("rcmae")
    recipe = changed(recipe, size=32)
    network = with_network_of(name, recipe.network)
    method = method_for(changed(recipe, **{f: getattr(network, f) for f in vars(network)}))
    changes = initialize(method, read_initial(name), name)
    weights = load_file(tmp_path / "official" / "weights.safetensors")
    for key, value in method.student.state_dict().items():
        if key.startswith("decoder."):
            torch.testing.assert_close(value, weights[f"teacher.{key}"])
    assert changes[-1] == "with their decoder"
    assert all(
        torch.equal(a, b)
        for a, b in zip(method.student.parameters(), method.teacher.model.parameters(), strict=True)
    )


def test_weights_of_another_shape_are_refused_by_name(folder):
    method = method_for(changed(small("mae"), size=16, **SHAPE | {"width": 48}))
    before = {name: value.clone() for name, value in method.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"vit do not fit.*leave out --model"):
        initialize(method, read_initial(str(folder)), str(folder))
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


@pytest.mark.parametrize("name", ["rcmae", "mae", "dino"])
def test_the_network_takes_the_shape_of_the_weights(name, folder):
    network = with_network_of(str(folder), small(name).network)
    shape = {f: getattr(network, f) for f in ("width", "depth", "heads", "patch")}
    assert shape == SHAPE | {"patch": None}, "4 px are those of the model of the nearest width"
    assert network.init == str(folder)


def test_timm_names_are_the_model():
    network = with_network_of("timm:vit_tiny_patch16_224", small("mae").network)
    assert (network.model, network.width) == ("timm:vit_tiny_patch16_224", None)


def test_the_first_probe_is_that_of_the_weights(tmp_path, images, folder, capsys):
    """Before any step; and a run resumes without the weights."""
    recipe = small("rcmae", data=str(images), probes=1, probe_train=30, probe_test=30, steps=2)
    recipe = changed(recipe, size=16, **SHAPE)
    runtime = {"device": "cpu", "precision": "fp32", "workers": 0}
    first = tmp_path / "first"
    pretrain(recipe, RuntimeConfig(out=first, **runtime))
    pretrain(
        changed(recipe, init=str(first), seed=recipe.seed), RuntimeConfig(out=tmp_path / "next", **runtime)
    )
    text = capsys.readouterr().out
    assert "with their decoder" in text and "initial weights linear probe" in text
    end = load_file(first / "probes" / "00000002.safetensors")
    start = load_file(tmp_path / "next" / "probes" / "00000000.safetensors")
    for kind in ("linear", "knn", "attentive"):
        assert torch.equal(end[f"teacher/{kind}"], start[f"initial_weights/{kind}"])
    about = read_json(tmp_path / "next" / "machine.json")["initial_weights"]
    assert about == {"name": str(first), "weights": identity(read_initial(str(first)).encoder)}


def test_the_license_of_others_is_said(tmp_path):
    file = GOLDEN / "rcmae_official_layout.pth"
    import_weights(file, tmp_path / "official", 2, 2)
    (note,) = read_initial(str(tmp_path / "official")).notes
    assert note == LICENSE_NOTE and "non-commercial" in note


def test_a_patch_embedding_without_bias_keeps_its_statistics():
    source = Backbone(vit(pre_norm=True).eval(), *STATISTICS)
    state, changes = adapted(source, vit(pre_norm=True), ((0.1,) * 3, (0.2,) * 3))
    assert torch.equal(state["patch_embed.proj.weight"], source.vit.patch_embed.proj.weight)
    assert changes == ["other statistics not adapted, as their patch embedding has no bias"]


def test_only_three_channels_are_adapted():
    source = Backbone(vit(in_chans=4).eval(), (0.5,) * 4, (0.25,) * 4)
    with pytest.raises(CheckpointError, match="for 4 channels.*give --channels 4"):
        adapted(source, vit(), STATISTICS)


def test_a_fine_tuned_run_is_refused_by_name(tmp_path):
    (tmp_path / "recipe.toml").write_text("steps = 5\n")
    (tmp_path / "export" / "classifier").mkdir(parents=True)
    (tmp_path / "export" / "classifier" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a run of fine-tuning"):
        with_network_of(str(tmp_path), small("mae").network)
