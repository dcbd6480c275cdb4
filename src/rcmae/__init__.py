"""rcmae: self-supervised pre-training of Vision Transformers with RC-MAE.

    import dataclasses, rcmae

    recipe = dataclasses.replace(rcmae.load_recipe("folder"), data="images")
    rcmae.pretrain(recipe, rcmae.RuntimeConfig(out="runs/mine"))
    backbone = rcmae.load("runs/mine")
    features = backbone(images)  # [b, c, h, w] in 0..1 -> cls [b, d], patches [b, d, gh, gw]

Public names are imported on first use, so that importing the package does not import torch.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_NAMES = {
    "METHODS": "methods",
    "Backbone": "models.backbone",
    "RuntimeConfig": "config",
    "Recipe": "config",
    "compare_runs": "report.runs",
    "embed": "tasks.embed",
    "export": "interop.export",
    "find_runs": "report.runs",
    "load": "interop.load",
    "load_recipe": "methods.recipes",
    "look": "report.look",
    "pretrain": "pretraining",
    "write_report": "report",
}
__all__ = [*_NAMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'rcmae' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """Include public names that are not imported yet, for tab completion."""
    return sorted({*globals(), *__all__})
