"""Export and import of backbones and classifiers: a folder with `model.safetensors` and `config.json`, which
timm loads as `local-dir:FOLDER`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from timm.models.vision_transformer import VisionTransformer

from ..engine.checkpoint import write_folder
from ..errors import CheckpointError, first_line
from ..models.backbone import Backbone
from ..models.classifier import Classifier

# A timm architecture that passes every argument on to VisionTransformer.
PLAIN = "vit_base_patch16_224"


def export(
    network: Backbone | Classifier,
    folder: Path,
    metadata: dict[str, Any],
    architecture: str = PLAIN,
    classes: Sequence[str] = (),
) -> None:
    """Write a backbone or a classifier. `metadata` (recipe hash, step, network, ...) is "rcmae" in
    config.json; `classes`, the names of a classifier's outputs in order, are timm's `label_names`."""
    vit = network.vit
    pool = vit.global_pool if vit.num_classes else ""
    mean, std = (v.flatten().tolist() for v in (network.mean, network.std))
    size, plan = vit.patch_embed.img_size, blueprint(vit, architecture)
    config = {
        "architecture": architecture,
        "num_classes": vit.num_classes,
        "num_features": vit.embed_dim,
        "global_pool": pool,
        "model_args": plan["model_args"] | {"global_pool": pool} | ({"fc_norm": True} if pool else {}),
        "pretrained_cfg": {
            "num_classes": vit.num_classes,
            "input_size": [vit.in_chans, *size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 224 / 256,
            "mean": mean,
            "std": std,
            "license": "your own",
            # timm before 1.0.31 expects 3 channels in a first_conv, and otherwise initializes it randomly.
            "first_conv": "patch_embed.proj" if vit.in_chans == 3 else None,
            "classifier": "head",
        },
        "rcmae": metadata,
    }
    if classes:
        config["label_names"] = list(classes)
    weights = {k: v.detach().cpu().float().contiguous() for k, v in vit.state_dict().items()}
    write_folder(
        folder, {"model.safetensors": save(weights), "config.json": json.dumps(config, indent=1).encode()}
    )


def import_backbone(folder: Path) -> Backbone:
    """Read a backbone that `export` wrote. Raises CheckpointError if it is missing, damaged or of another
    kind."""
    vit, config = _read(folder)
    if vit.num_classes:
        raise CheckpointError(
            f"{folder} is a classifier of {vit.num_classes} classes instead of a backbone; "
            "`import_classifier` reads it"
        )
    return Backbone(vit, *_statistics(config))


def import_classifier(folder: Path) -> tuple[Classifier, list[str]]:
    """Read a classifier that `export` wrote, and the names of its classes. Raises CheckpointError as
    `import_backbone` does."""
    vit, config = _read(folder)
    if not vit.num_classes:
        raise CheckpointError(
            f"{folder} is a backbone without a head; give a folder that fine-tuning has written"
        )
    names = config.get("label_names") or [str(i) for i in range(vit.num_classes)]
    return Classifier(vit, *_statistics(config)), names


def blueprint(vit: VisionTransformer, architecture: str) -> dict[str, Any]:
    """The `architecture` and the `model_args` with which `timm.create_model` builds a ViT of this shape, as
    JSON."""
    size, patch = vit.patch_embed.img_size, vit.patch_embed.patch_size
    args: dict[str, Any] = {"img_size": list(size), "in_chans": vit.in_chans}
    if architecture == PLAIN:
        args |= {
            "patch_size": list(patch),
            "embed_dim": vit.embed_dim,
            "depth": len(vit.blocks),
            "num_heads": vit.blocks[0].get_submodule("attn").num_heads,
            "reg_tokens": vit.num_reg_tokens,
        }
    if not vit.has_class_token:
        args["class_token"] = False
    if vit.no_embed_class:
        args["no_embed_class"] = True
    if hasattr(vit.blocks[0].ls1, "gamma"):
        args["init_values"] = 1e-5  # adds the layer scale; its values are in the weights
    return {"architecture": architecture, "model_args": args}


def architecture_of(vit: VisionTransformer) -> str:
    """The timm name that builds the ViT."""
    return (getattr(vit, "pretrained_cfg", None) or {}).get("architecture") or PLAIN


def _statistics(config: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(config["pretrained_cfg"]["mean"]), tuple(config["pretrained_cfg"]["std"])


def _read(folder: Path) -> tuple[VisionTransformer, dict[str, Any]]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
        weights = load_file(folder / "model.safetensors")
        classes = config.get("num_classes", 0)
        vit = timm.create_model(
            config["architecture"], pretrained=False, num_classes=classes, **config["model_args"]
        )
        vit.load_state_dict(weights)
        _statistics(config)
    except FileNotFoundError as e:
        raise CheckpointError(
            f"{folder} is not an exported network: {Path(e.filename or 'model.safetensors').name} is missing"
        ) from e
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, OSError) as e:
        raise CheckpointError(f"{folder} is damaged or not ours: {first_line(e)}") from e
    return cast(VisionTransformer, vit), config
