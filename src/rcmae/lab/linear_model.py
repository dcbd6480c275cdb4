"""The paper's linear model, in which the effect of the mean teacher has a closed form.

Student S and teacher T are [d d] matrices. A batch is x [b d], one row per sample; x~ is its visible part
(hidden values are 0). L_r and L_c are means over the batch.

    L_r = 1/2 mean |S x~ - x|^2        L_c = 1/2 mean |S x~ - T x~|^2        L = L_r + gamma L_c
    S_t = S_t-1 + u_t-1                T_t = a T_t-1 + (1 - a) S_t           T_0 = S_0

u is the optimizer's update; for gradient descent u_k = -lr g_k with g_k the gradient of L at S_k. The
proposition of the paper (Lee et al., ICLR 2023, section 3, in our derivation) and its corollaries:

    S_t - T_t  = sum_i a^i u_t-i                                              for any optimizer
    grad L_c   = (S_t - T_t) x~ x~'
               = -lr sum_i a^i (x~_t-i . x~_t) r_t-i x~_t'                    `gated_consistency`: descent
    with momentum b, a^i becomes a (a^i - b^i) / (a - b)
    with AdamW, u_k is a ratio of averages of past gradients

So the consistency gradient reverts past gradients in proportion to the similarity of their inputs to the
present one: a conditional momentum with the sign reversed. `companion` and the functions after it derive the
effect on speed, stability and noise for each mode.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Matrix = Float[Tensor, "*runs d d"]
Batch = Float[Tensor, "*runs b d"]
Optimizer = Literal["sgd", "momentum", "adamw"]
OPTIMIZERS: tuple[Optimizer, ...] = ("sgd", "momentum", "adamw")


# --- losses and gradients -----------------------------------------------------------------------------------


def reconstruction_gradient(s: Matrix, x: Batch, visible: Batch) -> Matrix:
    """grad_S L_r = mean (S x~ - x) x~'."""
    return (visible @ s.mT - x).mT @ visible / visible.shape[-2]


def consistency_gradient(s: Matrix, t: Matrix, visible: Batch) -> Matrix:
    """grad_S L_c = (S - T) mean x~ x~'."""
    return (s - t) @ (visible.mT @ visible) / visible.shape[-2]


def rescaled(direction: Matrix, like: Matrix) -> Matrix:
    """`direction` with the norm of `like`; 0 where there is no direction."""
    norms = direction.norm(dim=(-2, -1), keepdim=True), like.norm(dim=(-2, -1), keepdim=True)
    return direction * (norms[1] / norms[0].clamp_min(1e-30))


def effective_beta(beta: float, gamma: float, kappa: float) -> float:
    """The momentum of an optimizer without a teacher whose average of gradients falls as fast.

    With m <- beta m + (1 - beta) (r + gamma c) and c = kappa m + what does not depend on m, a step keeps
    beta + (1 - beta) gamma kappa of m. kappa is <c, m> / <m, m>, below 0 where the teacher opposes it.
    """
    return beta + (1 - beta) * gamma * kappa


# --- the proposition ----------------------------------------------------------------------------------------


def gated_consistency(
    residuals: Float[Tensor, "t b d"],
    past: Float[Tensor, "t b d"],
    visible: Batch,
    lr: float,
    weights: Float[Tensor, " t"],
) -> Matrix:
    """grad L_c for gradient descent, with or without momentum: the past residuals, gated by the dot products
    of their inputs with the present ones.

    -lr sum_i w_i mean_jk (x~_{i,j} . x~_k) r_{i,j} x~_k', for past steps i (oldest first), their samples j
    and present samples k. `weights` are alpha^(t-i), or with momentum those given above. An input without a
    visible value in common contributes exactly nothing.
    """
    gates = torch.einsum("tbd,kd->tbk", past, visible)
    total = torch.einsum("t,tbk,tbd,ke->de", weights, gates, residuals, visible)
    return -lr * total / (residuals.shape[1] * len(visible))


# --- a run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """S and T before a step, the gradients of both losses, and the update of S."""

    student: Matrix
    teacher: Matrix
    reconstruction: Matrix
    consistency: Matrix
    update: Matrix


