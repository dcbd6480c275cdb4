"""`rcmae verify METHOD`: does training give the same result in micro-batches, after a resume, with two
processes, and compiled, on this machine and with this recipe?

Runs of a few steps in float32 with `rcmae pretrain`: a reference run without any of these, and one with each
of them, whose saved losses, gradient and weights are compared with those of the reference.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..config import Recipe, changed, check, to_toml
from ..engine import signals
from ..engine.distributed import pick_device
from ..engine.metrics import of_kind, read_metrics
from ..engine.run import describe_machine
from ..errors import ConfigError, DivergedError, ProcessError, RcmaeError
from ..methods import METHODS
from ..methods.distillation import SelfDistillationRecipe

PLAN = 1000
"Length of the runs in steps, which determines schedules and half-lives; only the first few steps are run."

TOLERANCE = {"loss": 1e-5, "gradient": 1e-5, "weights": 5e-3}
"""Largest relative differences: of the loss, of the first gradient (by norm), and of each part of the weights
relative to its change during the run. The last one is larger, since AdamW divides by the gradient's magnitude
and so amplifies gradients that are only rounding errors (the biases of attention keys): 2e-4 on the bundled
set, while a teacher that is updated twice per step gives 0.5."""


@dataclass(frozen=True)
class Row:
    """The largest differences of a run from the reference, and whether all are within the tolerance."""

    name: str
    differences: dict[str, float]
    "relative, of loss, gradient, student and, if any, teacher and other parts; empty if it was not run"
    holds: bool
    note: str = ""


class Variation(NamedTuple):
    """A way to run the same training."""

    name: str
    flags: tuple[str, ...] = ()
    processes: int = 1
    killed: bool = False
    "kill the run halfway with SIGKILL, then run the same command again"


def verify(
    recipe: Recipe,
    *,
    steps: int = 5,
    batch_size: int = 32,
    device: str = "auto",
    report: Callable[[str], object] = lambda text: None,
) -> list[Row]:
    """Run and compare all variations; a row for each.

    The recipe is changed only in its length, its batch (`batch_size`, divided into 4 micro-batches or among 2
    processes), its probes, and its warm-up, during which weights change too little to compare. Raises
    ConfigError, or the error of the reference run.
    """
    if not 2 <= steps <= PLAN:
        raise ConfigError(f"a resume halfway needs from 2 to {PLAN:,} steps, not {steps}")
    if batch_size < 4 or batch_size % 4:
        raise ConfigError(f"4 micro-batches need a --batch-size that is a multiple of 4, not {batch_size}")
    recipe = check(changed(recipe, steps=PLAN, batch_size=batch_size, warmup=0.0, probes=0))
    if isinstance(recipe, SelfDistillationRecipe) and recipe.drop_path:
        report("without drop_path, since the draws of a micro-batch depend on the division of the batch")
        recipe = replace(recipe, drop_path=0.0)
    kind = pick_device(device).type
    variations = (
        Variation(f"1 x {batch_size} = 4 x {batch_size // 4}", ("--accumulate", "4")),
        Variation("straight = killed and resumed", killed=True),
        Variation("one process = two", processes=2),
        Variation("eager = compiled", ("--compile",)),
    )
    rows = []
    with tempfile.TemporaryDirectory(prefix="rcmae-verify-") as folder:
        root = Path(folder)
        (root / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
        report("1 of 5: the reference run")
        reference = _run(Variation("straight"), root / "straight", steps, device)
        for i, variation in enumerate(variations, 2):
            report(f"{i} of 5: {variation.name}")
            reason = _unavailable(variation, kind)
            if "--accumulate" in variation.flags:
                reason = reason or METHODS[recipe.method].accumulation_caveat(recipe)
            if reason:
                rows.append(Row(variation.name, {}, True, reason))
                continue
            out = root / str(i)
            try:
                if variation.killed:
                    _run(variation, out, steps // 2, device)
                result = _run(variation, out, steps, device)
                rows.append(compare(variation.name, reference, result, exact=variation.killed))
            except RcmaeError as e:
                rows.append(Row(variation.name, {}, False, str(e)))
    return rows


def compare(name: str, reference: "Outcome", other: "Outcome", exact: bool = False) -> Row:
    """The largest differences of two runs; `exact` allows none."""
    differences = {
        "loss": max(abs(a / b - 1) for a, b in zip(other.losses, reference.losses, strict=True)),
        "gradient": _relative(other.gradient, reference.gradient, {}),
    }
    for part in dict.fromkeys(k.split(".")[0] for k in reference.weights):
        a, b, start = (
            {k: v for k, v in weights.items() if k.split(".")[0] == part}
            for weights in (other.weights, reference.weights, reference.start)
        )
        differences[part] = _relative(a, b, start)
    allowed = {k: 0.0 if exact else TOLERANCE.get(k, TOLERANCE["weights"]) for k in differences}
    return Row(name, differences, all(v <= allowed[k] for k, v in differences.items()))


# --- one run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """The loss of every step of a run, its first gradient, and its weights before the first step and after
    the last."""

    losses: list[float]
    gradient: dict[str, Tensor]
    start: dict[str, Tensor]
    weights: dict[str, Tensor]

    @classmethod
    def read(cls, run: Path, steps: int) -> "Outcome":
        """Read a run that logged and saved every step. Raises DivergedError if a loss is not finite."""
        folder = run / "checkpoints"
        optimizer = load_file(folder / "step_00000001" / "optimizer.safetensors")
        losses = [line["loss"] for line in of_kind(read_metrics(run), "train") if line["step"] <= steps]
        if None in losses:
            raise DivergedError(
                f"the loss of step {losses.index(None) + 1} is not finite; lower base_lr in the recipe"
            )
        # After one step, the first moment is the gradient times a constant.
        gradient = {k: v for k, v in optimizer.items() if k.endswith("/exp_avg")}
        start, end = (load_file(folder / f"step_{step:08d}" / "model.safetensors") for step in (0, steps))
        return cls(losses, gradient, start, end)


def _run(variation: Variation, out: Path, steps: int, device: str) -> Outcome:
    """Run until the checkpoint of step `steps` exists, then stop. Raises the error of the run."""
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {variation.processes}".split()
    command = [sys.executable, *(launcher if variation.processes > 1 else []), "-m", "rcmae", "pretrain"]
    command += [str(out.parent / "recipe.toml"), "--out", str(out), "--device", device]
    command += f"--precision fp32 --save-every 0.000001s --keep {PLAN} --log-every 1".split()
    command += variation.flags
    last, log = out / "checkpoints" / f"step_{steps:08d}", out.with_suffix(".log")
    with log.open("wb") as file, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file) as process:
        try:
            while process.poll() is None and not last.exists():
                time.sleep(0.01)
        finally:
            # SIGKILL only to test it: torchrun has to end its processes, and the compiler to complete its
            # cache.
            with signals.held():
                process.send_signal(signal.SIGKILL if variation.killed else signal.SIGTERM)
                process.wait()
    if not last.exists():
        raise _error(process.returncode, log.read_text(encoding="utf-8", errors="replace"))
    return Outcome.read(out, steps)


def _error(code: int, text: str) -> RcmaeError:
    """The error that a run printed, as an error of the same class."""
    lines, prefix = text.strip().splitlines() or ["no output"], "rcmae: error: "
    messages = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
    kind = next((kind for kind in RcmaeError.__subclasses__() if kind.exit_code == code), ProcessError)
    return kind(messages[-1] if messages else f"a run of verify ended with code {code}: {lines[-1]}")


def _unavailable(variation: Variation, kind: str) -> str:
    """Why a variation cannot be run on this machine; empty if it can."""
    if variation.processes > 1 and kind == "cuda" and torch.cuda.device_count() < variation.processes:
        return "needs two GPUs; --device cpu runs it with two processes on the CPU"
    compilers = "c++", "g++", "clang++"
    if "--compile" in variation.flags and kind == "cpu" and not any(map(shutil.which, compilers)):
        return "needs a C++ compiler, which is not installed here"
    return ""


def _relative(a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """|a - b| / |b - start| over all tensors; 0 if a and b are equal."""
    gap = sum((a[k].double() - b[k].double()).square().sum() for k in b)
    size = sum((b[k].double() - start[k].double() if k in start else b[k].double()).square().sum() for k in b)
    return 0.0 if gap == 0 else float((gap / size).sqrt())


def to_json(rows: list[Row], recipe: Recipe, device: str) -> str:
    """The rows, with method, data and machine, as JSON."""
    result = {
        "method": recipe.method,
        "data": recipe.data,
        "machine": describe_machine(pick_device(device), "fp32"),
        "rows": [asdict(row) for row in rows],
    }
    return json.dumps(result, indent=1) + "\n"
