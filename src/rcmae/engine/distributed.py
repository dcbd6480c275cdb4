"""Ranks, and the few things they tell each other. Alone, everything here is the identity."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among those that `torchrun` started; `control` is a group on the CPU that never waits for a GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: object = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, *flags: bool) -> list[bool]:
        """Each flag, raised everywhere if it is raised anywhere."""
        if self.size == 1:
            return list(flags)
        told = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.control)
        return [bool(f) for f in told]

    def everywhere(self, fine: Tensor) -> Tensor:
        """A 0 or 1 on the device, in place: 1 only if it is 1 on every rank."""
        if self.size > 1:
            dist.all_reduce(fine, op=dist.ReduceOp.MIN)
        return fine

    def from_first(self, value: object) -> object:
        """A plain value (numbers and text), as rank 0 has it."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def to_first(self, value: Any) -> list[Any]:
        """What every rank has, by rank, on rank 0; elsewhere nothing."""
        if self.size == 1:
            return [value]
        box = [None] * self.size if self.first else None
        dist.gather_object(value, box, group=self.control)
        return box or []


def start(device: torch.device) -> World:
    """Join the world that torchrun describes in the environment, or be alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    control = dist.new_group(backend="gloo") if device.type == "cuda" else None
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")), control)


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The world, left in the end by whoever joined it first."""
    before = dist.is_initialized()
    try:
        yield start(device)
    finally:
        if not before:
            stop()


def stop() -> None:
    """Leave the world."""
    if dist.is_initialized():
        dist.destroy_process_group()


def average(value: Tensor) -> Tensor:
    """The mean over all ranks, value by value, on the device; alone, itself."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


class _Mean(torch.autograd.Function):
    """A mean is its own adjoint: what flows back to a rank is the mean of what all ranks say."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return average(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return average(gradient)


def mean_with_gradient(value: Tensor) -> Tensor:
    """The mean over all ranks, through which gradients flow back to each of them."""
    return _Mean.apply(value) if dist.is_initialized() and dist.get_world_size() > 1 else value


def gather(rows: Tensor) -> Tensor:
    """The rows of all ranks, each of which has as many, without gradient; alone, the rows."""
    rows = rows.detach()
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def rank() -> int:
    """This process among the ranks; alone, 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def wrap(method: nn.Module, world: World) -> nn.Module:
    """The method, its gradients averaged over the ranks."""
    if world.size == 1:
        return method
    # Of dimensions of size 1, as 1 x 1 kernels have, where strides mean nothing. It comes with the first gradient, so not only in here.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch renames this option; older ones know it by this name only
        return DistributedDataParallel(method, broadcast_buffers=False)


def sync_gradients_on_last(net: nn.Module, last: bool):
    """A context in which gradients are exchanged for the last micro-batch only."""
    return nullcontext() if last or not isinstance(net, DistributedDataParallel) else net.no_sync()


def pick_device(name: str) -> torch.device:
    """The device by name; `auto` takes CUDA, then MPS, then the CPU. Raises ConfigError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ConfigError(f"{name!r} is no device; write auto, cpu, cuda, cuda:1 or mps") from e
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False):
        raise ConfigError(f"device {name} is not available here; --device auto takes what is")
    if device.type == "cuda":
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise ConfigError(f"device cuda:{index} is not here; this machine has {torch.cuda.device_count()}")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """`bf16` or `fp32`; `auto` takes bf16 where the device multiplies it faster."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if device.type == "cpu" and fast else "fp32"
