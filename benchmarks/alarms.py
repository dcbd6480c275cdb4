"""Does each fault of a teacher call its own alarm, and a healthy run none? `python -m benchmarks.alarms [--jobs 2] [--out FILE]`.

Every fault is put into the code (or asked for by a flag) and the embedded recipe is run for a few steps through the command
line; then twenty healthy runs of 100 steps. Batches of 32 from the first 512 images of the embedded set, so that a short run has
epochs and all of it takes minutes.
Exit code 0 only if each fault called its own alarm and nothing else, and no healthy run called any.
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing as mp
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rcmae.engine.metrics import read_metrics
from rcmae.engine.run import describe_machine

IMAGES, BATCH = 512, 32
STEPS = 64
"Optimizer steps of a run with a fault: four epochs."


@contextlib.contextmanager
def broken(place: str, wrong: Callable[[Any], Any]) -> Iterator[None]:
    """Within it, the object at "module:Class.name" is wrong(object); "" breaks nothing."""
    if not place:
        yield
        return
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    right = getattr(owner, name)
    setattr(owner, name, wrong(right))
    try:
        yield
    finally:
        setattr(owner, name, right)


# --- the faults -------------------------------------------------------------------------------------------------------


def never(old: Any) -> Any:
    return lambda self, student, momentum, applied=None: None


def once_a_micro_batch(old: Any) -> Any:
    """As the released code does at two micro-batches a step: the first update is towards the student before the step."""

    def before_step(self, t, applied):
        self.teacher.update(self.student, self.momentum(t), applied)

    return before_step


def rebuilt_from_student(old: Any) -> Any:
    def load(path, method, optimizer):
        state = old(path, method, optimizer)
        method.teacher.model.load_state_dict(method.student.state_dict())
        return state

    return load


class TokenNorm(nn.BatchNorm1d):
    """A norm with running statistics in place of the decoder's LayerNorm: buffers that a teacher must follow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def running_statistics(old: Any) -> Any:
    def init(self, **sizes):
        old(self, **sizes)
        self.norm = TokenNorm(sizes["width"])

    return init


def not_in_evaluation_mode(old: Any) -> Any:
    def init(self, student):
        old(self, student)
        self.model.train()

    return init


def frozen_early(old: Any) -> Any:
    """A schedule in the wrong unit: it is at its end, 1, after a quarter of the run."""

    def momentum(self, t):
        return old(self, type(t)(min(4 * t.step, t.total_steps), t.total_steps, t.steps_per_epoch))

    return momentum


def of_the_epoch(old: Any) -> Any:
    """The slip of the released code: the schedule is asked for the step within the epoch."""

    def momentum(self, t):
        return old(self, type(t)(t.step % t.steps_per_epoch, t.total_steps, t.steps_per_epoch))

    return momentum


def constant_output(old: Any) -> Any:
    def forward(self, tokens, order):
        x = old(self, tokens, order)
        return x.mean((0, 1), keepdim=True).expand_as(x)

    return forward


class OneDirection(nn.LayerNorm):
    """All that leaves the encoder lies on a line."""

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
    """A fault, the alarm it must call, the settings it needs, and what it replaces."""

    alarm: str
    settings: dict[str, Any] = {}  # noqa: RUF012
    place: str = ""
    wrong: Callable[[Any], Any] = lambda old: old
    accumulate: int = 1
    resumes: bool = False
    "the fault is there from a resume on"


FAULTS = {
    "the teacher never moves": Fault("teacher-still", {}, "rcmae.models.teacher:Teacher.update", never),
    "the teacher moves twice a step": Fault(
        "teacher-moves-twice", {}, "rcmae.methods.rcmae:RCMAE.before_step", once_a_micro_batch, accumulate=2
    ),
    "the teacher is stale after a resume": Fault("teacher-stale", {}, "rcmae.trainer:load_checkpoint", rebuilt_from_student, resumes=True),
    "momentum 1 from the start": Fault("momentum-one", {"schedule": "constant", "momentum": 1.0}),
    "a buffer is missed": Fault("buffer-missed", {}, "rcmae.models.decoder:Decoder.__init__", running_statistics),
    "the teacher is in training mode": Fault("teacher-training", {}, "rcmae.models.teacher:Teacher.__init__", not_in_evaluation_mode),
    "the half-life is too long": Fault("teacher-drag", {"half_life": "50%"}),
    "the schedule ends too early": Fault(
        "teacher-drag", {"schedule": "cosine", "momentum": 0.7}, "rcmae.methods.rcmae:RCMAE.momentum", frozen_early
    ),
    "the schedule never leaves its first epoch": Fault(
        "schedule-stuck", {"schedule": "cosine", "momentum": 0.7}, "rcmae.methods.rcmae:RCMAE.momentum", of_the_epoch
    ),
    "the output is constant": Fault("collapse", {}, "rcmae.models.decoder:Decoder.forward", constant_output),
    "the features lie on a line": Fault("collapse", {}, "rcmae.models.encoder:Encoder.__init__", one_direction),
    "the features of MAE lie on a line": Fault("collapse", {"method": "mae"}, "rcmae.models.encoder:Encoder.__init__", one_direction),
    "predictions in 16 bits": Fault("low-precision", {}, "rcmae.models.decoder:Decoder.forward", head_in_16_bits),
    "the losses in 16 bits": Fault("low-precision", {}, "rcmae.methods.rcmae:squared_errors", loss_in_16_bits),
}

