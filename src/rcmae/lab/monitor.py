"""The diagnostics of a run: the teacher's effect on the student, and the health of the features.

At every log line: metrics from values that the step has computed anyway. Every `every` steps: the full
gradients of both losses on a few images, and the health of recent features. At milestones: LiDAR.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..engine.schedules import Progress
from ..methods import Method
from ..methods.base import Comparison
from ..models.teacher import Teacher
from .health import health, lidar

MAX_FEATURES = 2048
"Most recent pooled features that are stored."

SLICES = 16
"Weight tensors whose first values are compared before and after a step."

LIDAR_EVERY = 300
"Minimum number of steps between two LiDARs; one costs as much as two steps."

GRADIENT_IMAGES = 32
"Images for the full gradients."


def cadence(total: int) -> int:
    """Steps between two measurements of the slow diagnostics in a run of `total` steps."""
    return max(200, min(1000, total // 10))


class Monitor:
    """Observes a method during training, on rank 0, without changing weights, gradients or random numbers."""

    def __init__(self, method: Method, total: int):
        self.method, self.total = method, total
        self.every = cadence(total)
        self.teacher = method.teacher
        self.expected = 1.0
        self.comparison: Comparison | None = None
        self.features: Tensor | None = None
        self.batch: dict[str, Tensor] | None = None
        self.last_input: Tensor | None = None
        self.losses: Tensor | None = None
        self.before: list[tuple[Tensor, Tensor]] = []
        self.recording = False
        method.register_forward_pre_hook(self._record_batch)
        method.register_forward_hook(self._record_losses)
        method.backbone("student").vit.norm.register_forward_hook(self._record_features)
        if method.last_layer is not None:
            method.last_layer.register_forward_pre_hook(self._record_last_input)

    # --- recording a step -----------------------------------------------------------------------------------

    def _record_batch(self, method: nn.Module, args: tuple[Any, ...]) -> None:
        if self.recording:
            self.batch = {k: v[:GRADIENT_IMAGES].clone() for k, v in args[0].items()}

    def _record_losses(self, method: nn.Module, args: Any, losses: dict[str, Tensor]) -> None:
        if self.recording:
            self.losses = torch.stack([v.detach().float() for v in losses.values()])

    def _record_features(self, norm: nn.Module, args: Any, tokens: Tensor) -> None:
        if self.recording and tokens.requires_grad:  # the student's, not the teacher's
            pooled = self._pool(tokens.detach())
            features = pooled if self.features is None else torch.cat([self.features, pooled])
            self.features = features[-MAX_FEATURES:]

    def _record_last_input(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if self.recording and args[0].requires_grad:
            self.last_input = args[0].detach()

    def _pool(self, tokens: Tensor) -> Tensor:
        prefix = self.method.backbone("student").vit.num_prefix_tokens
        return tokens[:, prefix:].float().mean(1)  # [b, d]

    def start(self, t: Progress) -> None:
        """Call before a step that will be logged."""
        self.recording = True
        self.method.recorded = []
        if self.teacher is not None:
            self.expected = self.method.momentum_per_step(t)
            self.before = [
                (student.clone(), teacher.clone()) for student, teacher in self._slices(self.teacher)
            ]

    def _slices(self, teacher: Teacher[Any]) -> list[tuple[Tensor, Tensor]]:
        """The first values of some weights of (student, teacher), spread over the network."""
        pairs = zip(self.method.ema_source.parameters(), teacher.model.parameters(), strict=True)
        trained = [(s, t) for s, t in pairs if s.requires_grad]
        selected = trained[:: max(1, len(trained) // SLICES)]
        return [(s.detach().flatten()[:1024], t.detach().flatten()[:1024]) for s, t in selected]

    # --- every log line -------------------------------------------------------------------------------------

    def finish(self, means: dict[str, float]) -> dict[str, float]:
        """Call after that step, with the `means` of its log line; returns further values for the line."""
        self.recording = False
        recorded, self.method.recorded = self.method.recorded, None
        self.comparison = recorded[0] if recorded else None
        metrics = self.method.derived(means)
        if (c := self.comparison) is not None and self.last_input is not None:
            metrics |= last_layer(c, self.last_input[: len(c.prediction)].float())
        if self.before:
            metrics |= self._measured_momentum()
        self.last_input, self.before = None, []
        return {k: v for k, v in metrics.items() if math.isfinite(v)}

    def _measured_momentum(self) -> dict[str, float]:
        """The momentum of this step, measured on the weights of student S and teacher T.

        T' - T = a (S - T) + b (S' - T) by least squares; the momentum is 1 - a - b. Empty if rounding T' to
        float32 could change that by more than a sixteenth of the expected a + b, since the two distances are
        too small.
        """
        assert self.teacher is not None
        s, t, s_new, t_new = (
            torch.cat(parts).double()
            for parts in (*zip(*self.before, strict=True), *zip(*self._slices(self.teacher), strict=True))
        )
        if torch.equal(s, s_new):  # the step was skipped
            return {}
        weights = torch.linalg.pinv(torch.stack([s - t, s_new - t], 1)).sum(0)  # of T' - T in a + b
        error = torch.finfo(torch.float32).eps * t.norm() * weights.norm()
        if not 0 < 16 * error < 1 - self.expected:
            return {}
        measured = 1 - weights.dot(t_new - t).item()
        return {"measured_momentum": measured, "expected_momentum": self.expected}

    # --- less often -----------------------------------------------------------------------------------------

    def due(self, step: int, since: int, every: int | None = None) -> bool:
        """Whether a multiple of `every` steps (default: the cadence) lies in the `since` steps up to `step`,
        or the run ends here."""
        every = every or self.every
        return step // every > (step - since) // every or step == self.total

    def slow(self) -> dict[str, Any]:
        """The slow diagnostics: full gradients of both losses on a few images of the last step, distance of
        student and teacher by block, and health of recent features."""
        metrics: dict[str, Any] = {}
        if self.features is not None and len(self.features) >= 16:
            metrics |= health(self.features)
        if self.teacher is not None:
            metrics["distance"] = distance_by_block(self.method.ema_source, self.teacher.model)
            if self.comparison is not None and self.batch is not None:
                r, c = both_gradients(self.method, self.batch)
                gamma = self.comparison.gamma
                metrics["gradient"] = relation(list(r.values()), list(c.values()), gamma)
                metrics["gradient_by_block"] = {
                    block: relation([r[name] for name in names], [c[name] for name in names], gamma)
                    for block, names in blocks(r).items()
                }
        return metrics

    @torch.no_grad()
    def lidar(self, batch: dict[str, Tensor], views: int = 8) -> float | None:
        """LiDAR of the student on fixed images with `views` masks each; None for a method without masks."""
        generator = torch.Generator().manual_seed(0)
        masked = self.method.remask(batch, generator)
        if masked is None:
            return None
        pooled: list[Tensor] = []
        norm = self.method.backbone("student").vit.norm
        hook = norm.register_forward_hook(lambda norm, args, tokens: pooled.append(self._pool(tokens)))
        for i in range(views):
            self.method.encode(self.method.remask(batch, generator) if i else masked)
        hook.remove()
        return lidar(torch.stack(pooled, 1))


# --- gradients of the two losses ----------------------------------------------------------------------------


def last_layer(c: Comparison, inputs: Float[Tensor, "b m w"]) -> dict[str, float]:
    """The relation of both losses' gradients of the last layer's weight, computed exactly from the inputs of
    the layer, and the cosine of the two errors."""
    e, d = c.prediction - c.target, c.prediction - c.teacher_prediction  # [b, m, p]
    if c.weight is not None:
        d = d * (c.weight * (c.weight.shape[1] / c.weight.sum(1, keepdim=True).clamp_min(1))).unsqueeze(2)
    reconstruction, consistency = (torch.einsum("bmp,bmw->pw", error, inputs) for error in (e, d))
    metrics = relation([reconstruction], [consistency], c.gamma)
    return {f"last_{k}": v for k, v in metrics.items()} | {"output_cosine": cosine([e], [d])}


def both_gradients(method: Method, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of reconstruction and consistency (without gamma) by parameter name, in float32, for a method
    with `compare`; not compiled, since compiled blocks can be differentiated once only."""
    trained = {name: p for name, p in method.student.named_parameters() if p.requires_grad}
    weights = list(trained.values())
    autocast = torch.autocast(weights[0].device.type, enabled=False)
    with torch.enable_grad(), autocast, torch.compiler.set_stance("force_eager"):
        c = method.compare(batch)
        assert c is not None
        reconstruction = torch.autograd.grad(F.mse_loss(c.prediction, c.target), weights, retain_graph=True)
        consistency = torch.autograd.grad(c.mean_square(c.prediction - c.teacher_prediction), weights)
    return dict(zip(trained, reconstruction, strict=True)), dict(zip(trained, consistency, strict=True))


