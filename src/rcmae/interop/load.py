"""Loading backbones and classifiers: from a run, an exported folder, bare weights, an official checkpoint, or
timm."""

import copy
import json
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from timm.models.vision_transformer import VisionTransformer

from ..errors import CheckpointError, ConfigError, first_line
from ..methods import METHODS
from ..methods.recipes import load_recipe
from ..models.backbone import Backbone
from ..models.classifier import Classifier
from .official import official_backbone, plain_backbone, plain_classifier, read_pth
from .timm_export import import_backbone, import_classifier

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
NAMES = "a run directory, an exported folder, a .safetensors, an official .pth or timm:NAME"


def load(path: str | Path, which: str = "teacher", heads: int | None = None, seed: int = 0) -> Backbone:
    """A backbone by path or name: a run, an export folder or its file, bare weights, an official `.pth`, or
    "timm:NAME"; "scratch:..." is the same network, randomly initialized with `seed`.

    `which` selects the teacher or the student of a run or an official checkpoint; for a method without a
    teacher, it is always the student. `heads` is the number of attention heads for bare weights, whose shapes
    do not reveal it. Raises CheckpointError or ConfigError.
    """
    if which not in ("student", "teacher"):
        raise ConfigError(f"which must be student or teacher, not {which!r}")
    name = str(path)
    if name.startswith("scratch:"):
        return scratch(name.removeprefix("scratch:"), which, seed, heads)
    if name.startswith("timm:"):
        return _timm(name)
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give {NAMES}")
    if path.suffix in (".pth", ".pt"):
        return official_backbone(path, which, heads)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is not a known kind of checkpoint; give {NAMES}")
        if path.name == "model.safetensors" and (path.parent / "config.json").exists():
            return import_backbone(path.parent)
        try:
            return plain_backbone(load_file(path), path, heads)
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{path} is not a complete .safetensors file: {first_line(e)}") from e
    return import_backbone(_folder(path, which))


def scratch(name: str, which: str = "teacher", seed: int = 0, heads: int | None = None) -> Backbone:
    """The network of a backbone, randomly initialized: as by its method for a run, as by timm otherwise."""
    path = Path(name) / "recipe.toml"
    backbone = _timm(name, pretrained=False) if name.startswith("timm:") else load(name, which, heads)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if path.exists():
            recipe = load_recipe(str(path))
            mean, std = (tuple(v.flatten().tolist()) for v in (backbone.mean, backbone.std))
            return METHODS[recipe.method](recipe, mean, std).backbone("student")
        backbone = copy.deepcopy(backbone)
        backbone.vit.init_weights()
    return backbone


def load_classifier(path: str | Path, heads: int | None = None) -> tuple[Classifier, list[str]] | None:
    """A classifier by path or name, and the names of its outputs: a fine-tuning run, an exported folder, an
    official `.pth`, or timm:NAME. None for a network without a classification head.

    The names of 1,000 unnamed classes are ImageNet's wnids; other classes without names give an empty list.
    Raises CheckpointError or ConfigError.
    """
    name = str(path).removeprefix("timm:local-dir:")
    path = Path(name)
    if name == "pixels" or name.startswith("scratch:"):
        return None
    if name.startswith("timm:"):
        vit, statistics = _timm_vit(name)
        model = Classifier(vit, *statistics) if vit.num_classes else None
    elif path.suffix in (".pth", ".pt") and path.exists():
        model = plain_classifier(
            {k: v for k, v in read_pth(path).student.items() if not k.startswith("decoder_")}, path, heads
        )
    else:
        folder = _classifier_folder(path)
        return import_classifier(folder) if folder and _config(folder).get("num_classes") else None
    if model is None:
        return None
    count = model.vit.num_classes
    return model, ImageNetInfo("imagenet-1k").label_names() if count == 1000 else []


def tested_fingerprint(path: str | Path) -> str:
    """The start of the fingerprint of the images on which a fine-tuned classifier was tested; empty if it is
    not recorded."""
    folder = _classifier_folder(Path(str(path).removeprefix("timm:local-dir:")))
    return str((_config(folder).get("rcmae") or {}).get("test", "")) if folder else ""


def _classifier_folder(path: Path) -> Path | None:
    return next((f for f in (path, path / "export" / "classifier") if (f / "config.json").exists()), None)


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_bytes()))
    except (ValueError, TypeError) as e:
        raise CheckpointError(f"{folder / 'config.json'} is damaged or not ours: {first_line(e)}") from e


def _timm(name: str, pretrained: bool = True) -> Backbone:
    vit, statistics = _timm_vit(name, pretrained, num_classes=0)
    return Backbone(vit, *statistics)


def _timm_vit(name: str, pretrained: bool = True, **options: Any) -> tuple[VisionTransformer, Statistics]:
    """A Vision Transformer of timm, and the mean and the standard deviation of its images."""
    try:
        vit = timm.create_model(name.removeprefix("timm:"), pretrained=pretrained, **options)
    except Exception as e:  # an unknown name, no network, a hub that refuses
        raise ConfigError(f"timm cannot load {name.removeprefix('timm:')!r}: {first_line(e)}") from e
    if not isinstance(vit, VisionTransformer):
        raise ConfigError(f"{name} is not a Vision Transformer")
    config = cast(dict[str, Any], vit.pretrained_cfg)  # set by timm, unknown to the type checker
    return vit, (tuple(config["mean"]), tuple(config["std"]))


def _folder(path: Path, which: str) -> Path:
    """The exported folder of a run, or `path` itself if it is an exported folder."""
    for folder in (path, path / "export" / which):
        if (folder / "config.json").exists():
            return folder
    if _classifier_folder(path):
        raise CheckpointError(
            f"{path} is a run of fine-tuning, with a classifier for `rcmae evaluate robustness` instead of a "
            "backbone"
        )
    if (path / "export" / "detector").is_dir():
        raise CheckpointError(
            f"{path} is a run of detection, with a detector for `rcmae detect eval` instead of a backbone"
        )
    student = path / "export" / "student"
    if which == "student" or not (student / "config.json").exists():
        raise CheckpointError(f"{path} has no backbone; a run writes export/ at its first checkpoint")
    try:
        method = json.loads((student / "config.json").read_bytes())["rcmae"]["method"]
        has_teacher = "teacher" in METHODS[method].networks
    except (ValueError, KeyError, TypeError, OSError):
        has_teacher = False  # unknown; `import_backbone` reports a damaged file
    if has_teacher:
        raise CheckpointError(
            f"export/teacher is missing in {path}; `rcmae pretrain --out {path}` writes it again"
        )
    return student
