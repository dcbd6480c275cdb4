"""The record of a run: one JSON object a line in metrics.jsonl, and the optional sinks that show the same numbers."""

import contextlib
import json
import math
import secrets
from pathlib import Path
from typing import Any

from ..errors import StorageError, optional
from .checkpoint import replace_file


class Metrics:
    """Appends to `metrics.jsonl`; on a resume, what lies beyond the checkpoint is cut off first."""

    def __init__(self, run: Path, step: int | None, milestone: int = 0, tensorboard: bool = False, wandb: str | None = None):
        """Open the record of `run` at optimizer step `step`, or begin a new one (None).

        What was measured after the last saved `milestone` is cut off too, also at that step: it will be measured again.
        Raises ConfigError when an optional sink is not installed, StorageError.
        """
        self.path = run / "metrics.jsonl"
        lines = [] if step is None else read_metrics(run)
        kept = [line for line in lines if line["step"] <= (milestone if _measured(line) else step)]
        replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.path.open("a", encoding="utf-8")
        self.board = self.wandb = None
        if tensorboard:
            self.board = optional("torch.utils.tensorboard", "tensorboard").SummaryWriter(
                str(run / "tensorboard"), purge_step=None if step is None else step + 1
            )
        if wandb:
            # The same id after a resume, so that it goes on there; it is the run directory's, which may be moved.
            place = run / "wandb.id"
            if not place.exists():
                replace_file(place, secrets.token_hex(4))
            options = {"id": place.read_text(), "resume": "allow", "name": run.name, "dir": str(run)}
            self.wandb = optional("wandb", "wandb").init(project=wandb, **options)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line. JSON has no infinity and no NaN: they become null. Raises StorageError."""
        line = {"kind": kind, "step": step} | {k: _plain(v) for k, v in values.items()}
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as e:
            raise StorageError(f"cannot write {self.path}: {e.strerror}; free some space and run the same command again") from e
        numbers = {f"{kind}/{k}": v for k, v in _flat(line).items() if isinstance(v, (int, float))}
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be flushed has been told
            self.file.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics.jsonl, each with a kind and a step; a last line that a kill cut short is left out.

    A milestone that was measured again, since it had been recorded and not saved, has its last record.
    """
    path = run / "metrics.jsonl"
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if _whole(line):
                lines.append(line)
    last = {(what, line["step"]): line for line in lines if (what := _measured(line))}
    return [line for line in lines if not (what := _measured(line)) or last[what, line["step"]] is line]


def _whole(line: Any) -> bool:
    return isinstance(line, dict) and isinstance(line.get("kind"), str) and type(line.get("step")) is int


def _measured(line: dict[str, Any]) -> str:
    """Which of a milestone's records a line is; empty for other lines."""
    return "lidar" if "lidar" in line else line["kind"] if line["kind"] in ("probe", "val") else ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return flat
