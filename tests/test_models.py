"""The encoder equals timm's; the decoder uses all positions; attention kernels and shapes agree."""

import pytest
import timm
import torch

from rcmae.errors import ConfigError
from rcmae.interop.official import our_name
from rcmae.models import blocks
from rcmae.models.autoencoder import SIZES, build
from rcmae.models.backbone import Backbone, Pixels, check_images, pooled
from rcmae.models.classifier import Classifier
from rcmae.models.encoder import Encoder, build_vit, timm_vit
from rcmae.models.patches import gather_tokens, patchify
from rcmae.models.teacher import Teacher
from tests.conftest import small
from tests.mutations import catches


def network(**changes):
    recipe = small(**changes)
    return build(recipe.images, recipe.network)


@pytest.mark.parametrize("changes", [{}, {"registers": 3}, {"height": 8}, {"channels": 5}, {"patch": 8}])
def test_with_every_patch_visible_the_encoder_equals_timm(changes):
    encoder = network(**changes).encoder
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    h, w = small(**changes).images.shape
    images = torch.randn(2, small(**changes).images.channels, h, w)
    patches = patchify(images, encoder.patch)
    order = torch.stack([torch.randperm(patches.shape[1]) for _ in range(2)])
    tokens = encoder(gather_tokens(patches, order), order)
    expected = encoder.vit.forward_features(images)
    assert torch.allclose(tokens[:, : encoder.prefix], expected[:, : encoder.prefix], atol=1e-5)
    assert torch.allclose(
        tokens[:, encoder.prefix :], gather_tokens(expected[:, encoder.prefix :], order), atol=1e-5
    )


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "deit3_small_patch16_224", "vit_tiny_r_s16_p8_224"],
)
def test_any_plain_timm_vit_is_an_encoder(name):
    """Learned positions with and without the class token, layer scale, class token only: all through the same
    code."""
    try:
        vit = timm_vit(name, size=(32, 48), channels=3)
    except ConfigError:
        assert name in (
            "vit_small_patch16_dinov3",
            "vit_tiny_r_s16_p8_224",
        )  # unsupported: rotary positions; a convolutional stem
        return
    encoder, images = Encoder(vit).eval(), torch.randn(1, 3, 32, 48)
    patches = patchify(images, encoder.patch)
    everything = torch.arange(patches.shape[1])[None]
    assert torch.allclose(encoder(patches, everything), vit.forward_features(images), atol=1e-5)
    assert all(isinstance(block.attn, blocks.Attention) for block in vit.blocks), (
        "attention uses the kernels of this package"
    )


def test_computing_only_the_last_queries_equals_the_full_block():
    """The last block computes hidden tokens only: they must equal those of the full block."""
    block = blocks.Block(16, 2, qkv_bias=True, attn_layer=blocks.Attention)
    x = torch.randn(2, 9, 16)
    assert torch.allclose(block(x, last=4), block(x)[:, -4:], atol=1e-6)


