"""Backbones and classifiers out and in: a folder with `model.safetensors` and `config.json` that timm loads by its `local-dir:` name."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from timm.models.vision_transformer import VisionTransformer

from ..engine.checkpoint import write_folder
from ..errors import CheckpointError, first_line
from ..models.backbone import Backbone
from ..models.classifier import Classifier

# A timm architecture whose create function passes every argument on to VisionTransformer.
PLAIN = "vit_base_patch16_224"


def export(
    network: Backbone | Classifier, folder: Path, about: dict[str, Any], architecture: str = PLAIN, classes: Sequence[str] = ()
) -> None:
    """Write a backbone or a classifier; `about` (recipe hash, step, which network ...) goes into config.json under "rcmae".

    `classes` are the names of a classifier's outputs, in order; they become timm's `label_names`.
    """
    vit = network.vit
    pool = vit.global_pool if vit.num_classes else ""
    mean, std = (getattr(network, k).flatten().tolist() for k in ("mean", "std"))
    size, plan = vit.patch_embed.img_size, blueprint(vit, architecture)
    config = {
        "architecture": architecture,
        "num_classes": vit.num_classes,
        "num_features": vit.embed_dim,
        "global_pool": pool,
        "model_args": plan["model_args"] | {"global_pool": pool} | ({"fc_norm": True} if pool else {}),
        "pretrained_cfg": {
            "num_classes": vit.num_classes, "input_size": [vit.in_chans, *size], "fixed_input_size": True,
            "interpolation": "bicubic", "crop_pct": 224 / 256, "mean": mean, "std": std, "license": "your own",
            # timm before 1.0.31 takes weights of a first_conv for ones of 3 channels, and draws new ones where they are not
            "first_conv": "patch_embed.proj" if vit.in_chans == 3 else None, "classifier": "head",
        },
        "rcmae": about,
    }  # fmt: skip
    if classes:
        config["label_names"] = list(classes)
    weights = {k: v.detach().cpu().float().contiguous() for k, v in vit.state_dict().items()}
    write_folder(folder, {"model.safetensors": save(weights), "config.json": json.dumps(config, indent=1).encode()})


def import_backbone(folder: Path) -> Backbone:
    """Read a backbone that `export` wrote. Raises CheckpointError when it is missing, damaged or something else."""
    vit, config = _read(folder)
    if vit.num_classes:
        raise CheckpointError(f"{folder} is a classifier of {vit.num_classes} classes, and no backbone; `import_classifier` reads it")
    return Backbone(vit, *_statistics(config))


def import_classifier(folder: Path) -> tuple[Classifier, list[str]]:
    """Read a classifier that `export` wrote, and the names of its classes. Raises CheckpointError likewise."""
    vit, config = _read(folder)
    if not vit.num_classes:
        raise CheckpointError(f"{folder} is a backbone without a head; give a folder that fine-tuning has written")
    return Classifier(vit, *_statistics(config)), config.get("label_names") or [str(i) for i in range(vit.num_classes)]


def blueprint(vit: VisionTransformer, architecture: str) -> dict[str, Any]:
    """What `timm.create_model` needs, in JSON, to make an untrained ViT of this shape: its `architecture` and `model_args`."""
    size, patch = vit.patch_embed.img_size, vit.patch_embed.patch_size
    args: dict[str, Any] = {"img_size": list(size), "in_chans": vit.in_chans}
    if architecture == PLAIN:
        args |= {
            "patch_size": list(patch), "embed_dim": vit.embed_dim, "depth": len(vit.blocks),
            "num_heads": vit.blocks[0].attn.num_heads, "reg_tokens": vit.num_reg_tokens,
        }  # fmt: skip
    unusual = {"class_token": vit.has_class_token, "no_embed_class": vit.no_embed_class}
    args |= {key: value for key, value in unusual.items() if value != (key == "class_token")}
    if hasattr(vit.blocks[0].ls1, "gamma"):
        args["init_values"] = 1e-5  # that there is a layer scale; its values are weights
    return {"architecture": architecture, "model_args": args}


def architecture_of(vit: VisionTransformer) -> str:
    """The timm name under which a ViT can be built again."""
    return (getattr(vit, "pretrained_cfg", None) or {}).get("architecture") or PLAIN


def _statistics(config: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(config["pretrained_cfg"]["mean"]), tuple(config["pretrained_cfg"]["std"])


def _read(folder: Path) -> tuple[VisionTransformer, dict[str, Any]]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
        weights = load_file(folder / "model.safetensors")
        classes = config.get("num_classes", 0)
        vit = timm.create_model(config["architecture"], pretrained=False, num_classes=classes, **config["model_args"])
        vit.load_state_dict(weights)
        _statistics(config)
    except FileNotFoundError as e:
        raise CheckpointError(f"{folder} is no exported network: {Path(e.filename or 'model.safetensors').name} is missing") from e
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, OSError) as e:
        raise CheckpointError(f"{folder} is damaged or not ours: {first_line(e)}") from e
    return vit, config
