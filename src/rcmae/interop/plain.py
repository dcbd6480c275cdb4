"""Networks from bare weights with timm's names: by their shapes, and by what is given or assumed."""

from collections.abc import Collection, Sequence
from math import isqrt
from pathlib import Path
from typing import Any, cast

import timm
from timm.models.vision_transformer import VisionTransformer

from ..errors import CheckpointError, ConfigError, first_line
from ..models.autoencoder import SIZES
from ..models.backbone import IMAGENET, Backbone, Statistics
from ..models.blueprint import PLAIN
from ..models.classifier import Classifier
from .weights import State, mismatches

TRAINING = ("decoder_", "mask_token", "head_dist.", "decoder.", "pooler.", "embeddings.mask_token")
"Beginnings of names of parameters that evaluation does not use; the last three are transformers'."

GIVE_SIZE = "give the size of its images: --size and --height, or size=(height, width) in rcmae.load"


def plain_backbone(
    state: State,
    source: Path,
    heads: int | None = None,
    size: tuple[int, int] | None = None,
    statistics: Statistics | None = None,
) -> tuple[Backbone, str]:
    """An encoder from bare weights, without their decoder and head, and a description of what was assumed.

    The weights do not reveal the number of attention heads (default: that of the named size of this width, or
    one per 64 channels), the height and width of the images (`size`; default: square), and their `statistics`
    (default: ImageNet's). Raises CheckpointError, which names what does not fit.
    """
    state = {k: v for k, v in state.items() if not k.startswith((*TRAINING, "head.", "fc_norm."))}
    vit, text = plain_vit(state, source, heads, size, statistics, num_classes=0, global_pool="")
    return Backbone(vit, *(statistics or IMAGENET)), text


def plain_classifier(
    state: State,
    source: Path,
    heads: int | None = None,
    size: tuple[int, int] | None = None,
    statistics: Statistics | None = None,
) -> tuple[Classifier, str] | None:
    """As `plain_backbone`, for a classifier such as MAE's fine-tuned checkpoints; None for weights without a
    head. With `fc_norm` or without a class token, its features are assumed to be the mean of the patches."""
    if "head.weight" not in state or state["head.weight"].ndim != 2:
        return None
    state = {k: v for k, v in state.items() if not k.startswith(TRAINING)}
    norm, classes = "fc_norm.weight" in state, len(state["head.weight"])
    pool = "avg" if norm or "cls_token" not in state else "token"
    head = {"num_classes": classes, "global_pool": pool, "fc_norm": norm}
    vit, text = plain_vit(state, source, heads, size, statistics, **head)
    pooled = "the mean of the patches" if pool == "avg" else "the class token"
    return Classifier(vit, *(statistics or IMAGENET)), f"{text}, a head on {pooled}"


def plain_vit(
    state: State,
    source: Path,
    heads: int | None,
    size: tuple[int, int] | None,
    statistics: Statistics | None,
    **head: Any,
) -> tuple[VisionTransformer, str]:
    """timm's plain Vision Transformer with exactly these weights, and a description of what was assumed;
    `head` are timm's arguments for the head and its pooling. Raises CheckpointError, which names what does
    not fit."""
    try:
        width, channels, *patch = state["patch_embed.proj.weight"].shape
        positions = state["pos_embed"].shape[1]
        registers = state["reg_token"].shape[1] if "reg_token" in state else 0
        hidden = len(state["blocks.0.mlp.fc1.weight"])
        depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    except (LookupError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"{source} is not a Vision Transformer with timm's names: {first_line(e)} is missing or invalid"
        ) from e
    if len(patch) != 2:
        raise CheckpointError(f"{source} has patches of {len(patch)} dimensions instead of 2")
    if channels != 3 and statistics is None:
        raise CheckpointError(
            f"{source} is for {channels} channels of unknown mean and standard deviation; export it from its "
            "run"
        )
    if heads is not None and heads < 1:
        raise ConfigError(f"heads must be 1 or more, not {heads}")
    given = heads is not None
    heads = heads or {s.encoder[0]: s.encoder[2] for s in SIZES.values()}.get(width) or width // 64
    if not heads or width % heads:
        raise CheckpointError(
            f"{source} has width {width}, and the weights do not reveal the attention heads; give --heads"
        )
    prefix = ("cls_token" in state) + registers
    rows, columns = grid_of({positions - prefix, positions}, patch, size, str(source))
    h, w = rows * patch[0], columns * patch[1]
    vit = timm.create_model(
        PLAIN,
        img_size=(h, w),
        patch_size=tuple(patch),
        in_chans=channels,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=hidden / width,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        init_values=1e-5 if "blocks.0.ls1.gamma" in state else None,
        class_token="cls_token" in state,
        reg_tokens=registers,
        no_embed_class=prefix > 0 and rows * columns == positions,
        final_norm="norm.weight" in state or "fc_norm.weight" in state,
        **head,
    )
    if problems := mismatches(state, vit.state_dict()):
        raise CheckpointError(f"{source} is not a plain Vision Transformer: {problems}")
    vit.load_state_dict(state)
    assumed = [] if size else [f"{h} x {w} px"]
    assumed += [] if given else [f"{heads} heads"]
    assumed += [] if statistics else ["ImageNet's mean and standard deviation"]
    text = f"ViT {width} x {depth}, patch {patch[0]}" + (f"; assumed {', '.join(assumed)}" if assumed else "")
    return cast(VisionTransformer, vit), text


def grid_of(
    counts: Collection[int], patch: Sequence[int], size: tuple[int, int] | None, source: str
) -> tuple[int, int]:
    """Rows and columns of patches, of which there are as many as one of `counts`, for images of this height
    and width; without a size, those of a square. Raises CheckpointError if there is none or more than one."""
    if size is None:
        sides = {isqrt(count) for count in counts if count == isqrt(count) ** 2 > 0}
        if len(sides) != 1:
            raise CheckpointError(
                f"{source} has {max(counts)} positions, not those of one square of patches; {GIVE_SIZE}"
            )
        return (side := sides.pop()), side
    (h, w), (rows, columns) = size, (size[0] // patch[0], size[1] // patch[1])
    if h % patch[0] or w % patch[1] or rows * columns not in counts:
        raise CheckpointError(
            f"{source} has {max(counts)} positions, not those of {h} x {w} px in patches of {patch[0]} x "
            f"{patch[1]}; {GIVE_SIZE}"
        )
    return rows, columns
