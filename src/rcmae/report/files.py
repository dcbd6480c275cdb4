"""What pages read of a run directory; what is missing or only half written is left out."""

import json
import re
import tomllib
from pathlib import Path
from typing import Literal


def kind_of(run: Path) -> Literal["pre-training", "fine-tuning", "detection"] | None:
    """What the run in a directory trains, by the settings in its recipe.toml; None where that is missing or no recipe."""
    settings = {"method": "pre-training", "mixup": "fine-tuning", "preset": "detection"}
    try:
        recipe = tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return next((kind for setting, kind in settings.items() if setting in recipe), None)


def bad_files(path: Path) -> list[dict[str, str]]:
    """Images that could not be read: "where" and "reason". The last line may be cut."""
    whole = re.findall(r"^\{.*\}$", path.read_text(encoding="utf-8"), re.MULTILINE) if path.exists() else []
    return [json.loads(line) for line in whole]