def descend(
    inputs: Iterator[tuple[Batch, Batch]],
    start: Matrix,
    alpha: float,
    gamma: float = 1.0,
    lr: float = 0.1,
    optimizer: Optimizer = "sgd",
    beta: float = 0.9,
    gated: bool = True,
) -> Iterator[Step]:
    """Train on pairs (x, x~) with PyTorch's optimizer and yield every step. `beta` is the momentum of
    "momentum" and beta1 of "adamw". Several runs at once have a further dimension in front.

    If not `gated`, the consistency gradient is replaced by S - T, scaled to its norm: a pull towards the
    teacher that does not depend on the input.
    """
    s, t = start.clone().requires_grad_(), start.clone()
    if optimizer == "adamw":
        optim: torch.optim.Optimizer = torch.optim.AdamW([s], lr=lr, betas=(beta, 0.95), weight_decay=0.0)
    else:
        optim = torch.optim.SGD([s], lr=lr, momentum=beta if optimizer == "momentum" else 0.0)
    for x, visible in inputs:
        before = s.detach().clone()
        gradients = reconstruction_gradient(before, x, visible), consistency_gradient(before, t, visible)
        if not gated:
            gradients = gradients[0], rescaled(before - t, gradients[1])
        s.grad = gradients[0] + gamma * gradients[1]
        optim.step()
        yield Step(before, t, *gradients, s.detach() - before)
        t = alpha * t + (1 - alpha) * s.detach()


# --- mode by mode -------------------------------------------------------------------------------------------
# With gradient descent, every eigenvector of the inputs' covariance evolves independently. `rate` is lr times
# its eigenvalue.


def companion(rate: float, gamma: float, alpha: float) -> Float[Tensor, "2 2"]:
    """The linear map of the errors (e, f) of student and teacher over one step:
    e' = e - rate ((1 + gamma) e - gamma f), f' = a f + (1 - a) e'."""
    e, f = 1 - rate * (1 + gamma), rate * gamma
    return torch.tensor([[e, f], [(1 - alpha) * e, alpha + (1 - alpha) * f]], dtype=torch.float64)


def contraction(rate: float, gamma: float, alpha: float) -> float:
    """The asymptotic factor of the error per step, the spectral radius; 1 - rate without a teacher."""
    return torch.linalg.eigvals(companion(rate, gamma, alpha)).abs().max().item()


def stability_limit(gamma: float, alpha: float) -> float:
    """The largest stable rate, 2 (1 + a) / (1 + a + 2 a gamma): 2 without a teacher, about 2 / (1 + gamma)
    with a slow one.

    At this rate the companion matrix has the eigenvalue -1; Jury's other conditions hold below it.
    """
    return 2 * (1 + alpha) / (1 + alpha + 2 * alpha * gamma)


def effective_momentum(rate: float, gamma: float, alpha: float) -> float:
    """b = a (1 - rate (1 + gamma)): a mode evolves as with heavy-ball momentum b and step size (1 - a) rate.

    b is the determinant of the companion matrix. It falls with the rate: directions that the inputs share
    lose their momentum first, which makes the momentum regularizer conditional.
    """
    return alpha * (1 - rate * (1 + gamma))


def stationary_variance(rate: float, gamma: float, alpha: float, noise: float = 1.0) -> tuple[float, float]:
    """The stationary variances of student and teacher under independent noise of variance `noise` in each
    step.

    They are the fixed point P = M P M' + Q with the companion matrix M and the covariance Q of the noise in a
    step; infinite above the stability limit.
    """
    if rate >= stability_limit(gamma, alpha):
        return math.inf, math.inf
    m = companion(rate, gamma, alpha)
    direction = torch.tensor([1.0, 1 - alpha], dtype=torch.float64)
    q = noise * torch.outer(direction, direction)
    p = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - torch.kron(m, m), q.flatten()).view(2, 2)
    return p[0, 0].item(), p[1, 1].item()


def steps_to(target: float, rate: float, gamma: float, alpha: float) -> int:
    """Steps until the student's error in a mode has fallen from 1 to `target` for good, without noise."""
    factor = contraction(rate, gamma, alpha)
    if factor >= 1:
        raise ValueError(f"a rate of {rate} is not stable at gamma {gamma}, alpha {alpha}")
    m, state, last = companion(rate, gamma, alpha), torch.ones(2, dtype=torch.float64), 0
    bound = math.ceil(math.log(target / 10) / math.log(factor)) + 10
    for step in range(1, bound + 1):
        state = m @ state
        if abs(state[0].item()) > target:
            last = step
    return last + 1
