"""Does each injected fault raise its alarm, and a healthy run none? `python -m benchmarks.alarms [--jobs 2]
[--out FILE]`.

Every fault is patched into the code (or set by a flag) in a short run of the bundled recipe from the command
line; then come twenty healthy runs of 100 steps. Batches of 32 from the first 512 images of the bundled set
give short runs several epochs, and all of it takes minutes. Exit code 0 only if each fault raises exactly its
alarm, once, and no healthy run raises any.
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing as mp
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import markdown
from rcmae.cli import main as command
from rcmae.engine.metrics import read_metrics
from rcmae.engine.run import describe_machine

IMAGES, BATCH = 512, 32
STEPS = 64
"Optimizer steps of a faulty run: four epochs."


@contextlib.contextmanager
def patched(target: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Within it, the object at "module:Class.name" is wrap(object); "" patches nothing."""
    if not target:
        yield
        return
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


# --- the faults ---------------------------------------------------------------------------------------------


def rebuilt_from_student(old: Any) -> Any:
    def load(path, method, optimizer):
        state = old(path, method, optimizer)
        method.teacher.model.load_state_dict(method.student.state_dict())
        return state

    return load


def frozen_early(old: Any) -> Any:
    """A schedule in the wrong unit: it reaches its end, 1, after a quarter of the run."""

    def momentum(self, t):
        return old(self, type(t)(min(4 * t.step, t.total_steps), t.total_steps, t.steps_per_epoch))

    return momentum


def constant_output(old: Any) -> Any:
    def forward(self, tokens, order):
        x = old(self, tokens, order)
        return x.mean((0, 1), keepdim=True).expand_as(x)

    return forward


class OneDirection(nn.LayerNorm):
    """A norm whose outputs all lie on a line."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return 1 + x.mean(2, keepdim=True).expand_as(x)


def one_direction(old: Any) -> Any:
    def init(self, vit):
        old(self, vit)
        vit.norm = OneDirection(vit.embed_dim)

    return init


def head_in_16_bits(old: Any) -> Any:
    return lambda self, tokens, order: old(self, tokens, order).bfloat16().float()


def loss_in_16_bits(old: Any) -> Any:
    return lambda s, x, t=None, gamma=0.0: old(s.bfloat16(), x.bfloat16(), t.bfloat16(), gamma)


class Fault(NamedTuple):
    """The alarm that a fault must raise, the settings it needs, and the object it replaces."""

    alarm: str
    settings: dict[str, Any] = {}  # noqa: RUF012
    target: str = ""
    wrap: Callable[[Any], Any] = lambda old: old
    resumes: bool = False
    "whether the fault begins with a resume"


FAULTS = {
    "the teacher is stale after a resume": Fault(
        "teacher-stale", {}, "rcmae.trainer:load_checkpoint", rebuilt_from_student, resumes=True
    ),
    "momentum 1 from the start": Fault("momentum-one", {"schedule": "constant", "momentum": 1.0}),
    "the half-life is too long": Fault("teacher-drag", {"half_life": "50%"}),
    "the schedule ends too early": Fault(
        "teacher-drag",
        {"schedule": "cosine", "momentum": 0.7},
        "rcmae.methods.rcmae:RCMAE.momentum",
        frozen_early,
    ),
    "the output is constant": Fault("collapse", {}, "rcmae.models.decoder:Decoder.forward", constant_output),
    "the features lie on a line": Fault(
        "collapse", {}, "rcmae.models.encoder:Encoder.__init__", one_direction
    ),
    "the features of MAE lie on a line": Fault(
        "collapse", {"method": "mae"}, "rcmae.models.encoder:Encoder.__init__", one_direction
    ),
    "predictions in 16 bits": Fault(
        "low-precision", {}, "rcmae.models.decoder:Decoder.forward", head_in_16_bits
    ),
    "the losses in 16 bits": Fault(
        "low-precision", {}, "rcmae.methods.rcmae:squared_errors", loss_in_16_bits
    ),
}

# Flags of healthy runs of 100 steps, 16 per epoch; every half-life lies within the bounds of `adaptive`.
HEALTHY = [
    "",
    "--seed 1",
    "--seed 2 --half-life adaptive",
    "--half-life 5%",
    "--seed 3 --half-life 10%",
    "--half-life '2 steps'",
    "--seed 4 --half-life '250 images'",
    "--half-life '0.5 epochs'",
    "--schedule cosine --momentum 0.9",
    "--seed 5 --schedule constant --momentum 0.9",
    "--schedule constant --momentum 0.93 --ema-updates 2",
    "--ema-updates 2 --accumulate 2",
    "--accumulate 4",
    "--teacher-mask different",
    "--seed 6 --teacher-mask different --half-life adaptive --accumulate 2",
    "--precision bf16",
    "--seed 7 --precision bf16 --teacher-mask different --half-life 5%",
    "--precision bf16 --schedule cosine --momentum 0.9 --gamma 0.5",
    "--method mae",
    "--method mae --seed 8 --precision bf16",
]


# --- runs ---------------------------------------------------------------------------------------------------


def fewer_images(old: Any) -> Any:
    def init(self, split="train", count=IMAGES, size=32, seed=0):
        old(self, split, min(count, IMAGES), size, seed)

    return init


def stops_at(step: int) -> Callable[[Any], Any]:
    """Raise SIGTERM after that step."""

    def wrap(old: Any) -> Any:
        def update(run, t):
            applied = old(run, t)
            if t.step + 1 == step:
                signal.raise_signal(signal.SIGTERM)
            return applied

        return update

    return wrap


def pretrain(out: Path, flags: list[str]) -> dict[str, Any]:
    """Run the command; returns its exit code, and the alarms it recorded and printed."""
    fixed = f"--batch-size {BATCH} --device cpu --threads 1 --probes 0 --save-every 1h".split()
    precision = [] if "--precision" in flags else ["--precision", "fp32"]
    printed = io.StringIO()
    with (
        patched("rcmae.data.digits:DigitsSource.__init__", fewer_images),
        contextlib.redirect_stdout(printed),
    ):
        code = command(["pretrain", "bundled", "--out", str(out), *fixed, *precision, *flags])
    messages = [line for line in printed.getvalue().splitlines() if line.startswith("alarm ")]
    recorded = [line for line in read_metrics(out) if line["kind"] == "alarm"]
    return {
        "code": code,
        "raised": [alarm["name"] for alarm in recorded],
        "steps": [alarm["step"] for alarm in recorded],
        "messages": messages,
        "agree": messages == [f"alarm {alarm['name']}: {alarm['text']}" for alarm in recorded],
    }


def run_faulty(name: str, folder: Path) -> dict[str, Any]:
    """The bundled recipe with a fault."""
    fault, out = FAULTS[name], folder / name.replace(" ", "-")
    flags = ["--steps", str(STEPS)]
    flags += [part for k, v in fault.settings.items() for part in ("--" + k.replace("_", "-"), str(v))]
    if fault.resumes:
        with patched("rcmae.pretraining:Pretraining.update", stops_at(STEPS // 2)):
            pretrain(out, flags)
    with patched(fault.target, fault.wrap):
        return {"run": name, "alarm": fault.alarm} | pretrain(out, flags)


def run_healthy(flags: str, folder: Path) -> dict[str, Any]:
    """The bundled recipe with these flags."""
    out = folder / ("healthy" + flags.replace(" ", "").replace("'", "").replace("%", ""))
    name = flags or "the recipe as it is"
    return {"run": name, "alarm": None} | pretrain(out, ["--steps", "100", *shlex.split(flags)])


def correct(row: dict[str, Any]) -> bool:
    """Whether a faulty run raised its alarm once and nothing else, or a healthy run nothing."""
    return row["code"] == 0 and row["agree"] and row["raised"] == ([row["alarm"]] if row["alarm"] else [])


def split(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of faulty and of healthy runs."""
    return [row for row in rows if row["alarm"]], [row for row in rows if not row["alarm"]]


