"""The metrics of a run: one JSON object per line in metrics.jsonl, and optionally TensorBoard and Weights &
Biases."""

import contextlib
import json
import math
import secrets
from pathlib import Path
from typing import Any

from ..errors import StorageError, optional
from .checkpoint import replace_file

KINDS = {"linear": "linear probe", "attentive": "attentive probe", "knn": "k-NN"}
"""The probes and their names: linear and k-NN use the mean over the patches, the attentive one all tokens."""

PIXELS, RANDOM, INITIAL = "raw pixels", "randomly initialized encoder", "initial weights"
"The baselines of the probes; the last one only for runs that start from weights."

BASELINES = {"raw_pixels": PIXELS, "random_init": RANDOM, "initial_weights": INITIAL}
"Their keys in the records of a run."


class Metrics:
    """Appends to `metrics.jsonl`. When a run resumes, lines later than the checkpoint are removed first."""

    def __init__(
        self,
        run: Path,
        step: int | None,
        milestone: int = 0,
        tensorboard: bool = False,
        wandb: str | None = None,
    ):
        """Open the metrics of `run` at optimizer step `step`, or begin a new file (None).

        Measurements later than the last saved `milestone` are removed as well, since they will be repeated.
        Raises ConfigError if TensorBoard or wandb is requested and not installed, StorageError.
        """
        self.path = run / "metrics.jsonl"
        lines = [] if step is None else read_metrics(run)
        lines = [line for line in lines if line["step"] <= (milestone if _measured(line) else step)]
        replace_file(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self.file = self.path.open("a", encoding="utf-8")
        self.board = self.wandb = None
        if tensorboard:
            self.board = optional("torch.utils.tensorboard", "tensorboard").SummaryWriter(
                str(run / "tensorboard"), purge_step=None if step is None else step + 1
            )
        if wandb:
            # The id lies in the run directory, which may be moved, so that wandb resumes the same run.
            id_file = run / "wandb.id"
            if not id_file.exists():
                replace_file(id_file, secrets.token_hex(4))
            options = {"id": id_file.read_text(), "resume": "allow", "name": run.name, "dir": str(run)}
            self.wandb = optional("wandb", "wandb").init(project=wandb, **options)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line; infinity and NaN, which JSON lacks, become null. Raises StorageError."""
        line = {"kind": kind, "step": step} | {k: _plain(v) for k, v in values.items()}
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as e:
            raise StorageError(
                f"cannot write {self.path}: {e.strerror}; free some space and run the same command again"
            ) from e
        numbers = {f"{kind}/{k}": v for k, v in _flat(line).items() if isinstance(v, (int, float))}
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a failed write has already been reported
            self.file.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All valid lines of a run's metrics.jsonl; a last line cut short by a kill is left out.

    If a milestone was measured twice, because the first measurement was recorded but not saved, only the last
    one is returned.
    """
    path = run / "metrics.jsonl"
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and [type(line.get(k)) for k in ("kind", "step")] == [str, int]:
                    lines.append(line)
    last = {(kind, line["step"]): line for line in lines if (kind := _measured(line))}
    return [line for line in lines if not (kind := _measured(line)) or last[kind, line["step"]] is line]


def of_kind(lines: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    """The lines of these kinds."""
    return [line for line in lines if line["kind"] in kinds]


def _measured(line: dict[str, Any]) -> str:
    """The kind of measurement of a milestone that the line holds; empty for other lines."""
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
