"""The end of `rcmae check`: the command for these images on this machine, with its time, memory and disk.

A step and the reading of images are measured, checkpoints are counted. Only other recipes are extrapolated,
from the floating-point operations per image.
"""

import itertools
import shlex
import tempfile
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .compare.cost import cost
from .config import Recipe, RuntimeConfig, flat, how_many, readable_size
from .data import decode
from .data.base import Source
from .data.decode import BadImage
from .data.layout import part_of
from .data.loader import processes
from .data.pack import Encoder
from .data.pixels import open_image
from .data.views import rng
from .engine.console import Screen, clock
from .engine.distributed import World, pick_device
from .engine.run import ADVICE, RunContext, keep_freed_memory, memory_gib, translate_errors
from .methods.recipes import load_recipe
from .pretraining import Pretraining
from .step_time import measure_step
from .tasks.finetune_recipe import SMALL

TINY = 48
"Median of the images' shorter sides, in pixels, below which crops of 32 px are enough."

TIMES = {"cpu": 1500.0, "cuda": 28800.0}
"""Seconds of the suggested run, if the images bear so long a one: with `check` and `pack`, half an hour; a
night."""

SHORTEST = 20
"Epochs of the suggested run, even if they take longer."

LONGER = (2, 4, 8)
"Other lengths, as multiples of the suggested one."

SAMPLED = 48
"Images read to compare originals with packed ones."

WORTHWHILE = 1.25
"The speed-up from which on packing is suggested."


@dataclass(frozen=True)
class Plan:
    """A suggested run."""

    command: str
    size: tuple[int, int]
    patch: int
    steps: int
    batch: int
    epochs: float
    images_per_second: float
    seconds: float
    memory: int
    "bytes at the peak"
    disk: int
    "bytes"
    longer: dict[int, float]
    "seconds of longer runs, by their number of steps"
    pack: str
    "the command that makes the run faster, if it is worthwhile"
    packed_bytes: int
    packed_seconds: float
    "of the run on the packed images, with packing"
    folder_seconds: float
    "of as many steps of the recipe `folder`; 0 unless the recipe is `small`"


def suggested(shorter_side: int) -> tuple[str, dict[str, int]]:
    """The recipe and its settings for images of which half have a side shorter than `shorter_side` pixels."""
    small = pick_device("auto").type == "cpu" or shorter_side < SMALL
    return "small" if small else "folder", {"size": 32, "patch": 4} if shorter_side < TINY else {}


def plan(
    name: str, recipe: Recipe, images: Source, screen: Screen, runtime: RuntimeConfig = RuntimeConfig()
) -> Plan:
    """Measure a run of `recipe`, which `name` loads, on its images.

    Raises the errors of a run.
    """
    device = pick_device("auto")
    if device.type == "cpu":
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder, translate_errors(device, World(), ADVICE):
        context = RunContext(Path(folder), runtime, device, World(), Screen(False))
        with closing(Pretraining(recipe, context, images)) as run:
            run.screen = screen
            step = measure_step(run)
            waiting = _waiting(run)
            memory = round(2**30 * memory_gib(device))
            probing = _probing(run)
            original, packed, size = _reading(run)
            disk = _disk(run)
            patch = run.method.backbone("student").vit.patch_embed.patch_size[0]
    count, batch = len(images), run.batch_size

    def seconds(steps: int, step: float = step) -> float:
        return steps * step + probing

    most = recipe.most_steps(count)
    fixed = recipe.steps or (recipe.epochs and recipe.total_steps(count))
    fitting = int((TIMES.get(device.type, TIMES["cuda"]) - probing) / step)
    steps = fixed or _rounded(max(SHORTEST * run.steps_per_epoch, min(most, fitting)))
    longer = {} if fixed else {n * steps: seconds(n * steps) for n in LONGER if n * steps <= most}
    workers = max(1, processes(images, None))
    faster = _packed_step(step, batch * original, batch * packed, waiting, workers, device.type == "cpu")
    packing = count * (original + packed) / (workers + 1)
    pays = step > WORTHWHILE * faster and packing + seconds(steps, faster) < seconds(steps)
    side = packed_side(recipe)
    target = _unused(Path(f"{_label(recipe.data)}-{side}"))
    other = 0.0
    if name == "small":
        larger = load_recipe("folder")
        per_image = cost(larger).flops / cost(recipe).flops
        other = steps * step * per_image * larger.optim.batch_size / batch
    return Plan(
        command=_command(name, recipe, runtime, steps),
        size=recipe.images.shape,
        patch=patch,
        steps=steps,
        batch=batch,
        epochs=steps / run.steps_per_epoch,
        images_per_second=batch / step,
        seconds=seconds(steps),
        memory=memory,
        disk=disk,
        longer=longer,
        pack=f"rcmae pack {shlex.quote(recipe.data)} {shlex.quote(target)} --size {side}" if pays else "",
        packed_bytes=round(size * count),
        packed_seconds=packing + seconds(steps, faster),
        folder_seconds=other,
    )


def _packed_step(
    step: float, original: float, packed: float, waiting: float, workers: int, shared: bool
) -> float:
    """Seconds of a step on packed images. Given are those of a step on the originals, the fraction of it that
    is waiting, and those of one process to read a batch. Reading and training share the cores, or the slower
    of the two sets the speed."""
    if shared:
        return max(step - (original - packed) / (workers + 1), packed / (workers + 1))
    return min(step, max(step * (1 - waiting), packed / workers))


