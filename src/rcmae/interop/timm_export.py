"""Backbones out and in: a folder with `model.safetensors` and `config.json` that timm loads by its `local-dir:` name."""

import json
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..engine.checkpoint import write_folder
from ..errors import CheckpointError, first_line
from ..models.backbone import Backbone

# A timm architecture whose create function passes every argument on to VisionTransformer.
PLAIN = "vit_base_patch16_224"


def export(backbone: Backbone, folder: Path, about: dict[str, Any], architecture: str = PLAIN) -> None:
    """Write a backbone; `about` (recipe hash, step, which network ...) goes into config.json under "rcmae"."""
    vit = backbone.vit
    mean, std = (getattr(backbone, k).flatten().tolist() for k in ("mean", "std"))
    size, patch = vit.patch_embed.img_size, vit.patch_embed.patch_size
    args: dict[str, Any] = {"img_size": list(size), "in_chans": vit.in_chans}
    if architecture == PLAIN:
        args |= {
            "patch_size": list(patch), "embed_dim": vit.embed_dim, "depth": len(vit.blocks),
            "num_heads": vit.blocks[0].attn.num_heads, "reg_tokens": vit.num_reg_tokens,
        }  # fmt: skip
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": vit.embed_dim,
        "global_pool": "",
        "model_args": args | {"global_pool": ""},
        "pretrained_cfg": {
            "num_classes": 0, "input_size": [vit.in_chans, *size], "fixed_input_size": True,
            "interpolation": "bicubic", "crop_pct": 224 / 256, "mean": mean, "std": std, "license": "your own",
            "first_conv": "patch_embed.proj", "classifier": "head",
        },
        "rcmae": about,
    }  # fmt: skip
    weights = {k: v.detach().cpu().float().contiguous() for k, v in vit.state_dict().items()}
    write_folder(folder, {"model.safetensors": save(weights), "config.json": json.dumps(config, indent=1).encode()})


def import_backbone(folder: Path) -> Backbone:
    """Read what `export` wrote. Raises CheckpointError when it is missing, damaged or something else."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        weights = load_file(folder / "model.safetensors")
        vit = timm.create_model(config["architecture"], pretrained=False, num_classes=0, **config["model_args"])
        vit.load_state_dict(weights)
        return Backbone(vit, tuple(config["pretrained_cfg"]["mean"]), tuple(config["pretrained_cfg"]["std"]))
    except FileNotFoundError as e:
        raise CheckpointError(f"{folder} is no exported backbone: {Path(e.filename or 'model.safetensors').name} is missing") from e
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError, OSError) as e:
        raise CheckpointError(f"{folder} is damaged or not ours: {first_line(e)}") from e
