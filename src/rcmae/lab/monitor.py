"""Instruments that every run carries: what the teacher does to the student, and whether the features stay alive.

Three cadences. At every log line: numbers that cost nothing, from what the step has computed anyway. Every `every` steps: the
full gradients of both losses on a few images, and the health of recent features. At milestones, but not too often: LiDAR.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.schedules import Progress
from ..methods import Method
from ..methods.base import Comparison
from .health import health, lidar

RING = 2048
"Pooled features that are kept, the newest ones."

SLICES = 16
"Weight tensors of which a part is followed through a step."

LIDAR_EVERY = 300
"Steps between two LiDARs, at the least: one costs as much as two steps."

FEW = 32
"Images of the full gradients."


def cadence(total: int) -> int:
    """Steps between two looks of the slow instruments in a run of so many."""
    return max(200, min(1000, total // 10))


class Monitor:
    """Looks at a method while it trains, on rank 0. Nothing here changes what is computed: no weight, no gradient, no random number."""

    def __init__(self, method: Method, total: int):
        self.method, self.total = method, total
        self.every = cadence(total)
        self.teacher = method.teacher
        self.expected = 1.0
        self.seen: list[Comparison] | None = None
        self.features: Tensor | None = None
        self.batch: dict[str, Tensor] | None = None
        self.entered: Tensor | None = None
        self.losses: Tensor | None = None
        self.before: list[tuple[Tensor, Tensor]] = []
        self.looking = False
        method.register_forward_pre_hook(self._keep_batch)
        method.register_forward_hook(self._keep_losses)
        method.backbone("student").vit.norm.register_forward_hook(self._keep_features)
        if method.last_layer is not None:
            method.last_layer.register_forward_pre_hook(self._keep_entered)

    # --- what is kept of a step that is looked at -----------------------------------------------------------------------

    def _keep_batch(self, method: nn.Module, args: tuple[Any, ...]) -> None:
        if self.looking:
            self.batch = {k: v[:FEW].clone() for k, v in args[0].items()}

    def _keep_losses(self, method: nn.Module, args: Any, losses: dict[str, Tensor]) -> None:
        if self.looking:
            self.losses = torch.stack([v.detach().float() for v in losses.values()])

    def _keep_features(self, norm: nn.Module, args: Any, tokens: Tensor) -> None:
        if self.looking and tokens.requires_grad:
            prefix = self.method.backbone("student").vit.num_prefix_tokens
            pooled = tokens[:, prefix:].detach().float().mean(1)
            self.features = (pooled if self.features is None else torch.cat([self.features, pooled]))[-RING:]

    def _keep_entered(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if self.looking and args[0].requires_grad:
            self.entered = args[0].detach()

    def look(self, t: Progress) -> None:
        """Call before a step that will be logged."""
        self.looking = True
        self.method.watched = []
        if self.teacher is not None:
            self.expected = self.method.momentum_per_step(t)
            self.before = [(s.clone(), own.clone()) for s, own in self._slices()]

    def _slices(self) -> list[tuple[Tensor, Tensor]]:
        """Parts of some weights of (student, teacher), spread over the network."""
        pairs = [(s, own) for s, own in _pairs(self.method.ema_source, self.teacher.model) if s.requires_grad]
        chosen = pairs[:: max(1, len(pairs) // SLICES)]
        return [(s.detach().flatten()[:1024], own.detach().flatten()[:1024]) for s, own in chosen]

    def _pool(self, pooled: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
        prefix = self.method.backbone("student").vit.num_prefix_tokens
        return lambda norm, args, tokens: pooled.append(tokens[:, prefix:].float().mean(1))

    # --- every log line -------------------------------------------------------------------------------------------------

    def read(self, means: dict[str, float]) -> dict[str, float]:
        """After that step: what to add to its log line, whose `means` are given."""
        self.looking = False
        seen, self.method.watched = self.method.watched, None
        found = self.method.derived(means)
        if seen and self.entered is not None:
            found |= last_layer(seen[0], self.entered[: len(seen[0].prediction)].float())
        if self.before:
            found |= self._measured_momentum()
        self.seen, self.entered, self.before = seen, None, []
        return {k: v for k, v in found.items() if math.isfinite(v)}

    def _measured_momentum(self) -> dict[str, float]:
        """What the teacher kept of itself in this step, from the weights alone.

        T' - T = a (S - T) + b (S' - T) by least squares; the rest, 1 - a - b, is what it kept. Nothing is said while the
        expected movement is below what float32 can hold.
        """
        s, t, s_new, t_new = (torch.cat(parts).double() for parts in (*zip(*self.before, strict=True), *zip(*self._slices(), strict=True)))
        if torch.equal(s, s_new):  # the step was skipped
            return {}
        if (1 - self.expected) * (s_new - t).norm() < 16 * torch.finfo(torch.float32).eps * t.norm():
            return {}
        towards = torch.stack([s - t, s_new - t], 1)
        shares = torch.linalg.lstsq(towards, (t_new - t).unsqueeze(1), driver="gelsd" if s.device.type == "cpu" else None).solution
        return {"measured_momentum": 1 - shares.sum().item(), "expected_momentum": self.expected}

    # --- now and then ---------------------------------------------------------------------------------------------------

    def due(self, step: int, since: int, every: int | None = None) -> bool:
        """Is this look the first one past another `every` steps (default: the cadence), `since` steps after the one before? Or the last?"""
        every = every or self.every
        return step // every > (step - since) // every or step == self.total

    def slow(self) -> dict[str, Any]:
        """Full gradients of both losses on a few images of the last step, distance a block, and health of recent features."""
        found: dict[str, Any] = {}
        if self.features is not None and len(self.features) >= 16:
            found |= health(self.features)
        if self.teacher is not None:
            found["distance"] = distance_by_block(self.method.ema_source, self.teacher.model)
            if self.seen and self.batch is not None:
                parts, gamma = both_gradients(self.method, self.batch), self.seen[0].gamma
                found["gradient"] = relation(*parts, gamma)
                found["gradient_by_block"] = {
                    block: relation(*([part[name] for name in names] for part in parts), gamma) for block, names in blocks(parts[0]).items()
                }
        return found

    def due_lidar(self, step: int, since: int) -> bool:
        """Likewise for LiDAR, `since` being the steps between two milestones."""
        return self.due(step, since, LIDAR_EVERY)

    @torch.no_grad()
    def lidar(self, batch: dict[str, Tensor], views: int = 8) -> float | None:
        """LiDAR of the student on fixed images under `views` masks each; None for a method without masks."""
        generator, pooled = torch.Generator().manual_seed(0), []
        masked = self.method.masked_anew(batch, generator)
        if masked is None:
            return None
        hook = self.method.backbone("student").vit.norm.register_forward_hook(self._pool(pooled))
        for i in range(views):
            self.method.encode(self.method.masked_anew(batch, generator) if i else masked)
        hook.remove()
        return lidar(torch.stack(pooled, 1))


# --- gradients of the two losses --------------------------------------------------------------------------------------


def last_layer(c: Comparison, entered: Tensor) -> dict[str, float]:
    """Both losses' gradients of the last layer's weight, exactly, from its input; and the cosine of the two errors."""
    e, d = c.prediction - c.target, c.prediction - c.guess
    if c.weight is not None:
        d = d * (c.weight * (c.weight.shape[1] / c.weight.sum(1, keepdim=True).clamp_min(1))).unsqueeze(2)
    of_x, of_t = (torch.einsum("bmp,bmw->pw", error, entered) for error in (e, d))
    found = relation([of_x], [of_t], c.gamma)
    return {f"last_{k}": v for k, v in found.items()} | {"output_cosine": _cosine([e], [d])}


def both_gradients(method: Method, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of reconstruction and of consistency (without gamma) by parameter name, in float32, of a method that compares."""
    trained = {name: p for name, p in method.student.named_parameters() if p.requires_grad}
    device = next(iter(trained.values())).device
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        c = method.compare(batch)
        losses = F.mse_loss(c.prediction, c.target), c.mean(c.prediction - c.guess)
        found = [torch.autograd.grad(loss, list(trained.values()), retain_graph=i == 0) for i, loss in enumerate(losses)]
    return tuple(dict(zip(trained, gradients, strict=True)) for gradients in found)


