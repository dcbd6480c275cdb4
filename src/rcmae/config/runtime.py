"""Where and how a run is carried out: what does not change its result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .recipe import Rules, Section
from .units import parse_time, readable


@dataclass(frozen=True, kw_only=True)
class Workplace(Section):
    """Where and how a run of any kind is carried out. Nothing here changes what is computed, beyond rounding."""

    out: Path | None = None
    "run directory; default: one below runs/ (of `detect train`, below the backbone's run). A run that is already there goes on"
    device: str = "auto"
    "auto, cpu, cuda, cuda:1 or mps"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    "auto: bf16 where the device multiplies it faster (CUDA, CPUs with AMX or AVX512-BF16), else fp32"
    accumulate: int = 1
    "micro-batches an optimizer step and device: less memory, the same step (nearly so where a loss looks across the batch)"
    workers: int | None = None
    "loader processes a device; default: by the data and the cores"
    threads: int | None = None
    "CPU threads of this process; default: torch's"
    compile: bool = False
    "compile the blocks with torch.compile"
    checkpointing: bool = False
    "recompute activations in the backward pass: less memory, about a third more time"
    save_every: str = "5m"
    "time between checkpoints"
    keep: int = 2
    "newest checkpoints that are kept"
    log_every: int | None = None
    "steps between two lines of metrics.jsonl; default: a hundredth of the run, at most 50"
    strict: bool = False
    "end at the first unreadable image"
    bad_share: float = 0.01
    "end when more than this share of the images (and more than ten files) is unreadable"
    tensorboard: bool = False
    "also write TensorBoard events (needs the [tensorboard] extra)"
    wandb: str | None = None
    "also log to this Weights & Biases project (needs the [wandb] extra)"

    def rules(self) -> Rules:
        return [
            (self.accumulate >= 1, f"accumulate must be 1 or more, not {self.accumulate}"),
            (self.workers is None or self.workers >= 0, f"workers must be 0 or more, not {self.workers}"),
            (self.threads is None or self.threads >= 1, f"threads must be 1 or more, not {self.threads}"),
            (self.keep >= 1, f"keep must be 1 or more, not {self.keep}"),
            (self.log_every is None or self.log_every >= 1, f"log_every must be 1 or more, not {self.log_every}"),
            (0 <= self.bad_share <= 1, f"bad_share must lie in 0 to 1, not {self.bad_share}"),
            readable(parse_time, self.save_every),
        ]


@dataclass(frozen=True, kw_only=True)
class Machine(Workplace):
    """The same of pre-training, with its instruments."""

    monitor: bool = True
    "carry the instruments of rcmae.lab: what the teacher does, whether features live (below 2 % of the time from 1,000 steps on)"
    on_alarm: Literal["warn", "stop"] = "warn"
    "what a named fault of the teacher or a collapse does: one line, or the end of the run, its checkpoint kept"
