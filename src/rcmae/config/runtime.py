"""Settings of where and how a run executes, which do not change its result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .recipe import Rules, Section
from .units import parse_time, readable


@dataclass(frozen=True, kw_only=True)
class BaseRuntimeConfig(Section):
    """Where and how a run of any kind executes. These settings do not change the result, except for
    rounding."""

    out: Path | None = None
    """run directory; default: one below runs/ (for `detect train`, below the backbone's run). A run that is
    already there resumes"""
    device: str = "auto"
    "auto, cpu, cuda, cuda:1 or mps"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    "auto: bf16 on devices with fast bf16 (CUDA, CPUs with AMX or AVX512-BF16), else fp32"
    accumulate: int = 1
    """micro-batches per optimizer step and device: less memory, same result (approximately, for losses across
    the batch)"""
    workers: int | None = None
    "loader processes per device; default: depends on the data and the number of cores"
    threads: int | None = None
    "CPU threads of this process; default: torch's"
    compile: bool = False
    "compile the transformer blocks with torch.compile"
    checkpointing: bool = False
    "activation checkpointing: less memory, about a third more time"
    save_every: str = "5m"
    "time between checkpoints"
    keep: int = 2
    "number of newest checkpoints to keep"
    log_every: int | None = None
    "steps between lines of metrics.jsonl; default: a hundredth of the run, at most 50"
    strict: bool = False
    """stop at the first unreadable image that the run comes to, which may be at the end of its first epoch,
    or never in a short run; `rcmae check` reads all images beforehand"""
    max_corrupt_fraction: float = 0.01
    "stop if more than this fraction of the images (and more than ten files) is unreadable"
    tensorboard: bool = False
    "also write TensorBoard events (needs the [tensorboard] extra)"
    wandb: str | None = None
    "also log to this Weights & Biases project (needs the [wandb] extra)"

    def rules(self) -> Rules:
        return [
            *self.each("must be 1 or more", "accumulate", "threads", "keep", "log_every"),
            *self.each("must be 0 or more", "workers"),
            *self.each("must lie in 0 to 1", "max_corrupt_fraction"),
            readable(parse_time, self.save_every),
        ]


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(BaseRuntimeConfig):
    """The runtime settings of pre-training, with its diagnostics."""

    monitor: bool = True
    """record diagnostics of the teacher and of the diversity of features (rcmae.lab; below 2 % of the time
    in runs of 1,000 steps or more)"""
    max_pixels: float = 100e6
    "images of more pixels count as unreadable, since decoding one takes 3 bytes per pixel and more"
    on_alarm: Literal["warn", "stop"] = "warn"
    """when a fault of the teacher or a collapse is detected: print a warning, or save and stop the run"""
    cache: Literal["none", "ram", "device"] = "none"
    """ram: keep the decoded images in memory, reduced to what the recipe's crops need, which changes the
    pixels of large images, see docs/data.md; device: in the memory of the GPU, which also cuts out the
    crops"""

    def rules(self) -> Rules:
        return [*super().rules(), *self.each("must be above 0", "max_pixels")]
