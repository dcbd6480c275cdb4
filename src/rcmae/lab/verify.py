"""`rcmae verify METHOD`: is training the same however it is carried out, on this machine and with this recipe?

Real runs of a few steps in float32, by the command that everybody uses: in one go; in micro-batches; killed and started again;
by two processes; compiled. What each leaves on the disk is compared with what the run in one go left.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..config import Recipe, check, to_toml
from ..engine import signals
from ..engine.distributed import pick_device
from ..engine.metrics import read_metrics
from ..engine.run import describe_machine
from ..errors import ConfigError, DivergedError, ProcessError, RcmaeError
from ..methods import METHODS

PLAN = 1000
"Steps that the runs are planned for: schedules and half-lives are those of a run of this length, of which the first few are made."

TOLERANCE = {"loss": 1e-5, "gradient": 1e-5, "weights": 5e-3}
"""Largest differences, relative: of the loss, of the first gradient (its norm), and of each part of the weights in units of how far
it has moved. The last is wider because AdamW divides by the gradient's size: where a gradient is nothing but rounding (the biases of
attention keys), it turns rounding into steps: 2e-4 on the embedded set, where a teacher that moves twice a step shows as 0.5."""


@dataclass(frozen=True)
class Row:
    """One way of carrying out the run, against the run in one go: the largest differences, and whether all are allowed."""

    name: str
    differences: dict[str, float]
    "loss, gradient, student, and teacher and others where there are such; relative. Empty: it was not run"
    holds: bool
    note: str = ""


class Way(NamedTuple):
    """How a run is carried out."""

    name: str
    flags: tuple[str, ...] = ()
    processes: int = 1
    killed: bool = False
    "half of the steps, killed without warning, then the same command again"


def verify(recipe: Recipe, *, steps: int = 5, batch_size: int = 32, device: str = "auto", say=lambda text: None) -> list[Row]:
    """Make the runs and compare them; a row for each way.

    The recipe is taken as it is but for its length, its batch (`batch_size`, cut into 4 micro-batches or 2 processes), its probes and
    its warm-up, in which nothing moves far enough to be compared. Raises ConfigError, or the error of the run in one go.
    """
    if not 2 <= steps <= PLAN:
        raise ConfigError(f"killed and resumed needs 2 steps or more, and at most {PLAN:,}, not {steps}")
    if batch_size < 4 or batch_size % 4:
        raise ConfigError(f"the batch is cut into 4: give a --batch-size that is a multiple of 4, not {batch_size}")
    optim, probe = replace(recipe.optim, batch_size=batch_size, warmup=0.0), replace(recipe.probe, probes=0)
    recipe = check(replace(recipe, epochs=None, time=None, steps=PLAN, optim=optim, probe=probe))
    kind = pick_device(device).type
    ways = (
        Way(f"1 x {batch_size} = 4 x {batch_size // 4}", ("--accumulate", "4")),
        Way("straight = killed and resumed", killed=True),
        Way("one process = two", processes=2),
        Way("eager = compiled", ("--compile",)),
    )
    rows = []
    with tempfile.TemporaryDirectory(prefix="rcmae-verify-") as folder:
        root = Path(folder)
        (root / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
        say("1 of 5: in one go")
        straight = _run(Way("straight"), root / "straight", steps, device)
        for i, way in enumerate(ways, 2):
            say(f"{i} of 5: {way.name}")
            if reason := _cannot(way, kind) or ("--accumulate" in way.flags and METHODS[recipe.method].accumulation_caveat(recipe)):
                rows.append(Row(way.name, {}, True, reason))
                continue
            try:
                if way.killed:
                    _run(way, root / str(i), steps // 2, device)
                rows.append(compare(way.name, straight, _run(way, root / str(i), steps, device), exact=way.killed))
            except RcmaeError as e:
                rows.append(Row(way.name, {}, False, str(e)))
    return rows


def compare(name: str, straight: "Left", other: "Left", exact: bool = False) -> Row:
    """The largest differences of two runs; `exact` allows none."""
    found = {
        "loss": max(abs(a / b - 1) for a, b in zip(other.losses, straight.losses, strict=True)),
        "gradient": _relative(other.gradient, straight.gradient, {}),
    }
    for part in dict.fromkeys(k.split(".")[0] for k in straight.weights):
        a, b, start = (
            {k: v for k, v in tree.items() if k.split(".")[0] == part} for tree in (other.weights, straight.weights, straight.start)
        )
        found[part] = _relative(a, b, start)
    allowed = {k: 0.0 if exact else TOLERANCE.get(k, TOLERANCE["weights"]) for k in found}
    return Row(name, found, all(v <= allowed[k] for k, v in found.items()))


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Left:
    """What a run left: the loss of every step, the first gradient, the weights before the first step and after the last."""

    losses: list[float]
    gradient: dict[str, Tensor]
    start: dict[str, Tensor]
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, run: Path, steps: int) -> "Left":
        """Read a run that logged and saved every step. Raises DivergedError if a loss is not finite."""
        place = run / "checkpoints"
        moments = load_file(place / "step_00000001" / "optimizer.safetensors")
        losses = [line["loss"] for line in read_metrics(run) if line["kind"] == "train" and line["step"] <= steps]
        if None in losses:
            raise DivergedError(f"the loss of step {losses.index(None) + 1} is not finite; lower base_lr in the recipe")
        return cls(
            losses,
            {k: v for k, v in moments.items() if k.endswith("/exp_avg")},  # after one step: the gradient, but for a factor
            load_file(place / "step_00000000" / "model.safetensors"),
            load_file(place / f"step_{steps:08d}" / "model.safetensors"),
        )


def _run(way: Way, out: Path, steps: int, device: str) -> Left:
    """Run until the checkpoint of step `steps` is there, then stop. Raises the error that the run ended with."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(way.processes)] if way.processes > 1 else []
    command = [sys.executable, *launch, "-m", "rcmae", "pretrain", str(out.parent / "recipe.toml"), "--out", str(out), "--device", device]
    command += ["--precision", "fp32", "--save-every", "0.000001s", "--keep", str(PLAN), "--log-every", "1", *way.flags]
    wanted, log = out / "checkpoints" / f"step_{steps:08d}", out.with_suffix(".log")
    with log.open("wb") as file, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file) as process:
        try:
            while process.poll() is None and not wanted.exists():
                time.sleep(0.01)
        finally:
            # Only what must survive it is killed: torchrun has processes to end, the compiler a cache to keep whole.
            with signals.held():
                process.send_signal(signal.SIGKILL if way.killed else signal.SIGTERM)
                process.wait()
    if not wanted.exists():
        raise _error(process.returncode, log.read_text(encoding="utf-8", errors="replace"))
    return Left.of(out, steps)


