"""rcmae: self-supervised pre-training of Vision Transformers with RC-MAE.

    import rcmae
    rcmae.pretrain(rcmae.load_recipe("folder"), rcmae.Machine(out="runs/mine"))
    backbone = rcmae.load("runs/mine")        # images in 0..1 "b c h w" -> features.cls "b d", features.patches "b d gh gw"

Names are loaded on first use, so that importing the package does not import torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "METHODS": "methods", "Backbone": "models.backbone", "Machine": "config", "Recipe": "config", "load": "interop.load",
    "load_recipe": "methods.recipes", "pretrain": "pretraining", "write_report": "report",
}  # fmt: skip
__all__ = [*_NAMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'rcmae' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """The public names also before they are loaded, so that completion offers them."""
    return sorted({*globals(), *__all__})