def table(results: dict[str, Any]) -> str:
    """Each fault with its alarm, and how many healthy runs raised one."""
    faulty, healthy = split(results["rows"])
    rows = [
        [
            row["run"],
            ", ".join(row["raised"]),
            f"{', '.join(map(str, row['steps']))} of {results['steps']}",
            row["messages"][0].partition(": ")[2] if row["messages"] else "none",
        ]
        for row in faulty
    ]
    raised = sum(bool(row["raised"]) for row in healthy)
    note = f"Healthy runs that raised an alarm: {raised} of {len(healthy)}."
    return markdown.table(["injected fault", "alarm", "at step", "message"], rows, note, left=(0, 1, 3))


def main() -> int:
    """Make all runs and print one line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs, one thread each")
    parser.add_argument("--only", default="", help="only runs whose name contains this")
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    with (
        tempfile.TemporaryDirectory() as temporary,
        ProcessPoolExecutor(options.jobs, mp.get_context("spawn")) as pool,
    ):
        folder = options.folder or Path(temporary)
        jobs = [pool.submit(run_faulty, name, folder) for name in FAULTS if options.only in name]
        jobs += [pool.submit(run_healthy, flags, folder) for flags in HEALTHY if options.only in flags]
        for job in jobs:
            row = job.result()
            rows.append(row)
            pairs = zip(row["raised"], row["steps"], strict=True)
            raised = ", ".join(f"{name} at step {step}" for name, step in pairs) or "no alarm"
            state, kind = "ok   " if correct(row) else "WRONG", "fault" if row["alarm"] else "healthy"
            print(
                "\n       ".join([f"{state}  {kind}: {row['run']}: {raised}", *row["messages"]]), flush=True
            )
    faulty, healthy = split(rows)
    print(f"{sum(map(correct, faulty))} of {len(faulty)} faults raised their alarm and nothing else")
    print(f"{sum(map(correct, healthy))} of {len(healthy)} healthy runs raised nothing")
    if options.out:
        facts = {
            "rows": rows,
            "steps": STEPS,
            "images": IMAGES,
            "batch": BATCH,
            "machine": describe_machine(torch.device("cpu"), "fp32"),
        }
        options.out.write_text(json.dumps(facts, indent=1) + "\n")
    return int(not all(map(correct, rows)))


if __name__ == "__main__":
    sys.exit(main())