# Flags of healthy runs of 100 steps, 16 an epoch; every half-life lies within the bounds of `auto`.
HEALTHY = [
    "", "--seed 1", "--seed 2 --half-life auto", "--half-life 5%", "--seed 3 --half-life 10%", "--half-life '2 steps'",
    "--seed 4 --half-life '250 images'", "--half-life '0.5 epochs'", "--schedule cosine --momentum 0.9",
    "--seed 5 --schedule constant --momentum 0.9", "--schedule constant --momentum 0.93 --ema-updates 2", "--ema-updates 2 --accumulate 2",
    "--accumulate 4", "--teacher-mask different", "--seed 6 --teacher-mask different --half-life auto --accumulate 2",
    "--precision bf16", "--seed 7 --precision bf16 --teacher-mask different --half-life 5%",
    "--precision bf16 --schedule cosine --momentum 0.9 --gamma 0.5", "--method mae", "--method mae --seed 8 --precision bf16",
]  # fmt: skip


# --- runs -------------------------------------------------------------------------------------------------------------


def fewer_images(old: Any) -> Any:
    def init(self, split="train", count=IMAGES, size=32, seed=0):
        old(self, split, min(count, IMAGES), size, seed)

    return init


def stops_at(step: int) -> Callable[[Any], Any]:
    """A signal arrives when that step is made."""

    def wrong(old):
        def update(run, t):
            applied = old(run, t)
            if t.step + 1 == step:
                signal.raise_signal(signal.SIGTERM)
            return applied

        return update

    return wrong


def pretrain(out: Path, flags: list[str]) -> tuple[int, list[str]]:
    """The command's exit code and the alarms it printed."""
    from rcmae.cli import main

    printed = io.StringIO()
    own = ["--batch-size", str(BATCH), "--device", "cpu", "--threads", "1", "--probes", "0", "--save-every", "1h"]
    precision = [] if "--precision" in flags else ["--precision", "fp32"]
    with broken("rcmae.data.digits:DigitsSource.__init__", fewer_images), contextlib.redirect_stdout(printed):
        code = main(["pretrain", "embedded", "--out", str(out), *own, *precision, *flags])
    return code, [line for line in printed.getvalue().splitlines() if line.startswith("alarm ")]


def suffer(name: str, folder: Path) -> dict[str, Any]:
    """The embedded recipe under a fault."""
    fault, out = FAULTS[name], folder / name.replace(" ", "-")
    flags = ["--steps", str(STEPS), "--accumulate", str(fault.accumulate)]
    flags += [part for k, v in fault.settings.items() for part in ("--" + k.replace("_", "-"), str(v))]
    if fault.resumes:
        with broken("rcmae.pretraining:Pretraining.update", stops_at(STEPS // 2)):
            pretrain(out, flags)
    with broken(fault.place, fault.wrong):
        code, lines = pretrain(out, flags)
    return {"run": name, "alarm": fault.alarm} | found(out, code, lines)


def live(flags: str, folder: Path) -> dict[str, Any]:
    """A healthy run."""
    import shlex

    out = folder / ("healthy" + flags.replace(" ", "").replace("'", "").replace("%", ""))
    code, lines = pretrain(out, ["--steps", "100", *shlex.split(flags)])
    return {"run": flags or "the recipe as it is", "alarm": None} | found(out, code, lines)


def found(out: Path, code: int, lines: list[str]) -> dict[str, Any]:
    """What a run said, and whether terminal and record say the same."""
    recorded = [line for line in read_metrics(out) if line["kind"] == "alarm"]
    agree = lines == [f"alarm {a['name']}: {a['text']}" for a in recorded]
    return {"code": code, "called": [a["name"] for a in recorded], "steps": [a["step"] for a in recorded], "lines": lines, "agree": agree}


def right(row: dict[str, Any]) -> bool:
    """Its own alarm once and nothing else; for a healthy run, nothing."""
    return row["code"] == 0 and row["agree"] and row["called"] == ([row["alarm"]] if row["alarm"] else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--only", default="", help="only runs whose name holds this")
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    with (
        tempfile.TemporaryDirectory() as temporary,
        ProcessPoolExecutor(options.jobs, mp.get_context("spawn")) as pool,
    ):
        folder = options.folder or Path(temporary)
        jobs = [pool.submit(suffer, name, folder) for name in FAULTS if options.only in name]
        jobs += [pool.submit(live, flags, folder) for flags in HEALTHY if options.only in flags]
        for job in jobs:
            row = job.result()
            rows.append(row)
            called = ", ".join(f"{name} at step {step}" for name, step in zip(row["called"], row["steps"], strict=True)) or "no alarm"
            print(f"{'right' if right(row) else 'WRONG'}  {'fault' if row['alarm'] else 'healthy'}: {row['run']}: {called}", flush=True)
            print(*(f"       {line}" for line in row["lines"]), sep="\n", end="\n" if row["lines"] else "", flush=True)
    faults, healthy = ([row for row in rows if bool(row["alarm"]) == kind] for kind in (True, False))
    print(f"{sum(map(right, faults))} of {len(faults)} faults called their own alarm and nothing else")
    print(f"{sum(map(right, healthy))} of {len(healthy)} healthy runs called nothing")
    if options.out:
        facts = {"rows": rows, "steps": STEPS, "images": IMAGES, "batch": BATCH, "machine": describe_machine(torch.device("cpu"), "fp32")}
        options.out.write_text(json.dumps(facts, indent=1) + "\n")
    return int(not all(map(right, rows)))


if __name__ == "__main__":
    sys.exit(main())
