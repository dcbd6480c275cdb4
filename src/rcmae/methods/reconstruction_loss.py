"""The squared errors of masked auto-encoding, with or without a teacher, fused to save memory bandwidth."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class _Blend(torch.autograd.Function):
    """|s - x|^2 + gamma |s - t|^2.

    With e = s - x and d = s - t, its gradient is proportional to e + gamma d, the only buffer that is saved
    for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, x: Tensor, t: Tensor | None, gamma: float) -> tuple[Tensor, ...]:
        e = s - x
        reconstruction = _mean_product(e, e)
        if t is None:
            ctx.save_for_backward(e)
            return reconstruction, reconstruction.clone()
        d = s - t
        consistency = _mean_product(d, d)
        # |t - x|^2, since t - x = e - d
        teacher_reconstruction = reconstruction + consistency - 2 * _mean_product(e, d)
        ctx.save_for_backward(e.add_(d, alpha=gamma))
        return reconstruction + gamma * consistency, reconstruction, consistency, teacher_reconstruction

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (error,) = ctx.saved_tensors
        return error * (grad * (2 / error.numel())), None, None, None


def _mean_product(a: Float[Tensor, "b m p"], b: Float[Tensor, "b m p"]) -> Tensor:
    """Mean of a * b without a temporary. Each sample is summed separately, since longer sums lose precision
    in float32."""
    return torch.bmm(a.view(len(a), 1, -1), b.view(len(b), -1, 1)).mean() / a[0].numel()


def squared_errors(
    s: Float[Tensor, "b m p"],
    x: Float[Tensor, "b m p"],
    t: Float[Tensor, "b m p"] | None = None,
    gamma: float = 0.0,
) -> dict[str, Tensor]:
    """Means over all values: |s - x|^2 (reconstruction), |s - t|^2 (consistency) and |t - x|^2 (the teacher's
    reconstruction). "loss" is reconstruction + gamma * consistency, or the reconstruction without t; only s
    gets its gradient.
    """
    # With autocast, the inner products and with them the logged losses would be rounded to bf16.
    with torch.autocast(s.device.type, enabled=False):
        values = _Blend.apply(s, x, t, gamma)
    names = ("loss", "reconstruction", "consistency", "teacher_reconstruction")
    return {name: v if name == "loss" else v.detach() for name, v in zip(names, values, strict=False)}