def _error(code: int, text: str) -> RcmaeError:
    """The error that a run printed, as an error of the same kind."""
    said = [line.removeprefix("rcmae: error: ") for line in text.splitlines() if line.startswith("rcmae: error: ")]
    kind = next((kind for kind in RcmaeError.__subclasses__() if kind.exit_code == code), ProcessError)
    return kind(said[-1] if said else f"a run of verify ended with code {code}: {(text.strip().splitlines() or ['no word'])[-1]}")


def _cannot(way: Way, kind: str) -> str:
    """Why a way cannot be tried here; nothing if it can."""
    if way.processes > 1 and kind == "cuda" and torch.cuda.device_count() < way.processes:
        return "needs two GPUs; --device cpu tries it with two processes there"
    if "--compile" in way.flags and kind == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "needs a C++ compiler, which is not installed here"
    return ""


def _relative(a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """|a - b| / |b - start| over all tensors; 0 where they are equal."""
    gap = sum((a[k].double() - b[k].double()).square().sum() for k in b)
    size = sum((b[k].double() - start[k].double() if k in start else b[k].double()).square().sum() for k in b)
    return 0.0 if gap == 0 else float((gap / size).sqrt())


def to_json(rows: list[Row], recipe: Recipe, device: str) -> str:
    """The rows with their conditions as text for a file."""
    ways = [asdict(row) for row in rows]
    about = {"method": recipe.method, "data": recipe.data, "machine": describe_machine(pick_device(device), "fp32")}
    return json.dumps(about | {"rows": ways}, indent=1) + "\n"
