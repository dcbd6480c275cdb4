"""Layer decay against known numbers and against the rule of BEiT and MAE."""

import pytest
from timm.models.vision_transformer import VisionTransformer

from rcmae.tasks.finetune import layer_decay_groups

SCALES = [
    0.003697206,
    0.005688009,
    0.008750783,
    0.013462743,
    0.020711913,
    0.031864481,
    0.049022279,
    0.075418891,
    0.116029063,
    0.178506250,
    0.274625000,
    0.422500000,
    0.650000000,
    1.000000000,
]
"0.65 to the power of 13, 12, ... 0: MAE's for ViT-B"


def vit(pool: str = "avg", depth: int = 12, registers: int = 0) -> VisionTransformer:
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**size, global_pool=pool, depth=depth, reg_tokens=registers)


def scales_and_decays(model: VisionTransformer, decay: float) -> dict[str, tuple[float, float]]:
    """The scale and the weight decay of each parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = layer_decay_groups(model, 0.05, decay)
    return {
        names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]
    }


def by_rule(model: VisionTransformer, decay: float) -> dict[str, tuple[float, float]]:
    """The same by MAE's rule, from each name alone."""
    expected = {}
    for name, p in model.named_parameters():
        first, *rest = name.split(".")
        layer = int(rest[0]) + 1 if first == "blocks" else len(model.blocks) + 1
        if first in ("patch_embed", "cls_token", "pos_embed", "reg_token"):
            layer = 0
        plain = p.ndim == 1 or name in ("cls_token", "pos_embed", "reg_token")
        expected[name] = decay ** (len(model.blocks) + 1 - layer), 0.0 if plain else 0.05
    return expected


def test_scales_of_twelve_blocks_match_known_numbers():
    scale = {name: s for name, (s, _) in scales_and_decays(vit(), 0.65).items()}
    assert {
        scale[n] for n in ("patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token", "pos_embed")
    } == {scale["pos_embed"]}
    blocks = [scale[f"blocks.{i}.attn.qkv.weight"] for i in range(12)]
    assert [scale["pos_embed"], *blocks, scale["head.weight"]] == pytest.approx(SCALES, abs=1e-9)
    assert scale["fc_norm.weight"] == scale["head.bias"] == 1


@pytest.mark.parametrize(("depth", "decay", "registers"), [(12, 0.65, 0), (3, 0.75, 4), (1, 1.0, 0)])
def test_a_mean_pooled_head_has_maes_groups(depth, decay, registers):
    model = vit(depth=depth, registers=registers)
    assert scales_and_decays(model, decay) == by_rule(model, decay)


def test_a_class_token_head_differs_from_maes_groups_only_in_the_last_norm():
    model = vit("token")
    actual, expected = scales_and_decays(model, 0.65), by_rule(model, 0.65)
    assert {n for n in expected if actual[n] != expected[n]} == {"norm.weight", "norm.bias"}
    assert actual["norm.weight"] == (0.65, 0.0)


def test_frozen_weights_are_in_no_group():
    model = vit()
    model.pos_embed.requires_grad_(False)
    assert scales_and_decays(model, 0.65).keys() == by_rule(model, 0.65).keys() - {"pos_embed"}
