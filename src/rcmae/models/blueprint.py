"""How timm builds a Vision Transformer: the name and the arguments that an export writes down.

The network that timm builds from them is compared with the given one, so that an export is always the network
that was trained.
"""

from collections.abc import Iterator
from typing import Any

import timm
import torch
from timm.layers import DropPath, PatchDropout
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..errors import ConfigError, first_line

# A timm architecture that passes every argument on to VisionTransformer.
PLAIN = "vit_base_patch16_224"


def architecture_of(vit: VisionTransformer) -> str:
    """The timm name that builds the ViT."""
    return (getattr(vit, "pretrained_cfg", None) or {}).get("architecture") or PLAIN


def heads_of(network: nn.Module) -> int:
    """The number of attention heads, which is that of the first block."""
    return next(vars(m)["num_heads"] for m in network.modules() if "num_heads" in vars(m))


def blueprint(vit: VisionTransformer, architecture: str) -> dict[str, Any]:
    """The `architecture` and the `model_args` with which `timm.create_model` builds this ViT, as JSON.

    Raises ConfigError if timm builds another network from them. Dropout of any kind, which does nothing in
    evaluation, is left out.
    """
    try:
        args = _model_args(vit, architecture)
        with torch.device("meta"):  # shapes without memory
            again = timm.create_model(
                architecture, pretrained=False, num_classes=vit.num_classes, weight_init="skip", **args
            )
    except Exception as e:  # an architecture refuses arguments that it does not have in its own ways
        raise ConfigError(f"timm cannot build this {type(vit).__name__} again: {first_line(e)}") from e
    if different := difference(vit, again):
        raise ConfigError(
            f"timm's {architecture} is another network, so this one cannot be exported: {different}"
        )
    return {"architecture": architecture, "model_args": args}


def difference(network: nn.Module, other: nn.Module) -> str:
    """In what the output of `other` in evaluation differs from that of `network` besides the values of the
    weights, as one phrase; empty if in nothing."""
    here, there = dict(_structure(network)), dict(_structure(other))
    return next(
        (
            f"{name} is {there.get(name)} instead of {here.get(name)}"
            for name in sorted(here.keys() | there.keys())
            if here.get(name) != there.get(name)
        ),
        "",
    )


def _model_args(vit: VisionTransformer, architecture: str) -> dict[str, Any]:
    block = vit.blocks[0]
    args: dict[str, Any] = {
        "img_size": list(vit.patch_embed.img_size),
        "patch_size": list(vit.patch_embed.patch_size),
        "in_chans": vit.in_chans,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": heads_of(block),
        "class_token": vit.has_class_token,
        "reg_tokens": vit.num_reg_tokens,
        "no_embed_class": vit.no_embed_class,
        "dynamic_img_size": vit.dynamic_img_size,
        "global_pool": vit.global_pool,
        "fc_norm": not isinstance(vit.fc_norm, nn.Identity),
    }
    if architecture == PLAIN:  # others have blocks of their own
        weights = vit.state_dict()
        args |= {
            "mlp_ratio": len(weights["blocks.0.mlp.fc1.weight"]) / vit.embed_dim,
            "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
            "final_norm": not (isinstance(vit.norm, nn.Identity) and isinstance(vit.fc_norm, nn.Identity)),
        }
    if hasattr(getattr(block, "ls1", None), "gamma"):
        args["init_values"] = 1e-5  # adds the layer scale; its values are in the weights
    return args


IGNORED = {"training", "grad_checkpointing", "fused_attn", "weight_init_mode", "fix_init", "init_values"}
"Attributes that do not change the output of a network with given weights."


def _structure(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """What determines the output of a network in evaluation besides the values of its weights: the kinds of
    its modules, their plain attributes, and the shapes of its tensors, by name."""
    for name, module in network.named_modules():
        if isinstance(module, (nn.Identity, nn.Dropout, DropPath, PatchDropout)):
            continue
        yield name or "the network", type(module).__name__
        for key, value in vars(module).items():
            if isinstance(value, (bool, int, float, str, tuple)) and key[0] != "_" and key not in IGNORED:
                yield f"{name}.{key}".lstrip("."), value
    for name, tensor in network.state_dict().items():
        yield name, tuple(tensor.shape)
