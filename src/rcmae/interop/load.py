"""Any backbone by its name: a run, an exported folder, weights alone, an official checkpoint, timm's own."""

import copy
import json
from pathlib import Path

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

NAMES = "a run directory, an exported folder, a .safetensors, an official .pth or timm:NAME"


def load(path: str | Path, which: str = "teacher", heads: int | None = None, seed: int = 0) -> Backbone:
    """A backbone by path or name: a run, an export folder or its file, weights alone, an official `.pth`, or "timm:NAME".

    `which` chooses between the teacher (default) and the student of a run or an official checkpoint; a method without a teacher has the
    student only. `heads` is for weights alone, which do not tell their attention heads. "scratch:..." is the same network with new weights,
    those of `seed`. Raises CheckpointError or ConfigError in one line.
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
            raise CheckpointError(f"{path} is no checkpoint that rcmae knows; give {NAMES}")
        if path.name == "model.safetensors" and (path.parent / "config.json").exists():
            return import_backbone(path.parent)
        try:
            return plain_backbone(load_file(path), path, heads)
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{path} is no whole .safetensors file: {first_line(e)}") from e
    return import_backbone(_folder(path, which))


def scratch(name: str, which: str = "teacher", seed: int = 0, heads: int | None = None) -> Backbone:
    """The network of a backbone with new weights: a run's as its method begins, any other as timm makes it."""
    recipe = Path(name) / "recipe.toml"
    old = _timm(name, pretrained=False) if name.startswith("timm:") else load(name, which, heads)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if recipe.exists():
            chosen = load_recipe(str(recipe))
            mean, std = (tuple(getattr(old, part).flatten().tolist()) for part in ("mean", "std"))
            return METHODS[chosen.method](chosen, mean, std).backbone("student")
        new = copy.deepcopy(old)
        new.vit.init_weights()
    return new


def load_classifier(path: str | Path, heads: int | None = None) -> tuple[Classifier, list[str]] | None:
    """A classifier by path or name, and its classes by column: a fine-tuning run, an exported folder, an official `.pth`, timm:NAME.

    Of 1,000 classes without names, these are ImageNet's wnids; of another number there are none. None for what has no head. Raises
    CheckpointError or ConfigError.
    """
    name = str(path).removeprefix("timm:local-dir:")
    path = Path(name)
    if name == "pixels" or name.startswith("scratch:"):
        return None
    if name.startswith("timm:"):
        vit = _timm_vit(name)
        model = Classifier(vit, *_statistics(vit)) if vit.num_classes else None
    elif path.suffix in (".pth", ".pt") and path.exists():
        model = plain_classifier({k: v for k, v in read_pth(path).student.items() if not k.startswith("decoder_")}, path, heads)
    else:
        folder = _classifier_folder(path)
        return import_classifier(folder) if folder and _config(folder).get("num_classes") else None
    if model is None:
        return None
    count = model.vit.num_classes
    return model, ImageNetInfo("imagenet-1k").label_names() if count == 1000 else []


def tested_on(path: str | Path) -> str:
    """The start of the fingerprint of the images that a classifier of ours was tested on; empty where it does not say."""
    folder = _classifier_folder(Path(str(path).removeprefix("timm:local-dir:")))
    return str((_config(folder).get("rcmae") or {}).get("test", "")) if folder else ""


def _classifier_folder(path: Path) -> Path | None:
    return next((f for f in (path, path / "export" / "classifier") if (f / "config.json").exists()), None)


def _config(folder: Path) -> dict:
    try:
        return dict(json.loads((folder / "config.json").read_bytes()))
    except (ValueError, TypeError) as e:
        raise CheckpointError(f"{folder / 'config.json'} is damaged or not ours: {first_line(e)}") from e


def _timm(name: str, pretrained: bool = True) -> Backbone:
    vit = _timm_vit(name, pretrained, num_classes=0)
    return Backbone(vit, *_statistics(vit))


def _statistics(vit: VisionTransformer) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(vit.pretrained_cfg["mean"]), tuple(vit.pretrained_cfg["std"])


def _timm_vit(name: str, pretrained: bool = True, **options: int) -> VisionTransformer:
    try:
        vit = timm.create_model(name.removeprefix("timm:"), pretrained=pretrained, **options)
    except Exception as e:  # an unknown name, no network, a hub that refuses
        raise ConfigError(f"timm cannot load {name.removeprefix('timm:')!r}: {first_line(e)}") from e
    if not isinstance(vit, VisionTransformer):
        raise ConfigError(f"{name} is no Vision Transformer")
    return vit


def _folder(path: Path, which: str) -> Path:
    """The exported folder of a run, or the folder itself if it is one."""
    for folder in (path, path / "export" / which):
        if (folder / "config.json").exists():
            return folder
    if _classifier_folder(path):
        raise CheckpointError(
            f"{path} is a run of fine-tuning: it holds a classifier, which `rcmae evaluate robustness` takes, and no backbone"
        )
    if (path / "export" / "detector").is_dir():
        raise CheckpointError(f"{path} is a run of detection: it holds a detector, which `rcmae detect eval` takes, and no backbone")
    student = path / "export" / "student"
    if which == "student" or not (student / "config.json").exists():
        raise CheckpointError(f"{path} holds no backbone; a run writes export/ at its first checkpoint")
    try:
        lost = "teacher" in METHODS[json.loads((student / "config.json").read_bytes())["rcmae"]["method"]].networks
    except (ValueError, KeyError, TypeError, OSError):
        lost = False  # no method says so; a damaged file is told by `import_backbone`
    if lost:
        raise CheckpointError(f"{path} has lost its teacher: export/teacher is missing; `rcmae pretrain --out {path}` writes it again")
    return student
