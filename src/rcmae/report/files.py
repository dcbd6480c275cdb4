"""Files of a run directory that may be missing or incomplete."""

import json
import re
import tomllib
from pathlib import Path


def kind_of(run: Path) -> str | None:
    """What a run trains, by the settings in its recipe.toml; None if that is missing or invalid."""
    kinds = {"method": "pre-training", "mixup": "fine-tuning", "preset": "detection"}
    try:
        recipe = tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return next((kind for setting, kind in kinds.items() if setting in recipe), None)


def bad_files(path: Path) -> list[dict[str, str]]:
    """Images that could not be read: "where" and "reason". The last line may be incomplete."""
    lines = re.findall(r"^\{.*\}$", path.read_text(encoding="utf-8"), re.MULTILINE) if path.exists() else []
    return [json.loads(line) for line in lines]
