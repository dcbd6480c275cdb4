"""Export and import of backbones and classifiers: a folder with `model.safetensors` and `config.json`, which
timm loads as `local-dir:FOLDER`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer

from ..data.views import center_share
from ..engine.checkpoint import write_folder
from ..errors import CheckpointError, first_line
from ..methods import METHODS
from ..methods.base import Method
from ..models.backbone import Backbone
from ..models.blueprint import architecture_of, blueprint
from ..models.classifier import Classifier
from .weights import mismatches, read_weights

OWN = "your own"
"The license in config.json of a network that was trained from scratch."

FILES = ("model.safetensors", "pytorch_model.bin")
"Names of the weights in a folder, ours and timm's; the first one that exists is read."


def export(
    network: Backbone | Classifier,
    folder: Path,
    metadata: dict[str, Any],
    architecture: str | None = None,
    classes: Sequence[str] = (),
) -> None:
    """Write the `files` of a backbone or a classifier. Raises ConfigError as `blueprint` does, and
    StorageError."""
    write_folder(folder, files(network, metadata, architecture, classes))


def files(
    network: Backbone | Classifier,
    metadata: dict[str, Any],
    architecture: str | None = None,
    classes: Sequence[str] = (),
) -> dict[str, bytes]:
    """model.safetensors and config.json. `metadata` (method, recipe hash, step, network, ...) is "rcmae" in
    config.json; `architecture` is the timm name that builds it (default: that of the ViT); `classes`, the
    names of a classifier's outputs in order, are timm's `label_names`.

    timm pools a backbone's features by the method: the mean of the patches, or the class token where the
    method trains it. Its `global_pool` of "avg" or "token" overrides that; the last norm stays before the
    pooling, so that either loads all weights.

    Raises ConfigError as `blueprint` does.
    """
    vit = network.vit
    mean, std = (v.flatten().tolist() for v in (network.mean, network.std))
    built = blueprint(vit, architecture or architecture_of(vit))
    if not (vit.num_classes or vit.global_pool):
        token = vit.has_class_token and METHODS.get(metadata.get("method", ""), Method).pool == "cls"
        built["model_args"]["global_pool"] = "token" if token else "avg"
    config = built | {
        "num_classes": vit.num_classes,
        "num_features": vit.embed_dim,
        "global_pool": built["model_args"]["global_pool"],
        "pretrained_cfg": {
            "num_classes": vit.num_classes,
            "input_size": [vit.in_chans, *vit.patch_embed.img_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": center_share(vit.patch_embed.img_size),
            "mean": mean,
            "std": std,
            "license": network.license or OWN,
            # timm before 1.0.31 expects 3 channels in a first_conv, and otherwise initializes it randomly.
            "first_conv": "patch_embed.proj" if vit.in_chans == 3 else None,
            "classifier": "head",
        },
        "rcmae": metadata,
    }
    if classes:
        config["label_names"] = list(classes)
    weights = {k: v.detach().cpu().float().contiguous() for k, v in vit.state_dict().items()}
    return {"model.safetensors": save(weights), "config.json": json.dumps(config, indent=1).encode()}


def import_backbone(folder: Path) -> Backbone:
    """Read a backbone that `export` or timm's `save_for_hf` wrote; the head of one of timm's is dropped.
    Raises CheckpointError if it is missing, damaged or of another kind, or not finite."""
    vit, config = _read(folder)
    if vit.num_classes and "rcmae" in config:
        raise CheckpointError(
            f"{folder} is a classifier of {vit.num_classes} classes instead of a backbone; "
            "`import_classifier` reads it"
        )
    vit.reset_classifier(0)
    backbone = Backbone(vit, *_statistics(config))
    metadata = config.get("rcmae") or {}
    backbone.bits, backbone.method = metadata.get("bits"), str(metadata.get("method", ""))
    backbone.license = _license(config)
    return backbone


def import_classifier(folder: Path) -> tuple[Classifier, list[str]]:
    """Read a classifier that `export` or timm's `save_for_hf` wrote, and the names of its classes, if it has
    any. Raises CheckpointError as `import_backbone` does."""
    vit, config = _read(folder)
    if not vit.num_classes:
        raise CheckpointError(
            f"{folder} is a backbone without a head; give a folder that fine-tuning has written"
        )
    names = config.get("label_names") or []
    if isinstance(names, dict):  # timm's form for class numbers with gaps
        names = [names.get(str(i), str(i)) for i in range(vit.num_classes)]
    model = Classifier(vit, *_statistics(config))
    model.bits = (config.get("rcmae") or {}).get("bits")
    model.license = _license(config)
    return model, list(names)


def _license(config: dict[str, Any]) -> str:
    """The license in config.json; empty for one's own."""
    license = config["pretrained_cfg"].get("license")
    return str(license) if license and license != OWN else ""


def _statistics(config: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(config["pretrained_cfg"]["mean"]), tuple(config["pretrained_cfg"]["std"])


def _read(folder: Path) -> tuple[VisionTransformer, dict[str, Any]]:
    """The network of a folder with its head, and its config.json."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        _statistics(config)
        vit = timm.create_model(
            config["architecture"],
            pretrained=False,
            pretrained_cfg=config["pretrained_cfg"],
            **{k: config[k] for k in ("num_classes", "global_pool") if k in config}
            | config.get("model_args", {}),
        )
    except FileNotFoundError as e:
        raise CheckpointError(f"{folder} is not an exported network: config.json is missing") from e
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, AssertionError, OSError) as e:
        raise CheckpointError(f"{folder} is damaged or not ours: {first_line(e)}") from e
    if not isinstance(vit, VisionTransformer):
        raise CheckpointError(f"{folder} is timm's {type(vit).__name__}, not its VisionTransformer")
    file = next((folder / name for name in FILES if (folder / name).exists()), None)
    if file is None:
        raise CheckpointError(f"{folder} is not an exported network: {FILES[0]} is missing")
    state = read_weights(file).student
    if problems := mismatches(state, vit.state_dict()):
        raise CheckpointError(f"{folder} is damaged or not ours: {problems}")
    vit.load_state_dict(state)
    return vit, config
