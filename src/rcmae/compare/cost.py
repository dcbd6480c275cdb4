"""`rcmae compare cost`: what a training step of each method costs, counted without making it.

A step is traced on tensors that have a shape and no values, so any model and batch can be asked of any machine: FLOPs as 2 per
multiplication and addition, bytes that autograd keeps for the backward pass (each storage once), and the largest sum of all that lives at
a time. What a device does beyond it (workspaces of its kernels, fragments of its allocator) is measured by `measure`, on that device.
"""

import contextlib
import multiprocessing as mp
import resource
import statistics
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

from ..config import Recipe, changed
from ..data.dataset import collate
from ..engine.checkpoint import replace_file
from ..engine.optim import adamw
from ..engine.run import describe_machine, write_json
from ..engine.schedules import Progress
from ..errors import ConfigError, OutOfMemoryError
from ..methods import METHODS, Method
from ..methods.recipes import load_recipe
from ..models import blocks
from ..models.autoencoder import build_encoder
from ..report.build import template

PROBES = (4, 8)
"Batch sizes between which the slope of what grows with the batch is taken."

T = Progress(100, 1000, 10)
"A step past warm-ups and freezes."


@dataclass(frozen=True)
class Cost:
    """Of one recipe: weights, and per image FLOPs and bytes."""

    method: str
    model: str
    trained: int
    "weights that the optimizer moves"
    frozen: int
    "weights that it does not: the teacher's, fixed positions"
    student_forward: float
    teacher_forward: float
    backward: float
    "FLOPs an image"
    saved: float
    "bytes an image that autograd keeps"
    static: int
    "bytes of weights, gradients, both moments and the teacher, in float32"

    @property
    def flops(self) -> float:
        """FLOPs an image of all three."""
        return self.student_forward + self.teacher_forward + self.backward


def cost(recipe: Recipe, precision: str = "bf16") -> Cost:
    """Count one recipe's step."""
    (few, many) = (_count(recipe, batch, precision) for batch in PROBES)
    slope = {k: (many[k] - few[k]) / (PROBES[1] - PROBES[0]) for k in ("student_forward", "teacher_forward", "backward", "saved")}
    trained, frozen = few["trained"], few["frozen"]
    return Cost(recipe.method, recipe.network.model, trained, frozen, **slope, static=16 * trained + 4 * frozen)


def peak(recipe: Recipe, batch: int, precision: str = "bf16", like: str = "cuda") -> int:
    """Bytes at the worst moment of a step at that batch, the optimizer's state being there; `like` chooses the attention kernel."""
    with _traced(recipe, batch, like) as (method, views):
        optimizer = adamw(method.student, recipe.optim, 1e-3)
        live = _Live([*method.parameters(), *method.buffers(), *views.values()])
        with live:
            for _ in range(2):  # the optimizer's state is made in the first
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    loss = method(views, T)["loss"]
                loss.backward()
                del loss
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return live.worst