def _rounded(steps: int) -> int:
    """Steps to two digits, downwards."""
    digits = 10 ** max(0, len(str(steps)) - 2)
    return steps // digits * digits


def packed_side(recipe: Recipe) -> int:
    """The shorter side of packed images: twice the crop, so that crops of a quarter of the area are sharp."""
    return 2 * max(recipe.images.shape)


def _label(data: str) -> str:
    """A name for what is made of the data, in a command: for a part of a set, such as train, with the name of
    the set."""
    path = Path(data)
    path = path.resolve() if path.is_dir() else path.with_suffix("")
    parts = [path.parent.name, path.name] if part_of(path.name) else [path.name]
    return "-".join(parts).lstrip("-") or "mine"


def _unused(folder: Path) -> str:
    """The folder, or with a number where it exists."""
    names = (folder.with_name(f"{folder.name}-{n}") for n in itertools.count(2))
    return str(folder if not folder.exists() else next(name for name in names if not name.exists()))


def _command(name: str, recipe: Recipe, runtime: RuntimeConfig, steps: int) -> str:
    """The command that makes the run."""
    shipped = flat(load_recipe(name)) | flat(RuntimeConfig())
    elsewhere = ("data", "out", "steps", "epochs", "time")
    out = _unused(Path("runs") / _label(recipe.data))
    words = ["rcmae", "pretrain", name, "--data", recipe.data, "--out", out]
    for key, value in (flat(recipe) | flat(runtime)).items():
        if value != shipped.get(key) and key not in elsewhere:
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{key.replace('_', '-')}", *map(str, values)]
    return shlex.join([*words, "--steps", str(steps)])


def _waiting(run: Pretraining) -> float:
    """The fraction of the measured steps' time in which they waited for images."""
    return run.window.read()["data_wait"]


@torch.no_grad()
def _probing(run: Pretraining) -> float:
    """Seconds of all probes: the forward passes are measured, and fitting is taken to last as long."""
    probe, backbone = run.recipe.probe, run.method.backbone("student")
    if run.images.labels is None or not probe.probes:
        return 0.0
    batch = torch.rand(64, backbone.channels, *backbone.shape, device=run.device)
    backbone.eval()(batch)  # the first pass is slower
    began = time.monotonic()
    float(backbone(batch).mean.sum())
    images = min(probe.probe_train + probe.probe_test, len(run.images))
    networks = 1 + probe.probes * len(run.method.networks)
    return 2 * networks * images * (time.monotonic() - began) / len(batch)


def _reading(run: Pretraining) -> tuple[float, float, float]:
    """Seconds of one process to read and crop an image, the same packed, and its bytes when packed; zeros for
    images that cannot be packed smaller."""
    source, view, channels = run.images, run.method.views(), run.recipe.images.channels
    if channels not in (1, 3):
        return 0.0, 0.0, 0.0
    encoder = Encoder([source], packed_side(run.recipe), channels)
    seconds: list[float] = []
    packed: list[float] = []
    sizes: list[int] = []
    chosen = np.random.Generator(np.random.Philox(key=0)).permutation(len(source))[:SAMPLED]
    with run.screen.progress("measuring how long images take to read", len(chosen)) as tick:
        for done, i in enumerate(map(int, chosen), 1):
            tick(done)
            result = encoder[0, i]
            if isinstance(result, BadImage):
                continue
            with suppress(BadImage):  # some readers refuse 16-bit images that others keep
                began = time.process_time()
                view(open_image(source, i, channels), rng(0, 0, i))
                between = time.process_time()
                view(decode.open_image(result[1], channels, bits=source.bits or 16), rng(0, 0, i))
                packed.append(time.process_time() - between)
                seconds.append(between - began)
                sizes.append(len(result[1]))
    if not sizes:
        return 0.0, 0.0, 0.0
    return float(np.mean(seconds)), float(np.mean(packed)), float(np.mean(sizes))


def _disk(run: Pretraining) -> int:
    """Bytes of the checkpoints that exist at once, and of the exported backbones."""
    weights = sum(value.nbytes for value in run.model.state_dict().values())
    moments = 8 * sum(p.numel() for p in run.method.student.parameters())
    exported = sum(p.nbytes for backbone in run.backbones().values() for p in backbone.parameters())
    return (run.runtime.keep + 1) * (weights + moments) + exported


def lines(plan: Plan) -> list[str]:
    """The plan in lines of text, which end with the command."""
    height, width = plan.size
    text = [
        f"The command for these images on this machine: {how_many(plan.steps, 'step')} of "
        f"{how_many(plan.batch, 'image')} ({plan.epochs:,.0f} epochs), crops of {width} x {height}, patches "
        f"of {plan.patch}; about {clock(plan.seconds)} at {plan.images_per_second:,.0f} images/s, "
        f"{readable_size(plan.memory)} of memory and {readable_size(plan.disk)} of disk.",
        f"  {plan.command}",
    ]
    if plan.longer:
        times = [f"--steps {steps} {clock(seconds)}" for steps, seconds in plan.longer.items()]
        text.append(f"Longer runs: {', '.join(times)}.")
    if plan.pack:
        text.append(
            f"Reading the images takes much of this time. The same run takes about "
            f"{clock(plan.packed_seconds)}, with packing, if they are packed first into "
            f"{readable_size(plan.packed_bytes)}; give the new folder as --data then:"
        )
        text.append(f"  {plan.pack}")
    if plan.folder_seconds:
        text.append(
            "The recipe folder, which is for a GPU, would take about "
            f"{clock(plan.folder_seconds)} here for as many steps."
        )
    return text
