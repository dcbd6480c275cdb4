"""Loading backbones and classifiers: from a run, an exported folder, bare weights, an official checkpoint, or
timm."""

import copy
import json
import logging
import os
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import ImageNetInfo
from timm.models.vision_transformer import VisionTransformer

from ..errors import CheckpointError, ConfigError, first_line
from ..methods import METHODS, Method
from ..methods.recipes import load_recipe
from ..models.backbone import Backbone
from ..models.classifier import Classifier
from .huggingface import model_type, read_folder
from .official import LICENSE_NOTE, MAE_LICENSE, license_of
from .plain import plain_backbone, plain_classifier
from .timm_export import FILES, import_backbone, import_classifier
from .weights import KINDS, check_finite, mismatches, read_weights, weights_of_run

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
NAMES = f"a run directory, a folder of rcmae, timm or transformers, weights ({', '.join(KINDS)}) or timm:NAME"
LOCAL = "timm:local-dir:"
"timm's name of a folder, which is read like any other."


def load(
    path: str | Path,
    which: str = "teacher",
    heads: int | None = None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
) -> Backbone:
    """A backbone by path or name, in evaluation mode: a run, a folder of rcmae, timm or transformers (ViT and
    ViTMAE), a file of weights with the names of timm or transformers, or "timm:NAME"; "scratch:..." is the
    same network, randomly initialized with `seed`.

    `which` selects the teacher or the student of a run or a file that has both, also if they have names
    such as `state_dict_ema` and `state_dict`; without a teacher, it is always the student. `heads` (the
    number of attention heads) and `size` (height and width of the images) are for bare weights, whose
    shapes do not reveal them; what is assumed or left out is logged in one line. Raises CheckpointError or
    ConfigError.
    """
    if which not in ("student", "teacher"):
        raise ConfigError(f"which must be student or teacher, not {which!r}")
    name = str(path)
    if name.startswith("scratch:"):
        return scratch(name.removeprefix("scratch:"), which, seed, heads, size).eval()
    name = name.removeprefix(LOCAL)
    if name.startswith("timm:"):
        return _timm(name).eval()
    path = Path(name)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give {NAMES}")
    if path.is_dir():
        return _imported(_folder(path, which)).eval()
    if not name.endswith(KINDS):
        raise CheckpointError(f"{path} is not a known kind of checkpoint; give {NAMES}")
    if not is_bare(path):
        return _imported(path.parent).eval()
    weights = read_weights(path)
    backbone, text = plain_backbone(weights.select(which), path, heads, size)
    backbone.license = license_of(path, weights)
    phrases = [text, *weights.describe(which, backbone.vit.state_dict())]
    _note(path, *phrases, *[LICENSE_NOTE] * bool(backbone.license))
    return backbone.eval()


def _imported(folder: Path) -> Backbone:
    """The backbone in a folder of rcmae, timm or transformers."""
    if not model_type(folder):
        return import_backbone(folder)
    backbone, phrases = read_folder(folder).backbone()
    _note(folder, *phrases, *[LICENSE_NOTE] * (backbone.license == MAE_LICENSE))
    return backbone


def is_bare(path: Path) -> bool:
    """Whether a path is a file of weights without a configuration beside it."""
    configured = path.name in FILES and (path.parent / "config.json").exists()
    return path.is_file() and str(path).endswith(KINDS) and not configured