def largest_batch(recipe: Recipe, bytes_: int, precision: str = "bf16") -> int:
    """The most images whose step stays below so many bytes; 0 if not even one (two for a method that compares images) does."""
    few, many = (peak(recipe, batch, precision) for batch in (64, 128))  # where activations outweigh gradients and moments
    batch = int((bytes_ - few) / ((many - few) / 64) + 64)
    while batch > 1 and peak(recipe, batch, precision) > bytes_:
        batch -= max(1, batch // 64)
    return max(batch, 0) if batch > 1 or peak(recipe, 2, precision) <= bytes_ else 0


@dataclass(frozen=True)
class Measured:
    """What a device did: bytes at the worst moment beyond what was there before, and images a second (median)."""

    peak: int
    images_per_second: float


def measure(recipe: Recipe, batch: int, device: str, precision: str, steps: int = 4) -> Measured:
    """Real steps of random images in a process of its own, so that each starts from the same memory."""
    context = mp.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(_measure, recipe, batch, device, precision, steps, torch.get_num_threads()).result()
    except (torch.OutOfMemoryError, MemoryError, BrokenProcessPool) as e:
        advice = "give a smaller --measured-batch, or fewer --methods"
        raise OutOfMemoryError(f"{recipe.method} on {recipe.network.model} ran out of memory at a batch of {batch}; {advice}") from e


def _measure(recipe: Recipe, batch: int, name: str, precision: str, steps: int, threads: int) -> Measured:
    torch.set_num_threads(threads)
    device = torch.device(name)
    channels = recipe.images.channels
    # The kernels load their libraries, and a first product its workspace, before anything is counted.
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        F.linear(torch.randn(8, 8, device=device, requires_grad=True), torch.randn(8, 8, device=device)).sum().backward()
    before = _resident() if device.type == "cpu" else torch.cuda.memory_allocated(device)
    method = METHODS[recipe.method](changed(recipe, batch_size=batch), (0.5,) * channels, (0.25,) * channels).to(device)
    image = np.random.default_rng(0).integers(0, 256, (*recipe.images.shape, channels), dtype=np.uint8)
    views = collate([method.views()(image, np.random.default_rng(i)) | {"bad": []} for i in range(batch)])
    views.pop("bad")
    views = {k: v.to(device) for k, v in views.items()}
    optimizer, one, times = adamw(method.student, recipe.optim, 1e-4), torch.ones((), device=device), []
    for _ in range(steps):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = method(views, T)["loss"]
        loss.backward()
        method.before_step(T, one)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(T, one)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    worst = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if device.type == "cpu" else torch.cuda.max_memory_allocated(device)
    return Measured(worst - before, batch / statistics.median(times[1:]))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# --- tracing ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _traced(recipe: Recipe, batch: int, like: str = "cuda") -> Iterator[tuple[Method, dict[str, Tensor]]]:
    """The method and a batch of its own views, made of shapes alone; attention by the fused kernel, unless `like` is the CPU."""
    recipe = changed(recipe, batch_size=batch)
    channels = recipe.images.channels
    with torch.device("meta"):
        method = METHODS[recipe.method](recipe, (0.5,) * channels, (0.25,) * channels)
    attend = blocks.attend if like == "cpu" else F.scaled_dot_product_attention
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, mock.patch.object(blocks, "attend", attend):
        method.to_empty(device="cpu")
        method.average_shapes(batch)
        yield method, _views(method, recipe, batch, mode)


def _views(method: Method, recipe: Recipe, batch: int, mode: FakeTensorMode) -> dict[str, Tensor]:
    with unset_fake_temporarily():
        image = np.zeros((*recipe.images.shape, recipe.images.channels), np.uint8)
        sample = method.views()(image, np.random.default_rng(0)) | {"bad": []}
        real = collate([sample])
    real.pop("bad")
    return {k: mode.from_tensor(v).expand(batch, *v.shape[1:]).clone() for k, v in real.items()}


def _count(recipe: Recipe, batch: int, precision: str) -> dict[str, Any]:
    with _traced(recipe, batch) as (method, views):
        counter, kept = _Phases(), _Kept({p.untyped_storage()._cdata for p in method.parameters()})
        if method.teacher is not None:
            counter.watch(method.teacher)
        with counter, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            with saved_tensors_hooks(kept.pack, lambda t: t):
                loss = method(views, T)["loss"]
            counter.phase = "backward"
            loss.backward()
        trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
        every = sum(p.numel() for p in method.parameters()) + sum(b.numel() for b in method.buffers())
        return counter.flops | {"saved": kept.bytes, "trained": trained, "frozen": every - trained}


def _convolution_backward_flops(grad: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Of a convolution's backward pass: each gradient that is asked for costs what the forward pass does.

    torch's own formula takes the gradient of grouped weights for that of dense ones.
    """
    return sum(rest[-1][:2]) * conv_flop_count(list(x), list(weight), list(grad))


class _Phases(FlopCounterMode):
    """FLOPs by phase: the teacher's forward is what runs inside one of its modules."""

    def __init__(self) -> None:
        aten = torch.ops.aten  # torch counts the fused kernels of CUDA only
        forward, backward = aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward
        own = {forward: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
        own |= {backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)}
        own |= {aten.convolution_backward: _convolution_backward_flops}
        super().__init__(display=False, custom_mapping=own)
        self.phase = "forward"
        self.flops = dict.fromkeys(("student_forward", "teacher_forward", "backward"), 0)
        self.before = self.inside = 0

    def watch(self, teacher: nn.Module) -> None:
        """Tell this module's work from the rest."""

        def step(by: int) -> Any:
            def hook(*_: Any) -> None:
                self.inside += by

            return hook

        for module in teacher.modules():
            module.register_forward_pre_hook(step(1))
            module.register_forward_hook(step(-1))

    def _count_flops(self, func_packet, out, args, kwargs):
        result = super()._count_flops(func_packet, out, args, kwargs)
        total = self.get_total_flops()
        phase = self.phase if self.phase == "backward" else "teacher_forward" if self.inside else "student_forward"
        self.flops[phase] += total - self.before
        self.before = total
        return result


class _Live(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most there ever were."""

    def __init__(self, there: list[Tensor]):
        super().__init__()
        self.known: dict[int, weakref.ref] = {}
        self.now = self.worst = 0
        for t in there:
            self.see(t)

    def see(self, t: Any) -> None:
        if not isinstance(t, Tensor):
            return
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.ref(storage, lambda _: self.gone(key, size))
            self.now += size
            self.worst = max(self.worst, self.now)

    def gone(self, key: int, size: int) -> None:
        del self.known[key]
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map(self.see, out)
        return out


class _Kept:
    """Bytes of the storages that autograd keeps, each counted once, without the weights."""

    def __init__(self, own: set[int]):
        self.seen, self.bytes = own, 0
        self.alive: list[Any] = []

    def pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.alive.append(storage)  # or its name is given to another one
            self.bytes += storage.nbytes()
        return t


# --- all methods side by side -----------------------------------------------------------------------------------------


def recipes(model: str, names: Sequence[str]) -> dict[str, Recipe]:
    """A row's name -> its recipe: the settings of each reference code for ViT-S up to its width, else for ViT-B, at this model.

    Behind a method stand its variants. Raises ConfigError that names all methods that cannot work with the model.
    """
    plain = load_recipe(f"{names[0]}-vitb16-in1k")
    with torch.device("meta"):
        width = build_encoder(plain.images, changed(plain, model=model).network).width
    size = "s" if width <= 384 else "b"
    found = {name: changed(load_recipe(f"{name}-vit{size}16-in1k"), model=model) for name in names}
    if model not in ("vit_small_patch16", "vit_base_patch16"):
        found = {name: changed(recipe, heads=None) for name, recipe in found.items()}
    rows = {}
    for name, recipe in found.items():
        rows[name] = recipe
        rows |= {variant.name: changed(recipe, **variant.settings) for variant in METHODS[name].variants}
    if problems := [text for recipe in found.values() for text in METHODS[recipe.method].problems(recipe)]:
        raise ConfigError(f"{model}: {'; '.join(problems)}; leave them out with --methods")
    return rows


def study(
    models: Sequence[str], names: Sequence[str] = tuple(METHODS), *, batch: int = 128, precision: str = "bf16",
    device: str | None = None, measured_batch: int = 16, fit: float | None = None, say=lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Rows of plain numbers for every model and method; ratios are to the first row of a model.

    `device` asks for measurements there too, at `measured_batch` images; `fit` for the largest batch within so many GiB.
    """
    if device and torch.device(device).type not in ("cpu", "cuda"):
        raise ConfigError(f"memory is measured on cpu and cuda only, not on {device}")
    rows: list[dict[str, Any]] = []
    for model, methods in {model: recipes(model, names) for model in models}.items():
        first: Cost | None = None
        for name, recipe in methods.items():
            say(f"{model}: {name}")
            c = cost(recipe, precision)
            first = first or c
            row = asdict(c) | {"name": name, "flops": c.flops, "flops_ratio": c.flops / first.flops, "saved_ratio": c.saved / first.saved}
            row["peak"] = peak(recipe, batch, precision)
            if fit:
                row["fits"] = largest_batch(recipe, int(fit * 2**30), precision)
            if device:
                m = measure(recipe, measured_batch, device, precision)
                predicted = peak(recipe, measured_batch, precision, like=device)
                row |= {"measured_peak": m.peak, "predicted_there": predicted, "images_per_second": m.images_per_second}
            rows.append(row)
    about = {
        "batch": batch,
        "precision": precision,
        "device": device,
        "measured_batch": measured_batch,
        "fit": fit,
        "first": next(iter(names)),
        "models": list(models),
    }
    return {"about": about, "rows": rows, "machine": describe_machine(torch.device(device or "cpu"), precision)}


def write_page(found: dict[str, Any], out: Path) -> Path:
    """Write cost.json and cost.html; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "cost.json", found)
    names = {row["name"] for row in found["rows"]}
    notes = [variant.note for method in METHODS.values() for variant in method.variants if variant.name in names]
    ours = load_recipe("embedded").method
    page = template("cost.html.j2", "rcmae.compare").render(title="What a training step costs", notes=notes, ours=ours, **found)
    replace_file(out / "cost.html", page)
    return out / "cost.html"
