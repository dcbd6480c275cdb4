"""`rcmae compare cost`: the cost of a training step of each method, counted without executing it.

A step is traced on tensors that have a shape but no data, so any model and batch can be counted on any
computer: FLOPs as 2 per multiply-add, bytes that autograd saves for the backward pass (each storage once),
and the peak of all live storages. `measure` measures a real step on a device, with the workspaces of its
kernels and the fragmentation of its allocator.
"""

import contextlib
import multiprocessing as mp
import resource
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
import torch._meta_registrations
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.data import default_collate
from torch.utils.flop_counter import (
    conv_flop_count,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

from ..config import Recipe, changed
from ..engine import signals
from ..engine.distributed import autocast
from ..engine.optim import adamw
from ..engine.run import describe_machine, memory_gib
from ..engine.schedules import Progress
from ..errors import ConfigError, OutOfMemoryError
from ..methods import METHODS, Method
from ..methods.recipes import load_recipe
from ..models import blocks
from ..models.autoencoder import build_encoder
from ..report.build import write_page

COUNTED_BATCHES = (4, 8)
"Two batch sizes, whose difference gives the cost per image."

CPU, META = torch.device("cpu"), torch.device("meta")

MID_RUN = Progress(100, 1000, 10)
"A step past warm-ups and freezes."


@dataclass(frozen=True)
class Cost:
    """The cost of one recipe: parameters, and FLOPs and bytes per image."""

    method: str
    model: str
    trained: int
    "parameters that the optimizer updates"
    frozen: int
    "other parameters and buffers: the teacher's, fixed positions"
    student_forward: float
    teacher_forward: float
    backward: float
    "FLOPs per image"
    saved: float
    "bytes per image of the activations that autograd saves"
    state: int
    "bytes of model and optimizer state: parameters, gradients, both moments and the teacher, in float32"

    @property
    def flops(self) -> float:
        """FLOPs per image of all three passes."""
        return self.student_forward + self.teacher_forward + self.backward


def cost(recipe: Recipe, precision: str = "bf16") -> Cost:
    small, large = (_count(recipe, batch, precision) for batch in COUNTED_BATCHES)
    slope = {
        key: (large[key] - small[key]) / (COUNTED_BATCHES[1] - COUNTED_BATCHES[0])
        for key in ("student_forward", "teacher_forward", "backward", "saved")
    }
    trained, frozen = small["trained"], small["frozen"]
    state = 16 * trained + 4 * frozen
    return Cost(recipe.method, recipe.network.model, trained, frozen, **slope, state=state)


def peak(recipe: Recipe, batch: int, precision: str, like: str = "cuda") -> int:
    """Peak bytes of a step at that batch, with the optimizer's state; with the attention kernel of a device
    like `like`."""
    with _traced(recipe, batch, like) as (method, views):
        optimizer = adamw(method.student, recipe.optim, 1e-3)
        live = _LiveBytes([*method.parameters(), *method.buffers(), *views.values()])
        with live:
            for _ in range(2):  # the first step creates the optimizer's state
                with autocast(CPU, precision):
                    loss = method(views, MID_RUN)["loss"]
                loss.backward()
                del loss
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return live.peak


def largest_batch(recipe: Recipe, bytes_: int, precision: str) -> int:
    """The largest batch whose step needs at most so many bytes; 0 if none does."""
    # Batches large enough for activations to outweigh gradients and moments.
    small, large = (peak(recipe, batch, precision) for batch in (64, 128))
    batch = int((bytes_ - small) / ((large - small) / 64) + 64)
    while batch > 1 and peak(recipe, batch, precision) > bytes_:
        batch -= max(1, batch // 64)
    return max(batch, 0) if batch > 1 or peak(recipe, 2, precision) <= bytes_ else 0


def measure(recipe: Recipe, batch: int, device: str, precision: str, steps: int = 4) -> tuple[int, float]:
    """Peak bytes on a device beyond those before the model was built, and median images per second, of real
    steps on random images, in a new process so that each recipe starts from the same memory."""
    context = mp.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(
                _measure, recipe, batch, device, precision, steps, torch.get_num_threads()
            ).result()
    except (torch.OutOfMemoryError, MemoryError, BrokenProcessPool) as e:
        advice = "use a smaller --measured-batch, or fewer --methods"
        raise OutOfMemoryError(
            f"{recipe.method} on {recipe.network.model} ran out of memory at a batch of {batch}; {advice}"
        ) from e


def _measure(
    recipe: Recipe, batch: int, name: str, precision: str, steps: int, threads: int
) -> tuple[int, float]:
    torch.set_num_threads(threads)
    device = torch.device(name)
    channels = recipe.images.channels
    # A first matrix product loads the libraries and allocates the workspace, which should not count.
    with autocast(device, precision):
        F.linear(
            torch.randn(8, 8, device=device, requires_grad=True), torch.randn(8, 8, device=device)
        ).sum().backward()
    before = _resident() if device.type == "cpu" else torch.cuda.memory_allocated(device)
    method = _method(recipe, batch).to(device)
    image = np.random.default_rng(0).integers(0, 256, (*recipe.images.shape, channels), dtype=np.uint8)
    views = default_collate([method.views()(image, np.random.default_rng(i)) for i in range(batch)])
    views = {k: v.to(device) for k, v in views.items()}
    optimizer, times = adamw(method.student, recipe.optim, 1e-4), []
    applied = torch.ones((), device=device)
    for _ in range(steps):
        start = time.perf_counter()
        with autocast(device, precision):
            loss = method(views, MID_RUN)["loss"]
        loss.backward()
        method.before_step(MID_RUN, applied)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(MID_RUN, applied)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    peak = int(memory_gib(device) * 2**30)
    return peak - before, batch / statistics.median(times[1:])


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# --- tracing ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _traced(recipe: Recipe, batch: int, like: str = "cuda") -> Iterator[tuple[Method, dict[str, Tensor]]]:
    """The method and a batch of its views without data; with the fused attention kernel unless `like` is
    "cpu"."""
    with META, _Uninitialized():
        method = _method(recipe, batch)
    attend = blocks.attend if like == "cpu" else F.scaled_dot_product_attention
    with (
        signals.postponed(),  # torch calls the counters from C++
        _WithoutData(),
        mock.patch.object(blocks, "attend", attend),
    ):
        method.to_empty(device="cpu")
        method.average_shapes(batch)
        yield method, _views(method, recipe, batch)


def _method(recipe: Recipe, batch: int) -> Method:
    channels = recipe.images.channels
    return METHODS[recipe.method](changed(recipe, batch_size=batch), (0.5,) * channels, (0.25,) * channels)


def _views(method: Method, recipe: Recipe, batch: int) -> dict[str, Tensor]:
    with _disable_current_modes():
        image = np.zeros((*recipe.images.shape, recipe.images.channels), np.uint8)
        real = default_collate([method.views()(image, np.random.default_rng(0))])
    return {k: v.expand(batch, *v.shape[1:]).clone() for k, v in real.items()}


class _Uninitialized(TorchDispatchMode):
    """Initializes no weights, which would take most of the time of building a network on META."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


class _Shape(Tensor):
    """A tensor on the CPU without data. `meta` has its shape and its storage, and is on torch's device for
    tensors without data, which autocast and the choice of kernels do not take for a CPU."""

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor) -> "_Shape":
        strides, offset = meta.stride(), meta.storage_offset()
        self = Tensor._make_wrapper_subclass(cls, meta.shape, strides, offset, dtype=meta.dtype, device=CPU)
        self.meta = meta
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with _WithoutData():
            return func(*args, **(kwargs or {}))


class _WithoutData(TorchDispatchMode):
    """Makes all operations compute only the shapes of their results, once for the same shapes of arguments.
    (torch's FakeTensorMode takes many times as long.)"""

    results: ClassVar[dict[Any, Any]] = {}
    "by operation and arguments; None if the result is not new: a changed argument, or a view of one"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {}
        args, kwargs = _meta(args, given), _meta(kwargs or {}, given)
        result = None
        if given:
            key = func, _signature(args), _signature(kwargs)
            if key not in self.results:
                self.results[key] = self.new(func, args, kwargs, given)
            result = self.results[key]
        return _shape(func(*args, **kwargs) if result is None else _new(result), given)

    def new(self, func, args, kwargs, given):
        """The result of an operation if it is new; else None."""
        if func._schema.is_mutable:
            return None
        result, arguments = func(*args, **kwargs), {_storage(t)._cdata for t in given.values()}
        return None if any(_storage(t)._cdata in arguments for t in _tensors(result)) else result


def _meta(x: Any, given: dict[int, Tensor]) -> Any:
    """The arguments of an operation on META. `given` gets the original of each tensor."""
    if isinstance(x, Tensor):
        meta = x.meta if isinstance(x, _Shape) else x.to(META)
        given[id(meta)] = x
        return meta
    if isinstance(x, (list, tuple)):
        return [_meta(each, given) for each in x]
    if isinstance(x, dict):
        return {key: _meta(value, given) for key, value in x.items()}
    return META if isinstance(x, torch.device) else x


def _signature(x: Any) -> Any:
    """What the shapes of an operation's results depend on, hashable."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype
    if isinstance(x, dict):
        return tuple((key, _signature(value)) for key, value in x.items())
    return tuple(map(_signature, x)) if isinstance(x, list) else (type(x), x)  # 1 and 1.0 give other types


def _new(x: Any) -> Any:
    """Tensors with the shapes of these results."""
    if isinstance(x, Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)
    return type(x)(map(_new, x)) if isinstance(x, (list, tuple)) else x


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for each in x:
            yield from _tensors(each)


def _shape(x: Any, given: dict[int, Tensor]) -> Any:
    """The results of an operation; one that was `given` is returned as it was."""
    if isinstance(x, Tensor):
        return given[id(x)] if id(x) in given else _Shape(x)
    return type(x)(_shape(each, given) for each in x) if isinstance(x, (list, tuple)) else x


def _storage(t: Tensor) -> torch.UntypedStorage:
    return (t.meta if isinstance(t, _Shape) else t).untyped_storage()


def _count(recipe: Recipe, batch: int, precision: str) -> dict[str, Any]:
    with _traced(recipe, batch) as (method, views):
        counter = _Phases()
        saved = _SavedBytes({_storage(p)._cdata for p in method.parameters()})
        if method.teacher is not None:
            counter.mark_teacher(method.teacher)
        with counter, autocast(CPU, precision):
            with saved_tensors_hooks(saved.pack, lambda t: t):
                loss = method(views, MID_RUN)["loss"]
            counter.phase = "backward"
            loss.backward()
        trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
        total = sum(p.numel() for p in method.parameters()) + sum(b.numel() for b in method.buffers())
        return counter.flops | {"saved": saved.bytes, "trained": trained, "frozen": total - trained}


def _convolution_backward_flops(grad: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """FLOPs of a convolution's backward pass: each required gradient costs as much as the forward pass.

    torch's formula counts grouped weights as if they were dense.
    """
    return sum(rest[-1][:2]) * conv_flop_count(list(x), list(weight), list(grad))


FORMULAS: dict[Any, Callable[..., int]] = flop_registry | {
    # torch counts only the fused attention kernels of CUDA.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
    torch.ops.aten.convolution_backward: shape_wrapper(_convolution_backward_flops),
}
"FLOPs of the operations that have them, from their arguments and `out_val`."


class _Phases(TorchDispatchMode):
    """FLOPs by phase; those inside the teacher's modules are its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.depth = "forward", 0
        self.flops = dict.fromkeys(("student_forward", "teacher_forward", "backward"), 0)

    def mark_teacher(self, teacher: nn.Module) -> None:
        """Count the work of this module as the teacher's."""

        def add(change: int) -> Any:
            def hook(*_: Any) -> None:
                self.depth += change

            return hook

        for module in teacher.modules():
            module.register_forward_pre_hook(add(1))
            module.register_forward_hook(add(-1))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := FORMULAS.get(func.overloadpacket):
            phase = self.phase
            if phase == "forward":
                phase = "teacher_forward" if self.depth else "student_forward"
            self.flops[phase] += formula(*args, **(kwargs or {}), out_val=out)
        return out


class _LiveBytes(TorchDispatchMode):
    """Bytes of all live storages, and their peak."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self.storages: dict[int, weakref.ref[Any]] = {}
        self.now = self.peak = 0
        for tensor in tensors:
            self.add(tensor)

    def add(self, t: Tensor) -> None:
        """Count the storage of a tensor, unless it is counted already."""
        storage = _storage(t)
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages[key] = weakref.ref(storage, lambda _: self.remove(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def remove(self, key: int, size: int) -> None:
        del self.storages[key]
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in _tensors(out):
            self.add(t)
        return out


class _SavedBytes:
    """Bytes of the storages that autograd saves, each counted once, without the parameters."""

    def __init__(self, parameters: set[int]):
        self.counted, self.bytes = parameters, 0
        self.alive: list[Any] = []

    def pack(self, t: Tensor) -> Tensor:
        storage = _storage(t)
        if storage._cdata not in self.counted:
            self.counted.add(storage._cdata)
            self.alive.append(storage)  # or a new storage could reuse its address
            self.bytes += storage.nbytes()
        return t


# --- comparison ---------------------------------------------------------------------------------------------


def recipes(model: str, names: Sequence[str]) -> dict[str, Recipe]:
    """Methods and their variants by name, with this model and the settings of the reference codes: those for
    ViT-S up to its width, else those for ViT-B.

    Raises ConfigError that names all methods that do not support the model.
    """
    first = load_recipe(f"{names[0]}-vitb16-in1k")
    with torch.device("meta"):
        width = build_encoder(first.images, changed(first, model=model).network).width
    size = "s" if width <= 384 else "b"
    settings: dict[str, Any] = {"model": model}
    if model not in ("vit_small_patch16", "vit_base_patch16"):
        settings["heads"] = None
    rows, problems = {}, []
    for name in names:
        recipe = rows[name] = changed(load_recipe(f"{name}-vit{size}16-in1k"), **settings)
        rows |= {variant.name: changed(recipe, **variant.settings) for variant in METHODS[name].variants}
        problems += METHODS[name].validate(recipe)
    if problems:
        raise ConfigError(f"{model}: {'; '.join(problems)}; leave them out with --methods")
    return rows


def count_costs(
    models: Sequence[str],
    names: Sequence[str],
    *,
    batch: int = 128,
    precision: str = "bf16",
    device: str | None = None,
    measured_batch: int = 16,
    fit: float | None = None,
    log: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """A row of numbers for every model and method; ratios are to the first row of a model.

    Given a `device`, also measures there, with `measured_batch` images; given `fit`, also computes the
    largest batch that fits into so many GiB.
    """
    if device and torch.device(device).type not in ("cpu", "cuda"):
        raise ConfigError(f"memory is measured on cpu and cuda only, not on {device}")
    rows: list[dict[str, Any]] = []
    for model, methods in {model: recipes(model, names) for model in models}.items():
        first: Cost | None = None
        for name, recipe in methods.items():
            log(f"{model}: {name}")
            c = cost(recipe, precision)
            first = first or c
            row = asdict(c) | {
                "name": name,
                "flops": c.flops,
                "flops_ratio": c.flops / first.flops,
                "saved_ratio": c.saved / first.saved,
            }
            row["peak"] = peak(recipe, batch, precision)
            if fit:
                row["fits"] = largest_batch(recipe, int(fit * 2**30), precision)
            if device:
                row["measured_peak"], speed = measure(recipe, measured_batch, device, precision)
                row["predicted_peak"] = peak(recipe, measured_batch, precision, like=device)
                row["images_per_second"] = speed
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
    return {
        "about": about,
        "rows": rows,
        "machine": describe_machine(torch.device(device or "cpu"), precision),
    }


def write_cost_page(results: dict[str, Any], out: Path) -> Path:
    """The page of a comparison: see `write_page`."""
    names = {row["name"] for row in results["rows"]}
    notes = [
        variant.note for method in METHODS.values() for variant in method.variants if variant.name in names
    ]
    about = {"title": "What a training step costs", "notes": notes, "ours": load_recipe("bundled").method}
    return write_page(out, "cost", "rcmae.compare", results, {}, **about)