def relation(r: Any, c: Any, gamma: float) -> dict[str, float]:
    """Of two gradients, given as lists or dicts of tensors: the cosine, |c| / |r|, and |r + gamma c| / |r|, the shrink of the step."""
    r, c = (list(g.values()) if isinstance(g, dict) else list(g) for g in (r, c))
    total = [a + gamma * b for a, b in zip(r, c, strict=True)]
    length = max(_norm(r), 1e-30)
    return {"cosine": _cosine(r, c), "ratio": _norm(c) / length, "shrink": _norm(total) / length}


def _norm(parts: list[Tensor]) -> float:
    return torch.stack(torch._foreach_norm(parts)).double().norm().item()


def _cosine(a: list[Tensor], b: list[Tensor]) -> float:
    dot = sum((x.double() * y.double()).sum().item() for x, y in zip(a, b, strict=True))
    return dot / max(_norm(a) * _norm(b), 1e-30)


# --- names ------------------------------------------------------------------------------------------------------------


def blocks(names: Any) -> dict[str, list[str]]:
    """Parameter names by block, in order: "encoder.vit.blocks.3.attn.qkv.weight" belongs to "encoder 3"."""
    found: dict[str, list[str]] = {}
    for name in names:
        parts = [p for p in re.sub(r"\.(weight|bias)$", "", name).split(".") if p not in ("vit", "blocks")]
        found.setdefault(" ".join(parts[:2]), []).append(name)
    return found


def distance_by_block(student: nn.Module, teacher: nn.Module) -> dict[str, float]:
    """|student - teacher| / |student| a block."""
    own, other = (dict(m.named_parameters()) for m in (student, teacher))
    with torch.no_grad():
        return {
            block: _norm([own[n] - other[n] for n in names]) / max(_norm([own[n] for n in names]), 1e-30)
            for block, names in blocks([n for n, p in own.items() if p.requires_grad]).items()
        }


def _pairs(student: nn.Module, teacher: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return list(zip(student.parameters(), teacher.parameters(), strict=True))