def _note(path: Path, *phrases: str) -> None:
    """Log what was understood of a file, on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("rcmae").warning("note: %s: %s", path, "; ".join(phrases))


def scratch(
    name: str,
    which: str = "teacher",
    seed: int = 0,
    heads: int | None = None,
    size: tuple[int, int] | None = None,
) -> Backbone:
    """The network of a backbone, randomly initialized: as by its method for a run, as by timm otherwise."""
    name = name.removeprefix(LOCAL)
    path = Path(name) / "recipe.toml"
    timms = name.startswith("timm:")
    backbone = _timm(name, pretrained=False) if timms else load(name, which, heads, size=size)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if path.exists():
            recipe = load_recipe(str(path))
            mean, std = (tuple(v.flatten().tolist()) for v in (backbone.mean, backbone.std))
            initial = METHODS[recipe.method](recipe, mean, std).backbone("student")
            # So that it sees the same images, and is evaluated on the same feature.
            initial.bits, initial.method = backbone.bits, backbone.method
            return initial
        backbone = copy.deepcopy(backbone)
        backbone.license = ""
        backbone.vit.init_weights()
    return backbone


def load_classifier(
    path: str | Path, which: str = "teacher", heads: int | None = None, size: tuple[int, int] | None = None
) -> tuple[Classifier, list[str]] | None:
    """A classifier by path or name, in evaluation mode, and the names of its outputs: a fine-tuning run, a
    folder exported by rcmae or timm, a file of weights, or timm:NAME. None for a network without a
    classification head.

    `which`, `heads` and `size` are those of `load`. The names of 1,000 unnamed classes are ImageNet's wnids;
    other classes without names give an empty list. Raises CheckpointError or ConfigError.
    """
    name = str(path).removeprefix(LOCAL)
    path = Path(name)
    names: list[str] = []
    if name == "pixels" or name.startswith("scratch:"):
        return None
    if name.startswith("timm:"):
        vit, statistics = _timm_vit(name)
        if not vit.num_classes:
            return None
        model = Classifier(vit, *statistics)
        model.license = cast(dict[str, Any], vit.pretrained_cfg).get("license") or ""
    elif (folder := _classifier_folder(path)) and model_type(folder):
        transformers = read_folder(folder)
        classifier = transformers.classifier()
        if classifier is None:
            return None
        (model, phrases), names = classifier, transformers.classes
        _note(folder, *phrases, *[LICENSE_NOTE] * (model.license == MAE_LICENSE))
    elif folder:
        if not _config(folder).get("num_classes"):
            return None
        model, names = import_classifier(folder)
    elif is_bare(path):
        weights = read_weights(path)
        plain = plain_classifier(weights.select(which), path, heads, size)
        if plain is None:
            return None
        model, text = plain
        model.license = license_of(path, weights)
        phrases = [text, *weights.describe(which, model.vit.state_dict())]
        _note(path, *phrases, *[LICENSE_NOTE] * bool(model.license))
    else:
        return None
    if not names and model.vit.num_classes == 1000:
        names = ImageNetInfo("imagenet-1k").label_names()
    return model.eval(), names


def load_method(run: Path, statistics: Statistics) -> Method:
    """The method of a run, or of a folder that `rcmae import` has written, in evaluation mode with its
    trained weights: student, teacher and decoder. Raises CheckpointError."""
    recipe = load_recipe(str(run / "recipe.toml"))
    method = METHODS[recipe.method](recipe, *statistics)
    file, state = weights_of_run(run)
    if problems := mismatches(state, method.state_dict()):
        raise CheckpointError(f"{file} is damaged or of another version: {problems}")
    method.load_state_dict(state)
    return method.eval()


def tested_fingerprint(path: str | Path) -> str:
    """The start of the fingerprint of the images on which a fine-tuned classifier was tested; empty if it is
    not recorded."""
    folder = _classifier_folder(Path(str(path).removeprefix(LOCAL)))
    return str((_config(folder).get("rcmae") or {}).get("test", "")) if folder else ""


def metadata_of(path: str | Path, which: str) -> dict[str, Any]:
    """What `rcmae` recorded of the network that `load` or `load_classifier` takes: method, network, step,
    hash of recipe and images; empty for those of others."""
    path = Path(str(path).removeprefix(LOCAL))
    folder = path.parent if path.name in FILES else path
    for each in (folder, *(folder / "export" / name for name in ("classifier", which, "student"))):
        if (each / "config.json").exists():
            recorded = _config(each).get("rcmae")
            return dict(recorded) if isinstance(recorded, dict) else {}
    return {}


def _classifier_folder(path: Path) -> Path | None:
    folder = path.parent if path.name in FILES else path
    return next((f for f in (folder, folder / "export" / "classifier") if (f / "config.json").exists()), None)


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_bytes()))
    except (ValueError, TypeError) as e:
        raise CheckpointError(f"{folder / 'config.json'} is damaged or not ours: {first_line(e)}") from e


def _timm(name: str, pretrained: bool = True) -> Backbone:
    vit, statistics = _timm_vit(name, pretrained)
    vit.reset_classifier(0)  # not by an argument of create_model, with which timm ignores missing weights
    backbone = Backbone(vit, *statistics)
    backbone.license = (cast(dict[str, Any], vit.pretrained_cfg).get("license") or "") if pretrained else ""
    return backbone


def _timm_vit(name: str, pretrained: bool = True) -> tuple[VisionTransformer, Statistics]:
    """A Vision Transformer of timm with its head, and the mean and the standard deviation of its images."""
    try:
        vit = timm.create_model(name.removeprefix("timm:"), pretrained=pretrained)
    except Exception as e:  # an unknown name, no network, a hub that refuses
        raise ConfigError(f"timm cannot load {name.removeprefix('timm:')!r}: {first_line(e)}") from e
    if not isinstance(vit, VisionTransformer):
        raise ConfigError(f"{name} is timm's {type(vit).__name__}, not its VisionTransformer")
    check_finite(vit.state_dict(), f"{name}: ")
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