def relation(r: list[Tensor], c: list[Tensor], gamma: float) -> dict[str, float]:
    """For the gradients r and c: their cosine, |c| / |r| (ratio), and |r + gamma c| / |r| (shrink)."""
    total = [a + gamma * b for a, b in zip(r, c, strict=True)]
    length = max(norm(r), 1e-30)
    return {"cosine": cosine(r, c), "ratio": norm(c) / length, "shrink": norm(total) / length}


def norm(parts: list[Tensor]) -> float:
    """The norm of a gradient, given by its parts."""
    return torch.stack(torch._foreach_norm(parts)).double().norm().item()


def cosine(a: list[Tensor], b: list[Tensor]) -> float:
    """The cosine of two gradients, given by their parts."""
    dot = sum((x.double() * y.double()).sum().item() for x, y in zip(a, b, strict=True))
    return dot / max(norm(a) * norm(b), 1e-30)


# --- names --------------------------------------------------------------------------------------------------


def blocks(names: Iterable[str]) -> dict[str, list[str]]:
    """Parameter names by block, in order: "encoder.vit.blocks.3.attn.qkv.weight" belongs to "encoder 3"."""
    by_block: dict[str, list[str]] = {}
    for name in names:
        parts = [p for p in re.sub(r"\.(weight|bias)$", "", name).split(".") if p not in ("vit", "blocks")]
        by_block.setdefault(" ".join(parts[:2]), []).append(name)
    return by_block


def distance_by_block(student: nn.Module, teacher: nn.Module) -> dict[str, float]:
    """|student - teacher| / |student| for each block."""
    s, t = (dict(m.named_parameters()) for m in (student, teacher))
    with torch.no_grad():
        return {
            block: norm([s[n] - t[n] for n in names]) / max(norm([s[n] for n in names]), 1e-30)
            for block, names in blocks([n for n, p in s.items() if p.requires_grad]).items()
        }
