"""One self-contained page for each run."""

from pathlib import Path

from ..engine.checkpoint import replace_file
from ..engine.run import is_running
from ..errors import ConfigError
from . import build
from .files import kind_of


def write_report(run: Path, running: bool | None = None) -> Path:
    """Write report.html of a run of pre-training or detection, without the parts whose files are missing.
    `running`: whether an unfinished run continues; by default, whether a process holds its lock.

    Raises ConfigError if there is no such run, and StorageError.
    """
    if not (run / "recipe.toml").exists():
        raise ConfigError(
            f"{run} is no run directory: recipe.toml is missing; give a run of `rcmae pretrain` or `rcmae "
            "detect train`"
        )
    kind, render = kind_of(run), build.render
    if kind == "fine-tuning":
        raise ConfigError(
            f"{run} is a run of fine-tuning, which has no page: its accuracy is in the report of the run "
            "that it started from"
        )
    if kind == "detection":
        from .detection_page import render  # slow to import
    replace_file(run / "report.html", render(run, is_running(run) if running is None else running))
    return run / "report.html"
