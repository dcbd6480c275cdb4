"""Pre-training runs that benchmarks make one after the other on a thread."""

import contextlib
import io
from pathlib import Path
from typing import Any

import rcmae.pretraining as pretraining
from benchmarks.alarms import patched
from rcmae.config import Recipe, RuntimeConfig


def pretrain_quietly(recipe: Recipe, out: Path, **runtime: Any) -> None:
    """Make or resume a run on one thread of the CPU, without output and without reports, which would cost a
    fifth of a short one. `runtime`: further fields of RuntimeConfig."""
    with (
        patched("rcmae.pretraining:Pretraining.report", lambda old: lambda run, stopping=False: None),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        pretraining.pretrain(recipe, RuntimeConfig(out=out, device="cpu", threads=1, **runtime))
