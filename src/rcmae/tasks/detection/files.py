"""A detector as a folder: `model.safetensors`, and `config.json` with all that is needed to rebuild it."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ...engine.checkpoint import write_folder
from ...errors import CheckpointError, RcmaeError, first_line
from .coco import CocoSet
from .model import Detector, rebuild
from .settings import DetectionRecipe


class Loaded(NamedTuple):
    """A detector with the names and COCO ids of its classes: label k is the (k - 1)-th of both."""

    model: Detector
    classes: list[str]
    category_ids: list[int]
    settings: DetectionRecipe
    about: dict[str, Any]
    "facts about the training: backbone, data, length"


def export(
    model: Detector,
    folder: Path,
    data: CocoSet,
    settings: DetectionRecipe,
    architecture: dict[str, Any],
    about: dict[str, Any],
) -> None:
    """Write a detector with the classes of `data`; `architecture` is the `blueprint` of the ViT of its
    backbone."""
    config = {
        "detector": architecture,
        "classes": data.classes,
        "category_ids": data.category_ids,
        "settings": asdict(settings),
        "mean": model.mean.flatten().tolist(),
        "std": model.std.flatten().tolist(),
        "rcmae": about,
    }
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write_folder(
        folder, {"model.safetensors": save(weights), "config.json": json.dumps(config, indent=1).encode()}
    )


def run_of(checkpoint: Path) -> Path:
    """The run directory of a detector, which may be given as RUN/export/detector."""
    return checkpoint.parents[1] if checkpoint.parts[-2:] == ("export", "detector") else checkpoint


def load_detector(path: Path) -> Loaded:
    """Load an exported detector from its folder or from its run. Raises CheckpointError."""
    folder = next((f for f in (path / "export" / "detector", path) if (f / "config.json").exists()), None)
    if folder is None:
        raise CheckpointError(
            f"{path} contains no detector; give a finished run of `rcmae detect train`, or its "
            "export/detector"
        )
    try:
        config = json.loads((folder / "config.json").read_bytes())
        if "detector" not in config:
            raise CheckpointError(
                f"{folder} is no detector; `rcmae detect train {path}` trains one on a backbone"
            )
        values = {f.name: config["settings"][f.name] for f in fields(DetectionRecipe)}
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        settings = DetectionRecipe(**arguments)
        model = rebuild(config["detector"], len(config["classes"]), settings, config["mean"], config["std"])
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return Loaded(model.eval(), config["classes"], config["category_ids"], settings, config["rcmae"])
    except RcmaeError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, OSError) as e:
        raise CheckpointError(f"{folder} is damaged or no export of rcmae: {first_line(e)}") from e