@catches(
    "mask tokens have no position",
    "rcmae.models.decoder:gather_tokens",
    lambda old: lambda rows, ids: old(rows, ids) * (0 if rows.dim() == 2 else 1),
)
def test_the_decoder_uses_the_position_of_each_patch():
    """A permutation of the hidden patches permutes the predictions and changes nothing else."""
    model = network()
    patches, order = torch.randn(2, 16, 48), torch.stack([torch.randperm(16) for _ in range(2)])
    again = torch.cat([order[:, :4].flip(1), order[:, 4:].flip(1)], 1)
    assert torch.allclose(model(patches, order, 4), model(patches, again, 4).flip(1), atol=1e-5)
    assert not torch.allclose(model(patches, order, 4)[:, 0], model(patches, order, 4)[:, 1], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_attention_kernels_agree(dtype):
    q, k, v = (torch.randn(2, 2, 7, 8, dtype=dtype) for _ in range(3))
    with torch.no_grad():
        fused = blocks.attend(q, k, v)
    expected = ((q.float() @ k.float().mT) / 8**0.5).softmax(-1) @ v.float()
    for got in (fused, blocks.attend(q.requires_grad_(), k, v)):
        assert torch.allclose(got.float(), expected, atol=1e-6 if dtype == torch.float32 else 3e-2)


@catches(
    "rows and columns of positions are swapped",
    "rcmae.models.encoder:sincos_positions",
    lambda old: (
        lambda grid, width: old(grid[::-1], width).view(grid[1], grid[0], width).transpose(0, 1).flatten(0, 1)
    ),
)
def test_positions_are_those_of_the_official_code(reference):
    model = network()
    assert torch.allclose(model.encoder.vit.pos_embed, reference["student/pos_embed"], atol=1e-6)
    assert torch.allclose(model.decoder.positions, reference["student/decoder_pos_embed"][0, 1:], atol=1e-6)
    assert not model.encoder.vit.pos_embed.requires_grad


def test_official_names_map_onto_ours():
    assert our_name("decoder_blocks.0.attn.qkv.weight") == "decoder.blocks.0.attn.qkv.weight"
    assert our_name("mask_token") == "decoder.mask_token"
    assert our_name("blocks.1.mlp.fc1.bias") == "encoder.vit.blocks.1.mlp.fc1.bias"


# Encoder and decoder weights without positions, counted by hand from width, depth and patch (paper.md section
# 1).
@pytest.mark.parametrize(
    ("name", "millions"), [("vit_small_patch16", 21.6 + 3.5), ("vit_base_patch16", 85.6 + 26.0)]
)
def test_named_sizes_have_the_published_weights(name, millions):
    with torch.device("meta"):
        model = build(small(size=224).images, small().network.__class__(model=name))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count / 1e6 == pytest.approx(millions, abs=0.15)


def test_every_named_size_is_listed_with_a_patch_that_fits():
    assert {s.patch for s in SIZES.values()} == {4, 14, 16}


def test_invalid_model_settings_are_reported_together():
    with pytest.raises(
        ConfigError, match=r"not a multiple of the patch, 4.*; width 25 is not a multiple of heads, 2"
    ):
        network(size=18, width=25)
    with pytest.raises(ConfigError, match="decoder_width 15"):
        network(decoder_width=15)
    with pytest.raises(ConfigError, match="unknown model 'vit_bas'"):
        network(model="vit_bas")
    with pytest.raises(ConfigError, match="plain VisionTransformer"):
        timm_vit("swin_tiny_patch4_window7_224", size=224, channels=3)
    with pytest.raises(ConfigError, match="timm cannot build"):
        timm_vit("no_such_model", size=224, channels=3)


def test_the_teacher_is_updated_alike_on_every_device():
    """The branch for GPUs (decided by a scalar on the device) against that for CPUs (decided by the host)."""
    student, other = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4)
    one, two = Teacher(other), Teacher(other)

    class Scalar(torch.Tensor):
        device = torch.device("meta")

    for applied in (1.0, 0.0):
        one.update(student, 0.7, torch.tensor(applied))
        two.update(student, 0.7, torch.tensor(applied).as_subclass(Scalar))
        assert torch.allclose(one.model.weight, two.model.weight, atol=1e-7)
    assert not torch.equal(one.model.weight, other.weight)


def test_the_size_of_a_timm_model_cannot_be_changed():
    with pytest.raises(ConfigError, match="already determines depth"):
        network(model="timm:vit_tiny_patch16_224", width=None, heads=None, size=32)
    assert timm.__version__


@pytest.mark.parametrize("network", [Backbone, Classifier, Pixels])
def test_images_of_another_shape_are_refused_by_name(network):
    vit = build_vit(size=16, channels=3, patch=8, width=24, depth=1, heads=2, registers=0)
    model = Pixels((16, 16)) if network is Pixels else network(vit, (0.5,) * 3, (0.25,) * 3)
    model(torch.rand(2, 3, 16, 16))
    for shape in ((2, 3, 32, 16), (2, 3, 20, 20), (2, 1, 16, 16)):
        with pytest.raises(ValueError, match=r"takes images \[b, 3, 16, 16\], not \[.*resize or crop them"):
            model(torch.rand(shape))


@catches(
    "the last norm is applied to the last block only",
    "timm.models.vision_transformer:VisionTransformer.forward_intermediates",
    lambda old: lambda self, *args, norm, **options: old(self, *args, norm=False, **options),
)
def test_the_class_tokens_of_the_last_blocks_are_those_of_dinos_probe():
    """Each after the last norm, from the earliest block to the last; the patches are those of the last."""
    model = build(small(depth=3).images, small(depth=3).network)
    backbone = Backbone(model.encoder.vit, (0.5,) * 3, (0.5,) * 3).eval()
    outputs = []
    for block in backbone.vit.blocks:
        block.register_forward_hook(lambda block, args, out: outputs.append(out))
    features, images = backbone.last(2), torch.rand(2, 3, 16, 16)
    features = features(images)
    expected = torch.cat([backbone.vit.norm(tokens)[:, 0] for tokens in outputs[1:3]], 1)
    assert torch.allclose(features.cls, expected, atol=1e-6)
    assert torch.allclose(features.patches, backbone(images).patches, atol=1e-6)
    both = pooled(features, "cls+mean")
    assert torch.equal(both, torch.cat([features.cls, features.patches.mean((2, 3))], 1))
    assert both.shape == (2, 3 * 24)


def test_images_of_another_type_or_shape_are_refused():
    with pytest.raises(ValueError, match=r"values in 0 to 1, not torch.uint8; give images.float\(\) / 255"):
        check_images(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 3, (16, 16))
    with pytest.raises(ValueError, match=r"\[b, 3, 16, 16\], not \[3, 16, 16\].*add the missing axis"):
        check_images(torch.zeros(3, 16, 16), 3, (16, 16))
    check_images(torch.zeros(2, 3, 24, 8), 3, None)  # a network without a fixed image size
