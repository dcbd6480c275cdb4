"""Communication between ranks. With a single process every function here is the identity."""

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ConfigError
from .limits import cores

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those that `torchrun` started; `control` is a CPU process group, which never
    synchronizes with a GPU."""

    rank: int = 0
    size: int = 1
    control: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any_rank(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        if self.size == 1:
            return list(flags)
        reduced = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=self.control)
        return [bool(f) for f in reduced]

    def all_ranks(self, flag: Tensor) -> Tensor:
        """Reduces a 0 or 1 on the device in place: 1 only if it is 1 on every rank."""
        if self.size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return flag

    def broadcast(self, value: T) -> T:
        """The value of rank 0 (numbers and text)."""
        if self.size == 1:
            return value
        objects = [value]
        dist.broadcast_object_list(objects, src=0, group=self.control)
        return objects[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in order on rank 0; an empty list on the others."""
        if self.size == 1:
            return [value]
        objects: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, objects, group=self.control)
        return objects or []


def _start(device: torch.device) -> World:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    control = dist.new_group(backend="gloo") if device.type == "cuda" else None
    return World(dist.get_rank(), dist.get_world_size(), control)


@contextmanager
def process_group(device: torch.device) -> Iterator[World]:
    """Join the process group that torchrun describes in the environment, if it does, and leave it at the end
    unless it had been joined before. Unless the user has set their number, torch's threads become as many as
    control groups allow, which torch does not know."""
    if "OMP_NUM_THREADS" not in os.environ and (allowed := cores()) < torch.get_num_threads():
        torch.set_num_threads(allowed)
    before = dist.is_initialized()
    try:
        yield _start(device)
    finally:
        if dist.is_initialized() and not before:
            dist.destroy_process_group()


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def average(value: Tensor) -> Tensor:
    """The elementwise mean over all ranks, on the device."""
    if (ranks := _ranks()) > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= ranks
    return value


class _Mean(torch.autograd.Function):
    """The mean is self-adjoint: each rank receives the mean of the gradients of all ranks."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return average(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return average(gradient)


def mean_with_gradient(value: Tensor) -> Tensor:
    """The differentiable mean over all ranks."""
    return _Mean.apply(value) if _ranks() > 1 else value


def gather(rows: Tensor) -> Tensor:
    """The rows of all ranks without gradient; every rank must have the same number."""
    rows = rows.detach()
    if (ranks := _ranks()) == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(ranks)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def wrap(method: nn.Module, world: World) -> nn.Module:
    """The method in DistributedDataParallel, if there are several ranks."""
    if world.size == 1:
        return method
    # Harmless: it concerns dimensions of size 1, as in 1 x 1 kernels. The filter stays, since the warning
    # comes with the first gradient.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch renames `broadcast_buffers`
        return DistributedDataParallel(method, broadcast_buffers=False)


def sync_gradients_on_last(net: nn.Module, last: bool) -> AbstractContextManager[None]:
    """A context in which gradients are all-reduced only if this is the last micro-batch."""
    return nullcontext() if last or not isinstance(net, DistributedDataParallel) else net.no_sync()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to bf16, if that is the precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def pick_device(name: str) -> torch.device:
    """The device by name; `auto` prefers CUDA, then MPS, then the CPU. Raises ConfigError if it is not
    available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ConfigError(f"{name!r} is not a valid device; write auto, cpu, cuda, cuda:1 or mps") from e
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        raise ConfigError(f"device {name} is not available here; --device auto picks one that is")
    if device.type == "cuda":
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"device cuda:{index} does not exist; number of CUDA devices: {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """`bf16` or `fp32`; `auto` picks bf16 if matrix products are faster with it on the device."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if device.type == "cpu" and fast else "fp32"
